"""What is in a picture: a portrait described by a handful of named attributes, and how to draw one at random.

A `Scene` says nothing about style: the same scene can be rendered as a shaded picture, a pencil sketch or a
doodle (see `helpers.world.styles`), and put into words (see `helpers.world.captions`).
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace

SUBJECTS = (
    "man", "woman", "cat", "dog", "bear", "rabbit", "fox", "owl", "robot", "alien", "skeleton", "hero", "astronaut",
)  # fmt: skip
HEADWEAR = ("none", "cowboy hat", "beanie", "crown", "top hat", "cap")
EYEWEAR = ("none", "glasses", "sunglasses")
NECKWEAR = ("none", "scarf", "tie", "bow tie")
BADGES = ("none", "sheriff star")
PROPS = ("none", "cup", "flower", "balloon", "book")  # held in a hand
EXPRESSIONS = ("smile", "neutral", "frown", "surprise")
BACKDROPS = ("plain", "gradient", "stripes", "dots", "hills", "city", "night sky", "room")
FRAMINGS = ("normal", "close", "far")
TURNS = ("none", "left", "right")  # where the head looks, as we see it
BACKGROUNDS = ("pink", "blue", "green", "yellow", "purple", "orange", "gray")
NIGHTS = ("blue", "green", "purple", "gray")  # the colours of a night sky: others would darken to brown
WEAR_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
HAIR_COLORS = ("black", "brown", "blond", "red", "gray")
# Fur, skin or shell. A skeleton is white and the bat-eared hero wears a dark mask.
SUBJECT_COLORS = {
    "man": ("light", "tan", "brown"),
    "woman": ("light", "tan", "brown"),
    "cat": ("orange", "gray", "black", "white"),
    "dog": ("brown", "white", "yellow"),
    "bear": ("brown", "black", "white"),
    "rabbit": ("white", "gray", "brown"),
    "fox": ("orange", "gray", "white"),
    "owl": ("brown", "gray", "white"),
    "robot": ("gray", "blue", "red"),
    "alien": ("green", "purple", "blue"),
    "skeleton": ("white",),
    "hero": ("black", "blue"),
    "astronaut": ("white", "orange", "blue"),  # the helmet's
}
BASE_STYLES = ("render", "flat", "sketch")  # MiniSD is pretrained on these
HELD_OUT_STYLES = ("doodles", "vintage")  # what the adapters must learn
EXTRA_STYLES = ("pixel", "blueprint", "stained_glass", "chalkboard")  # for a later study
STYLES = BASE_STYLES + HELD_OUT_STYLES + EXTRA_STYLES

# 10% of the subject x headwear pairs, one subject and at most two hats each, are never drawn for training in any
# style: prompts that name them ask the model to combine, not to remember.
HELD_OUT_PAIRS = frozenset(
    {
        ("cat", "top hat"),
        ("bear", "crown"),
        ("robot", "cowboy hat"),
        ("alien", "beanie"),
        ("woman", "cap"),
        ("skeleton", "crown"),
        ("owl", "top hat"),
        ("fox", "cowboy hat"),
    }
)
ALL_PAIRS = frozenset(itertools.product(SUBJECTS, HEADWEAR))

# Names that would melt into each other when one lies on the other.
_CLOSE = {
    frozenset(p)
    for p in (
        ("yellow", "orange"),
        ("yellow", "blond"),
        ("white", "gray"),
        ("white", "light"),
        ("black", "gray"),
        ("orange", "tan"),
        ("orange", "brown"),
        ("orange", "red"),
        ("pink", "red"),
        ("purple", "blue"),
        ("purple", "pink"),
        ("brown", "red"),
        ("brown", "tan"),
        ("yellow", "light"),
        ("orange", "light"),
    )
}


def clash(a: str, b: str) -> bool:
    """True when colour names `a` and `b` are the same or too close to tell apart side by side."""
    return a == b or frozenset((a, b)) in _CLOSE


@dataclass(frozen=True)
class Scene:
    """One portrait. Names come from the tuples of this module; the pose is in units of the picture's width."""

    subject: str
    color: str  # fur, skin, shell or helmet: SUBJECT_COLORS[subject]
    hair: str  # HAIR_COLORS for man and woman, else "none"
    headwear: str
    headwear_color: str  # "none" without headwear
    eyewear: str
    neckwear: str
    neckwear_color: str  # "none" without neckwear
    badge: str
    clothes_color: str
    background: str  # colour of the backdrop
    expression: str
    backdrop: str = "plain"
    prop: str = "none"
    prop_color: str = "none"
    turn: str = "none"
    framing: str = "normal"
    angle: float = 0.0  # of the head about its vertical axis, degrees, -24 … 24; positive looks right
    tilt: float = 0.0  # of the head to its shoulder, degrees, -12 … 12
    dx: float = 0.0  # shift right, -0.14 … 0.14
    dy: float = 0.0  # shift down, -0.03 … 0.06
    zoom: float = 1.0  # 0.72 … 1.3
    seed: int = 0  # of the hand's wobble


def _pick(rng: random.Random, names: tuple[str, ...], avoid: tuple[str, ...] = ()) -> str:
    """A name that does not clash with those to avoid; any name when every one clashes."""
    free = [n for n in names if not any(clash(n, a) for a in avoid)]
    return rng.choice(free or names)


def _sometimes(rng: random.Random, names: tuple[str, ...], share: float) -> str:
    """One of names[1:] with probability `share`, else names[0]."""
    return rng.choice(names[1:]) if rng.random() < share else names[0]


def _subject_and_headwear(rng: random.Random, pairs: str) -> tuple[str, str]:
    if pairs == "held_out":
        return rng.choice(sorted(HELD_OUT_PAIRS))
    while True:
        pair = rng.choice(SUBJECTS), _sometimes(rng, HEADWEAR, 0.78)
        if pairs == "all" or pair not in HELD_OUT_PAIRS:
            return pair


def _pose(rng: random.Random, framing: str) -> dict:
    """Turn, tilt, place and size. Most portraits face us from the middle; the rest have more life."""
    turn = _sometimes(rng, TURNS, 0.4)
    angle = rng.uniform(-4, 4) if turn == "none" else rng.uniform(14, 24) * (1 if turn == "right" else -1)
    wide = rng.random() < 0.25 and framing != "close"  # off-centre
    zoom = {"normal": (0.92, 1.08), "close": (1.18, 1.3), "far": (0.7, 0.8)}[framing]
    low = {"normal": (-0.03, 0.03), "close": (0.03, 0.06), "far": (0.0, 0.05)}[framing]
    return {
        "turn": turn,
        "angle": angle,
        "tilt": rng.uniform(-12, 12) if rng.random() < 0.4 else rng.uniform(-4, 4),
        "dx": rng.choice((-1, 1)) * rng.uniform(0.07, 0.14) if wide else rng.uniform(-0.04, 0.04),
        "dy": rng.uniform(*low),
        "zoom": rng.uniform(*zoom),
    }


def another_take(scene: Scene, rng: random.Random) -> Scene:
    """The same portrait again: all that a prompt names stays, pose, framing and the hand's wobble are drawn anew."""
    framing = rng.choices(FRAMINGS, (0.7, 0.15 if scene.badge == scene.prop == "none" else 0, 0.15))[0]
    return replace(scene, framing=framing, **_pose(rng, framing), seed=rng.randrange(2**31))


def sample_scene(rng: random.Random, pairs: str = "train") -> Scene:
    """A random scene with enough contrast that no part melts into its neighbour.

    pairs: "train" (held-out subject x headwear pairs never occur), "held_out" (only they do) or "all".
    Raises ValueError for another name.
    """
    if pairs not in ("train", "held_out", "all"):
        raise ValueError(f"pairs is 'train', 'held_out' or 'all', not {pairs!r}")
    subject, headwear = _subject_and_headwear(rng, pairs)
    color = rng.choice(SUBJECT_COLORS[subject])
    hair = _pick(rng, HAIR_COLORS, (color,)) if subject in ("man", "woman") else "none"
    body = (color,) if hair == "none" else (color, hair)
    backdrop = _sometimes(rng, BACKDROPS, 0.55)
    night = ("black",) if backdrop == "night sky" else ()  # what would melt into a dark sky
    if night and "black" in body:
        backdrop, night = "plain", ()
    background = _pick(rng, NIGHTS if backdrop == "night sky" else BACKGROUNDS, body)
    headwear_color = "none" if headwear == "none" else _pick(rng, WEAR_COLORS, (*body, background, *night))
    clothes_color = _pick(rng, WEAR_COLORS, (color, background, *night))
    neckwear = _sometimes(rng, NECKWEAR, 0.55)
    neckwear_color = "none" if neckwear == "none" else _pick(rng, WEAR_COLORS, (clothes_color, color, background))
    badge = _sometimes(rng, BADGES, 0.45 if headwear == "cowboy hat" else 0.06)
    prop = _sometimes(rng, PROPS, 0.3)
    prop_color = "none" if prop == "none" else _pick(rng, WEAR_COLORS, (clothes_color, background, *night))
    whole = badge == prop == "none"  # a star or a hand would be cut off
    framing = rng.choices(FRAMINGS, (0.7, 0.15 if whole else 0, 0.15))[0]
    return Scene(
        subject=subject,
        color=color,
        hair=hair,
        headwear=headwear,
        headwear_color=headwear_color,
        eyewear=_sometimes(rng, EYEWEAR, 0.45),
        neckwear=neckwear,
        neckwear_color=neckwear_color,
        badge=badge,
        clothes_color=clothes_color,
        background=background,
        expression=rng.choice(EXPRESSIONS),
        backdrop=backdrop,
        prop=prop,
        prop_color=prop_color,
        framing=framing,
        **_pose(rng, framing),
        seed=rng.randrange(2**31),
    )

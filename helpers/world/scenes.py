"""What is in a picture: a portrait described by a handful of named attributes, and how to draw one at random.

A `Scene` says nothing about style: the same scene can be rendered as a shaded picture, a pencil sketch or a
doodle (see `helpers.world.styles`), and put into words (see `helpers.world.captions`).
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

SUBJECTS = ("man", "woman", "cat", "dog", "bear", "rabbit", "robot", "alien", "skeleton", "hero")
HEADWEAR = ("none", "cowboy hat", "beanie", "crown", "top hat", "cap")
EYEWEAR = ("none", "glasses", "sunglasses")
NECKWEAR = ("none", "scarf", "tie", "bow tie")
BADGES = ("none", "sheriff star")
EXPRESSIONS = ("smile", "neutral", "frown")
BACKGROUNDS = ("pink", "blue", "green", "yellow", "purple", "orange", "gray")
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
    "robot": ("gray", "blue", "red"),
    "alien": ("green", "purple", "blue"),
    "skeleton": ("white",),
    "hero": ("black", "blue"),
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
    color: str  # fur, skin or shell: SUBJECT_COLORS[subject]
    hair: str  # HAIR_COLORS for man and woman, else "none"
    headwear: str
    headwear_color: str  # "none" without headwear
    eyewear: str
    neckwear: str
    neckwear_color: str  # "none" without neckwear
    badge: str
    clothes_color: str
    background: str
    expression: str
    dx: float = 0.0  # shift right, -0.05 … 0.05
    dy: float = 0.0  # shift down, -0.03 … 0.03
    tilt: float = 0.0  # degrees, -7 … 7
    zoom: float = 1.0  # 0.92 … 1.08
    seed: int = 0  # of the hand's wobble


def _pick(rng: random.Random, names: tuple[str, ...], avoid: tuple[str, ...] = ()) -> str:
    """A name that does not clash with those to avoid; any name when every one clashes."""
    free = [n for n in names if not any(clash(n, a) for a in avoid)]
    return rng.choice(free or names)


def sample_scene(rng: random.Random, pairs: str = "train") -> Scene:
    """A random scene with enough contrast that no part melts into its neighbour.

    pairs: "train" (held-out subject x headwear pairs never occur), "held_out" (only they do) or "all".
    Raises ValueError for another name.
    """
    if pairs not in ("train", "held_out", "all"):
        raise ValueError(f"pairs is 'train', 'held_out' or 'all', not {pairs!r}")
    if pairs == "held_out":
        subject, headwear = rng.choice(sorted(HELD_OUT_PAIRS))
    else:
        while True:
            subject = rng.choice(SUBJECTS)
            headwear = "none" if rng.random() < 0.22 else rng.choice(HEADWEAR[1:])
            if pairs == "all" or (subject, headwear) not in HELD_OUT_PAIRS:
                break
    color = rng.choice(SUBJECT_COLORS[subject])
    hair = _pick(rng, HAIR_COLORS, (color,)) if subject in ("man", "woman") else "none"
    body = (color,) if hair == "none" else (color, hair)
    background = _pick(rng, BACKGROUNDS, body)
    headwear_color = "none" if headwear == "none" else _pick(rng, WEAR_COLORS, (*body, background))
    clothes_color = _pick(rng, WEAR_COLORS, (color, background))
    neckwear = "none" if rng.random() < 0.4 else rng.choice(NECKWEAR[1:])
    neckwear_color = "none" if neckwear == "none" else _pick(rng, WEAR_COLORS, (clothes_color, color, background))
    badge = "sheriff star" if rng.random() < (0.45 if headwear == "cowboy hat" else 0.06) else "none"
    return Scene(
        subject=subject,
        color=color,
        hair=hair,
        headwear=headwear,
        headwear_color=headwear_color,
        eyewear="none" if rng.random() < 0.5 else rng.choice(EYEWEAR[1:]),
        neckwear=neckwear,
        neckwear_color=neckwear_color,
        badge=badge,
        clothes_color=clothes_color,
        background=background,
        expression=rng.choice(EXPRESSIONS),
        dx=rng.uniform(-0.05, 0.05),
        dy=rng.uniform(-0.03, 0.03),
        tilt=rng.uniform(-7, 7),
        zoom=rng.uniform(0.92, 1.08),
        seed=rng.randrange(2**31),
    )

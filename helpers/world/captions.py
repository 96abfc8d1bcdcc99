"""Scenes put into words: a small grammar with several phrasings, and one canonical phrasing for prompts.

A caption is assembled from six parts:

    lead      "a portrait of", "a pencil sketch of", "a drawing of" … or nothing
    subject   "a smiling gray robot", "a red-haired woman", "a bat hero as a sheriff"
    details   "with a red top hat, sunglasses and a blue tie, wearing a white shirt, holding a green cup"
    manner    ", smiling, looking left", ", seen from afar"
    backdrop  ", on a yellow background", " in front of a blue city"
    ending    ", vintage style" in the vintage style

In MiniSD's pretraining the neutral leads ("a portrait of", "a picture of", "a drawing of" and no lead at all) always
describe a shaded render. "a drawing of a man with a red scarf" is therefore a render for the base model; the same
words describe a doodle in the doodles dataset, and teaching MiniSD that new meaning is the fine-tuning's work.
"""

from __future__ import annotations

import random
import re

from helpers.world.scenes import STYLES, Scene, sample_scene

# Leads with their weights, in percent. The words "cartoon", "vintage" and "style" never occur in base styles.
LEADS = {
    "render": {"a portrait of": 25, "a drawing of": 25, "a picture of": 20, "": 20, "a 3d render of": 10},
    "flat": {"a flat icon of": 100},
    "sketch": {"a pencil sketch of": 100},
    "doodles": {"a drawing of": 80, "a cartoon drawing of": 20},
    "vintage": {"": 35, "a portrait of": 25, "a picture of": 20, "a drawing of": 20},
    "pixel": {"pixel art of": 100},
    "blueprint": {"a blueprint of": 100},
    "stained_glass": {"a stained glass window of": 100},
    "chalkboard": {"a chalk drawing of": 100},
}
ENDINGS = {"vintage": ", vintage style"}
COLORLESS_STYLES = ("sketch", "blueprint", "chalkboard")  # one ink: their captions name no colour

# How often a random caption mentions what is there. Skin is never mentioned.
MENTION = {
    "headwear": 0.95,
    "neckwear": 0.90,
    "eyewear": 0.90,
    "badge": 0.90,
    "background": 0.85,
    "subject color": 0.85,
    "hair": 0.80,
    "clothes": 0.55,
    "expression": 0.6,
    "prop": 0.90,
    "turn": 0.5,
    "framing": 0.5,
}
_ON = {"on": 50, "with": 25, "against": 25}
_BEFORE = {"in front of": 60, "with": 40}
# What a backdrop is called after its colour, and the prepositions it goes with.
_BACKDROPS = {
    "plain": ("a {} background", _ON),
    "gradient": ("a {} gradient", _ON),
    "stripes": ("{} stripes", _ON),
    "dots": ("{} dots", _ON),
    "hills": ("{} hills", _BEFORE),
    "city": ("a {} city", _BEFORE),
    "night sky": ("a {} night sky", {"under": 60, "with": 40}),
    "room": ("a {} room", {"in": 100}),
}
EXPRESSION_WORDS = {"smile": "smiling", "frown": "frowning", "surprise": "surprised"}  # a neutral face has no word
LONGEST = 45  # words and commas: MiniSD reads 48 tokens, with a first and a last
_PIECES = re.compile(r"\w+|[^\w\s]")
_FRAMING_WORDS = {"close": "close up", "far": "seen from afar"}


def _check_style(style: str) -> None:
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}; known: {', '.join(STYLES)}")


def _weighted(rng: random.Random, weights: dict[str, int]) -> str:
    return rng.choices(list(weights), weights=list(weights.values()))[0]


def _a(words: str) -> str:
    """The words with their indefinite article: "an orange cat", "a red scarf"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _and(items: list[str]) -> str:
    """A list as English writes it: "a red hat, sunglasses and a blue tie"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _join(*words: str) -> str:
    return " ".join(w for w in words if w)


def _thing(color: str, name: str, colors: bool) -> str:
    return _a(_join(color if colors else "", name))


def _noun(scene: Scene) -> str:
    return "bat hero" if scene.subject == "hero" else scene.subject


def _has_color_word(scene: Scene) -> bool:
    """People are described by their hair, and every skeleton is white; all other subjects by their colour."""
    return scene.subject not in ("man", "woman", "skeleton")


def _wear(scene: Scene, said: set[str], colors: bool, hat: str) -> list[str]:
    """The worn things that are mentioned, from head to chest; `hat` is the word for the headwear."""
    items = []
    if "headwear" in said and scene.headwear != "none":
        items.append(_thing(scene.headwear_color, hat, colors))
    if "eyewear" in said and scene.eyewear != "none":
        items.append(scene.eyewear)
    if "neckwear" in said and scene.neckwear != "none":
        items.append(_thing(scene.neckwear_color, scene.neckwear, colors))
    if "badge" in said and scene.badge != "none":
        items.append(_a(scene.badge))
    return items


def _names_backdrop(scene: Scene, colors: bool) -> bool:
    """One ink has no plain background to speak of."""
    return colors or scene.backdrop not in ("plain", "gradient")


def _backdrop(scene: Scene, preposition: str, colors: bool) -> str:
    """ "on a pink background", "in front of blue hills"; without the colour where there is one ink."""
    form = _BACKDROPS[scene.backdrop][0]
    thing = _join(scene.background if colors else "", form.removeprefix("a {} ").removeprefix("{} "))
    return f"{preposition} {_a(thing) if form.startswith('a ') else thing}"


def _manner(scene: Scene, said: set[str], mood: str) -> list[str]:
    """How the subject looks at us and from where, as far as it is mentioned."""
    turn = f"looking {scene.turn}" if "turn" in said and scene.turn != "none" else ""
    framing = _FRAMING_WORDS.get(scene.framing, "") if "framing" in said else ""
    return [words for words in (mood, turn, framing) if words]


def _details(rng: random.Random, items: list[str], hair: str, shirt: str) -> str:
    """The worn things, hair and shirt in one of three layouts and in a random order; words that are "" are left out."""
    rng.shuffle(items)
    layout = _weighted(rng, {"with": 50, "wearing": 30, "in": 20})
    if layout == "wearing":  # "a man with red hair wearing a white shirt, sunglasses and a blue tie"
        items = items + [shirt] if shirt else items
        rng.shuffle(items)
        return _join(f"with {hair}" if hair else "", f"wearing {_and(items)}" if items else "")
    if hair:
        items.insert(rng.choice((0, len(items))), hair)
    things = f"with {_and(items)}" if items else ""
    if layout == "in":  # "a man in a white shirt with red hair, sunglasses and a blue tie"
        return _join(f"in {shirt}" if shirt else "", things)
    if shirt and things:  # "a man with red hair, sunglasses and a blue tie, wearing a white shirt"
        return f"{things}, wearing {shirt}"
    return things or (f"wearing {shirt}" if shirt else "")


def _in_manner(text: str, manner: list[str]) -> str:
    return text + "".join(f", {words}" for words in manner)


def caption(scene: Scene, style: str, rng: random.Random) -> str:
    """A random description of the scene in this style, as a captioned dataset would have it.

    Lower case, at most LONGEST words and commas; attributes are left out at random (see MENTION).
    Raises ValueError for an unknown style.
    """
    _check_style(style)
    colors = style not in COLORLESS_STYLES
    said = {name for name, p in MENTION.items() if rng.random() < p}

    # A cowboy hat and a star together: half of the time they are "a sheriff", with or without a word for the hat.
    sheriff, hat = "", scene.headwear
    if scene.headwear == "cowboy hat" and scene.badge != "none" and rng.random() < 0.5:
        sheriff, hat = "as a sheriff", "hat"
        said.discard("badge")
        if rng.random() < 0.5:
            said.discard("headwear")

    subject = _noun(scene)
    if colors and _has_color_word(scene) and "subject color" in said:
        subject = _join(scene.color, subject)
    hair = f"{scene.hair} hair" if colors and scene.hair != "none" and "hair" in said else ""
    if hair and rng.random() < 0.25:
        subject, hair = f"{scene.hair}-haired {subject}", ""

    mood = EXPRESSION_WORDS.get(scene.expression, "") if "expression" in said else ""
    if mood and rng.random() < 0.5:
        subject, mood = f"{mood} {subject}", ""

    shirt = _thing(scene.clothes_color, "shirt", True) if colors and "clothes" in said else ""
    details = _details(rng, _wear(scene, said, colors, hat), hair, shirt)
    text = _join(_weighted(rng, LEADS[style]), _a(subject), sheriff, details)
    if "prop" in said and scene.prop != "none":
        text += f"{',' if details else ''} holding {_thing(scene.prop_color, scene.prop, colors)}"
        details = "held"
    manner = _manner(scene, said, mood)
    rng.shuffle(manner)
    ending = ENDINGS.get(style, "")
    if "background" in said and _names_backdrop(scene, colors):
        preposition = _weighted(rng, _BACKDROPS[scene.backdrop][1])
        comma = "," if manner or (preposition == "with" and details) or rng.random() < 0.5 else ""
        ending = f"{comma} {_backdrop(scene, preposition, colors)}{ending}"
    while manner and len(_PIECES.findall(_in_manner(text, manner) + ending)) > LONGEST:
        manner.pop()
    return _in_manner(text, manner) + ending


def prompt(scene: Scene, style: str | None = None) -> str:
    """The canonical description: every attribute that is scored, always in the same order and the same words.

    style: None or "render" gives "a portrait of …" (no style words, MiniSD draws a shaded render); another style its
    own words: "a drawing of …" for doodles, "a portrait of …, vintage style" for vintage. Styles of one ink name no
    colours. Skin and pose are not scored and not named. Raises ValueError for an unknown style.
    """
    _check_style(style or "render")
    lead = "a portrait of" if style in (None, "render", "vintage") else next(iter(LEADS[style]))
    colors = style not in COLORLESS_STYLES
    subject = _noun(scene)
    if colors and _has_color_word(scene):
        subject = _join(scene.color, subject)
    subject = _join(EXPRESSION_WORDS.get(scene.expression, ""), subject)
    items = _wear(scene, set(MENTION), colors, scene.headwear)
    if colors and scene.hair != "none":
        items.insert(0, f"{scene.hair} hair")
    text = f"{lead} {_a(subject)}"
    if items:
        text += f" with {_and(items)}"
    if colors:
        text += f", wearing {_a(scene.clothes_color)} shirt"
    if scene.prop != "none":
        text += f", holding {_thing(scene.prop_color, scene.prop, colors)}"
    if _names_backdrop(scene, colors):
        text += f", {_backdrop(scene, next(iter(_BACKDROPS[scene.backdrop][1])), colors)}"
    return text + ENDINGS.get(style or "", "")


def vocabulary_corpus(n: int, seed: int = 0) -> list[str]:
    """n captions of random scenes, all styles in turn: the text from which the tokenizer learns its merges."""
    rng = random.Random(f"vocabulary:{seed}")
    return [caption(sample_scene(rng, "all"), STYLES[i % len(STYLES)], rng) for i in range(n)]

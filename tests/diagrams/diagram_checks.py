"""What is wrong with a diagram: measured in its SVG, with the widest letters that it asks for (DejaVu Sans)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
from PIL import ImageFont

SVG = "{http://www.w3.org/2000/svg}"
CONTRAST = 4.5  # of text and of lines on their ground (WCAG 2.1, level AA)
Box = tuple[float, float, float, float]  # left, top, right, bottom
Segment = tuple[float, float, float, float]


@cache
def font(style: str) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"DejaVuSans{style}.ttf"), 100)


def width(text: str, size: float, bold: bool, italic: bool) -> float:
    style = ("-Bold" if bold else "-") + ("Oblique" if italic else "") if bold or italic else ""
    return font(style).getlength(text) * size / 100


@dataclass
class Text:
    """A line of text: what it says, where it is, its ground, and its colours by their classes."""

    words: str
    box: Box
    smallest: float
    inks: set[str]
    ground: str = "fill-ground"


@dataclass
class Shapes:
    """A diagram's shapes, in the order in which they are painted."""

    size: tuple[float, float]
    texts: list[Text] = field(default_factory=list)
    rectangles: list[tuple[Box, str]] = field(default_factory=list)  # with the class of the fill
    segments: list[Segment] = field(default_factory=list)
    covered: list[str] = field(default_factory=list)  # texts that something is painted over
    lines: set[str] = field(default_factory=set)  # classes of strokes


def read(svg: str) -> Shapes:
    """The shapes of a diagram."""
    root = ElementTree.fromstring(svg)
    shapes = Shapes((float(root.get("width")), float(root.get("height"))))
    for node in root:
        kind = node.tag.removeprefix(SVG)
        look = classes(node)
        shapes.lines |= {name for name in look if name.startswith("stroke-")}
        if kind == "text":
            shapes.texts.append(read_text(node, shapes))
        elif kind == "rect":
            x, y, w, h = (float(node.get(name)) for name in ("x", "y", "width", "height"))
            place = (x, y, x + w, y + h)
            shapes.covered += [text.words for text in shapes.texts if meet(text.box, place)]
            shapes.rectangles.append((place, next(name for name in look if name.startswith("fill-"))))
        elif kind == "path":
            shapes.segments += segments(node.get("d"))
    return shapes


def classes(node) -> set[str]:
    return set((node.get("class") or "").split()) - {"course-diagram"}


def read_text(node, shapes: Shapes) -> Text:
    size, bold = float(node.get("font-size")), node.get("font-weight") == "600"
    pieces = [(node.text or "", size, False)]
    drop, lowest, smallest, inks = 0.0, 0.0, size, classes(node)
    for span in node:
        drop += float(span.get("dy") or 0)
        lowest, smallest = max(lowest, drop), min(smallest, float(span.get("font-size") or size))
        pieces.append((span.text or "", float(span.get("font-size") or size), span.get("font-style") == "italic"))
        pieces.append((span.tail or "", size, False))
        inks |= classes(span)
    total = sum(width(text, each, bold, italic) for text, each, italic in pieces)
    x, y = float(node.get("x")), float(node.get("y"))
    left = x - {"start": 0.0, "middle": 0.5, "end": 1.0}[node.get("text-anchor")] * total
    text = Text(
        "".join(node.itertext()), (left, y - 0.76 * size, left + total, y + 0.2 * size + lowest), smallest, inks
    )
    for place, fill in shapes.rectangles:
        if inside(text.box, place):
            text.ground = fill
    return text


def segments(d: str) -> list[Segment]:
    """The straight pieces of a path of M, L, Q and A; curves by their ends and the corner or the arc between."""
    points: list[tuple[float, float]] = []
    for command, numbers in re.findall(r"([MLQA])([^MLQA]+)", d):
        values = [float(number) for number in numbers.split()]
        if command == "A":
            points += arc_points(points[-1], values)
        points += [(values[i], values[i + 1]) for i in range(0, len(values), 2)] if command != "A" else []
    return [(*start, *end) for start, end in zip(points, points[1:], strict=False)]


def arc_points(start: tuple[float, float], values: list[float]) -> Iterator[tuple[float, float]]:
    """Points along a half circle or less, whose centre is found from its ends."""
    radius, end, clockwise = values[0], (values[5], values[6]), values[4] == 1
    middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    dx, dy = end[0] - start[0], end[1] - start[1]
    half = math.hypot(dx, dy) / 2
    away = math.sqrt(max(radius**2 - half**2, 0)) / (2 * half) * (1 if clockwise != (values[3] == 1) else -1)
    centre = middle[0] - dy * away, middle[1] + dx * away
    first = math.atan2(start[1] - centre[1], start[0] - centre[0])
    turn = (math.atan2(end[1] - centre[1], end[0] - centre[0]) - first) % (2 * math.pi)
    turn -= 0 if clockwise else 2 * math.pi
    steps = [first + turn * step / 24 for step in range(1, 25)]
    yield from ((centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)) for angle in steps)


def meet(one: Box, other: Box, margin: float = 0.0) -> bool:
    return (
        one[0] < other[2] + margin
        and other[0] < one[2] + margin
        and one[1] < other[3] + margin
        and other[1] < one[3] + margin
    )


def inside(one: Box, other: Box, margin: float = 0.0) -> bool:
    return (
        one[0] >= other[0] + margin
        and one[1] >= other[1] + margin
        and one[2] <= other[2] - margin
        and one[3] <= other[3] - margin
    )


def crosses(segment: Segment, box: Box) -> bool:
    """Whether a straight line enters a box (Liang and Barsky's clipping)."""
    x, y, dx, dy = segment[0], segment[1], segment[2] - segment[0], segment[3] - segment[1]
    near, far = 0.0, 1.0
    for move, room in ((-dx, x - box[0]), (dx, box[2] - x), (-dy, y - box[1]), (dy, box[3] - y)):
        if move == 0:
            if room < 0:
                return False
        elif move < 0:
            near = max(near, room / move)
        else:
            far = min(far, room / move)
    return near < far


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def themes(svg: str) -> dict[str, dict[str, str]]:
    """{"light" or "dark": {class: colour}}, from the attributes and from the style."""
    light = {}
    for node in ElementTree.fromstring(svg).iter():
        for name in classes(node):
            light[name] = node.get(name.partition("-")[0])
    rules = re.findall(r"\.course-diagram \.([\w-]+)\{(\w+):(#\w{6})\}", svg)
    dark = {name: colour for name, kind, colour in rules if name.startswith(kind)}
    return {"light": light, "dark": dark}


def faults(svg: str) -> list[str]:
    """Everything that would keep a reader from reading a diagram, one phrase each."""
    shapes = read(svg)
    picture = (0.0, 0.0, *shapes.size)
    found = [f"{words!r} is painted over" for words in shapes.covered]
    for number, text in enumerate(shapes.texts):
        if text.smallest < 12:
            found.append(f"{text.words!r} has letters of {text.smallest:g} px")
        if not inside(text.box, picture, 6):
            found.append(f"{text.words!r} leaves the picture")
        found += [
            f"{text.words!r} overlaps {other.words!r}"
            for other in shapes.texts[number + 1 :]
            if meet(text.box, other.box, 1)
        ]
        for place, fill in shapes.rectangles:
            if meet(text.box, place) and not inside(text.box, place, 1):
                found.append(f"{text.words!r} crosses the edge of a box ({fill})")
        if any(crosses(segment, text.box) for segment in shapes.segments):
            found.append(f"a line crosses {text.words!r}")
    for theme, colours in themes(svg).items():
        for text in shapes.texts:
            for ink in sorted(text.inks):
                if contrast(colours[ink], colours[text.ground]) < CONTRAST:
                    found.append(f"{text.words!r} in {ink} is faint on {text.ground} ({theme})")
        for line in sorted(shapes.lines - {"stroke-edge"}):
            if contrast(colours[line], colours["fill-ground"]) < CONTRAST:
                found.append(f"lines in {line} are faint ({theme})")
    return found

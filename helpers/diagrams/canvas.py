"""A tiny canvas: boxes, labels, arrows and groups, written as SVG. Lengths are pixels at a width of 700.

Text takes a little markup: *italic*, ~subscript~ and {unet:W}, italic in a part's colour. Whoever draws gives the
positions; nothing is laid out here.

A diagram stands on a ground of its own, so that it can be read on pages of any colour. Where the reader's system is
dark (or the page says so of its pictures: `color-scheme: dark`), its colours are the dark ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from helpers.diagrams.colours import COLOURS

Point = tuple[float, float]

FONTS = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
WIDTH = 700
SMALLEST = 12  # of all text
_LINE = 1.3  # height of a line, times the size of its letters
_HEAD = 9  # length of an arrow's head
_BEND = 8  # radius of an arrow's corners


@dataclass(frozen=True)
class Picture:
    """A finished diagram. Jupyter shows it; `alt` says in words what it shows."""

    svg: str
    alt: str

    def _repr_svg_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        return self.alt

    def save(self, path: Path | str) -> Path:
        """Write the diagram as an SVG file, and return where."""
        path = Path(path)
        path.write_text(self.svg + "\n", encoding="utf-8")
        return path


class Canvas:
    """Collects shapes in the order in which they are painted; `picture` finishes them."""

    def __init__(self, name: str, height: float, width: float = WIDTH):
        self.name, self.width, self.height = name, width, height
        self.shapes: list[str] = []

    # ------------------------------------------------------------------------------------------------- shapes
    def rectangle(
        self, x: float, y: float, w: float, h: float, face: str, frame: str = "none", r: float = 7, dashed: bool = False
    ) -> None:
        """A rectangle. face, frame: names of colours; "none" leaves the frame out."""
        corner = f' rx="{_number(r)}"' if r else ""
        shape = f'<rect x="{_number(x)}" y="{_number(y)}" width="{_number(w)}" height="{_number(h)}"{corner} '
        self.shapes.append(f"{shape}{_look(face, frame, dashed=dashed)}/>")

    def box(
        self,
        x: float,
        y: float,
        w: float,
        h: float,
        text: str = "",
        part: str = "plain",
        note: str = "",
        size: float = 14,
        solid: bool = False,
    ) -> None:
        """A box in a part's colour with its name in bold, and a note below; both may have several lines."""
        self.rectangle(x, y, w, h, part if solid else f"{part}-pale", part)
        ink = "solid-ink" if solid else "ink"
        lines = [(line, size, True) for line in text.split("\n") if line]
        lines += [(line, SMALLEST, False) for line in note.split("\n") if line]
        top = y + (h - sum(each * _LINE for _, each, _ in lines)) / 2
        for line, each, bold in lines:
            self.text(x + w / 2, top + each * (_LINE + 0.72) / 2, line, each, bold=bold, ink=ink)
            top += each * _LINE

    def group(self, x: float, y: float, w: float, h: float, title: str = "", dashed: bool = True) -> None:
        """A frame around things that belong together, with its title inside at the top left."""
        self.rectangle(x, y, w, h, "group-pale", "edge" if not dashed else "wire", r=10, dashed=dashed)
        if title:
            self.text(x + 12, y + 19, title, 13, anchor="start", bold=True)

    def label(
        self, x: float, y: float, text: str, size: float = SMALLEST, anchor: str = "middle", ink: str = "ink", **look
    ) -> None:
        """Lines of text, the first with its baseline at y."""
        for number, line in enumerate(text.split("\n")):
            self.text(x, y + number * size * _LINE, line, size, anchor, ink, **look)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = SMALLEST,
        anchor: str = "middle",
        ink: str = "ink",
        bold: bool = False,
    ) -> None:
        """One line of text on the baseline y. Raises ValueError for letters too small to read."""
        if size < SMALLEST:
            raise ValueError(f"text of {size} px is too small: at least {SMALLEST}")
        weight = ' font-weight="600"' if bold else ""
        where = f'x="{_number(x)}" y="{_number(y)}" font-size="{_number(size)}" text-anchor="{anchor}"{weight}'
        self.shapes.append(f"<text {where} {_look(ink)}>{_marked_up(text, size)}</text>")

    def line(
        self, *points: Point, colour: str = "wire", width: float = 1.8, dashed: bool = False, bend: float = _BEND
    ) -> None:
        """A line through the points; bend: the radius of its corners."""
        self.shapes.append(f'<path d="{_path(points, bend)}" {_look(stroke=colour, width=width, dashed=dashed)}/>')

    def arrow(self, *points: Point, colour: str = "wire", width: float = 1.8, dashed: bool = False) -> None:
        """A line through the points that ends in an arrow's head at the last one."""
        (x0, y0), (x, y) = points[-2:]
        length = math.hypot(x - x0, y - y0)
        dx, dy = (x - x0) / length, (y - y0) / length
        neck = (x - dx * _HEAD * 0.8, y - dy * _HEAD * 0.8)
        self.line(*points[:-1], neck, colour=colour, width=width, dashed=dashed)
        half, base = _HEAD * 0.48, (x - dx * _HEAD, y - dy * _HEAD)
        self.polygon((x, y), (base[0] - dy * half, base[1] + dx * half), (base[0] + dy * half, base[1] - dx * half),
                     face=colour)  # fmt: skip

    def polygon(self, *points: Point, face: str) -> None:
        """A filled shape with these corners."""
        corners = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        self.shapes.append(f'<polygon points="{corners}" {_look(face)}/>')

    def dot(self, x: float, y: float, radius: float = 5, colour: str = "wire") -> None:
        """A filled circle."""
        self.shapes.append(f'<circle cx="{_number(x)}" cy="{_number(y)}" r="{_number(radius)}" {_look(colour)}/>')

    def plus(self, x: float, y: float, radius: float = 10) -> None:
        """A plus in a circle: what arrives is added."""
        place = f'cx="{_number(x)}" cy="{_number(y)}" r="{_number(radius)}"'
        self.shapes.append(f"<circle {place} {_look('ground', 'wire')}/>")
        arm = radius * 0.5
        self.line((x - arm, y), (x + arm, y))
        self.line((x, y - arm), (x, y + arm))

    def arc(self, x: float, y: float, radius: float, start: float, end: float, colour: str = "wire", **look) -> None:
        """Part of a circle around (x, y), from one angle to another: degrees, counted against the clock."""
        first, last = (_on_circle(x, y, radius, angle) for angle in (start, end))
        turn = f"{_number(radius)} {_number(radius)} 0 {int(abs(end - start) > 180)} {int(end < start)}"
        place = f"M{_number(first[0])} {_number(first[1])}A{turn} {_number(last[0])} {_number(last[1])}"
        self.shapes.append(f'<path d="{place}" {_look(stroke=colour, **look)}/>')

    # ------------------------------------------------------------------------------------------------ finishing
    def picture(self, title: str, alt: str) -> Picture:
        """The finished diagram on a ground of its own. title: a few words. alt: what it shows, in sentences."""
        ids = f"diagram-{self.name}-title", f"diagram-{self.name}-alt"
        size = f'width="{_number(self.width)}" height="{_number(self.height)}"'
        box = f'viewBox="0 0 {_number(self.width)} {_number(self.height)}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box} class="course-diagram" role="img"'
        head += f' aria-labelledby="{ids[0]} {ids[1]}" font-family="{FONTS}" style="max-width:100%;height:auto">'
        ground = Canvas(self.name, self.height, self.width)
        ground.rectangle(1, 1, self.width - 2, self.height - 2, "ground", "edge", r=12)
        shapes = [*ground.shapes, *self.shapes]
        names = f'<title id="{ids[0]}">{escape(title)}</title>', f'<desc id="{ids[1]}">{escape(alt)}</desc>'
        return Picture("\n".join([head, *names, _dark_style(shapes), *shapes, "</svg>"]), alt)


def _number(value: float) -> str:
    """At most two decimals, the same on every machine."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _look(fill: str = "none", stroke: str = "none", width: float = 1.8, dashed: bool = False) -> str:
    """Attributes of a shape in named colours: their light values, and classes by which the dark ones are set."""
    used = [(kind, name) for kind, name in (("fill", fill), ("stroke", stroke)) if name != "none"]
    classes = " ".join(f"{kind}-{name}" for kind, name in used)
    paints = {"fill": "none"} | {kind: COLOURS[name].light for kind, name in used}
    if stroke != "none":
        paints |= {"stroke-width": _number(width), "stroke-linecap": "round"}
        paints |= {"stroke-dasharray": "6 4"} if dashed else {}
    return " ".join([f'class="{classes}"', *(f'{name}="{value}"' for name, value in paints.items())])


def _on_circle(x: float, y: float, radius: float, degrees: float) -> Point:
    angle = math.radians(degrees)
    return x + radius * math.cos(angle), y - radius * math.sin(angle)


def _path(points: Sequence[Point], bend: float) -> str:
    """Straight pieces from point to point; a corner between two of them is rounded."""
    parts = [f"M{_number(points[0][0])} {_number(points[0][1])}"]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        near, far = (_towards(corner, other, bend) for other in (before, after))
        parts.append(f"L{_number(near[0])} {_number(near[1])}")
        parts.append(f"Q{_number(corner[0])} {_number(corner[1])} {_number(far[0])} {_number(far[1])}")
    return "".join([*parts, f"L{_number(points[-1][0])} {_number(points[-1][1])}"])


def _towards(corner: Point, other: Point, bend: float) -> Point:
    length = math.hypot(other[0] - corner[0], other[1] - corner[1])
    share = min(bend, length / 2) / length
    return corner[0] + share * (other[0] - corner[0]), corner[1] + share * (other[1] - corner[1])


def _marked_up(text: str, size: float) -> str:
    """The markup as tspans. After a subscript the text rises again."""
    made, lowered = [], 0.0
    for piece in re.findall(r"\*[^*]+\*|~[^~]+~|\{\w+:[^}]+\}|[^*~{]+", text):
        mark, words = piece[0], escape(re.sub(r"^\{\w+:", "", piece).strip("*~}"))
        wanted = 0.22 * size if mark == "~" else 0.0
        look = [f'dy="{_number(wanted - lowered)}"'] if wanted != lowered else []
        look += [f'font-size="{_number(max(SMALLEST, 0.78 * size))}"'] if mark == "~" else []
        look += ['font-style="italic"'] if mark in "*{" else []
        look += [_look(piece[1:].partition(":")[0])] if mark == "{" else []
        made.append(f"<tspan {' '.join(look)}>{words}</tspan>" if look else words)
        lowered = wanted
    return "".join(made)


def _dark_style(shapes: Sequence[str]) -> str:
    """What changes where the reader's system is dark: the colours of the classes that the shapes have."""
    used = {name for shape in shapes for names in re.findall(r'class="([^"]+)"', shape) for name in names.split()}
    rules = [f".course-diagram .{name}{{{_dark(name)}}}" for name in sorted(used)]
    return f"<style>@media (prefers-color-scheme: dark){{{''.join(rules)}}}</style>"


def _dark(name: str) -> str:
    kind, _, colour = name.partition("-")
    return f"{kind}:{COLOURS[colour].dark}"

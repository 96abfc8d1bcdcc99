"""Shapes and the paths they are made of: ellipses, boxes, stars, mirror images, and a hand's tremor.

Shapes carry the name of their colour and never a paint: a style decides how it paints them. The canvas is 128 x 128
units, x to the right and y down.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from itertools import pairwise

from helpers.world.scenes import clash

CANVAS = 128
_PAIR = re.compile(r"(-?[\d.]+),(-?[\d.]+)")
_COMMAND = re.compile(r"([MLCQ])([^MLCQZ]*)")


@dataclass(frozen=True)
class Shape:
    """A filled region, or an open line when `width` is not 0."""

    role: str  # body, neck, head, ears, eyes, muzzle, nose, mouth, hat crown, hat brim, lens, scarf, backdrop, …
    path: str  # an SVG path of absolute M, L, C, Q and Z, points written "x,y"
    color: str  # a colour name of helpers.world.scenes, or "ink", "rose", "cream", "glow"
    tone: float = 0.0  # -1 … 1: the same colour darker or lighter
    width: float = 0.0  # of a line, in units
    head: bool = True  # turns and tilts with the head
    opacity: float = 1.0


def points(path: str) -> list[tuple[float, float]]:
    """The path's points, control points included."""
    return [(float(x), float(y)) for x, y in _PAIR.findall(path)]


def along(path: str, steps: int = 8) -> list[tuple[float, float]]:
    """Points on the path itself, `steps` on each line or curve: of a curve's control points only the ends lie on it."""
    found: list[tuple[float, float]] = []
    for command, rest in _COMMAND.findall(path):
        given, size = points(rest), {"M": 1, "L": 1, "C": 3, "Q": 2}[command]
        for i in range(0, len(given), size):
            if command == "M":
                found.append(given[i])
                continue
            corners = [found[-1], *given[i : i + size]]
            for k in range(1, steps + 1):
                row = corners
                while len(row) > 1:  # de Casteljau: (1 - t) a + t b of each two neighbours, until one point is left
                    row = [(a + (c - a) * k / steps, b + (d - b) * k / steps) for (a, b), (c, d) in pairwise(row)]
                found += row
    return found


def map_points(path: str, move) -> str:
    """The path with every point (x, y) replaced by move(x, y)."""

    def moved(match):
        x, y = move(float(match[1]), float(match[2]))
        return f"{x:.1f},{y:.1f}"

    return _PAIR.sub(moved, path)


def mirror(path: str) -> str:
    """The path reflected in the vertical axis of the canvas."""
    return map_points(path, lambda x, y: (CANVAS - x, y))


def ellipse(x: float, y: float, rx: float, ry: float | None = None, turn: float = 0.0) -> str:
    """An ellipse of four cubic curves, turned by `turn` degrees."""
    ry = rx if ry is None else ry
    a, b = 0.5523 * rx, 0.5523 * ry  # 4/3 (sqrt 2 - 1): the cubic closest to a quarter of a circle
    path = (
        f"M{x - rx},{y} C{x - rx},{y - b} {x - a},{y - ry} {x},{y - ry} "
        f"C{x + a},{y - ry} {x + rx},{y - b} {x + rx},{y} "
        f"C{x + rx},{y + b} {x + a},{y + ry} {x},{y + ry} C{x - a},{y + ry} {x - rx},{y + b} {x - rx},{y} Z"
    )
    if not turn:
        return path
    c, s = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    return map_points(path, lambda u, v: (x + c * (u - x) - s * (v - y), y + s * (u - x) + c * (v - y)))


def box(x0: float, y0: float, x1: float, y1: float, r: float = 3.0) -> str:
    """A rectangle with corners rounded by r."""
    return (
        f"M{x0 + r},{y0} L{x1 - r},{y0} Q{x1},{y0} {x1},{y0 + r} L{x1},{y1 - r} Q{x1},{y1} {x1 - r},{y1} "
        f"L{x0 + r},{y1} Q{x0},{y1} {x0},{y1 - r} L{x0},{y0 + r} Q{x0},{y0} {x0 + r},{y0} Z"
    )


def star(x: float, y: float, r: float) -> str:
    """A five-pointed star, one point up."""
    corners = []
    for k in range(10):
        radius, angle = (r if k % 2 == 0 else 0.46 * r), math.pi * (k / 5 - 0.5)
        corners.append(f"{x + radius * math.cos(angle):.2f},{y + radius * math.sin(angle):.2f}")
    return "M" + " L".join(corners) + " Z"


def both(role: str, path: str, color: str, **rest) -> list[Shape]:
    """The shape and its mirror image."""
    return [Shape(role, path, color, **rest), Shape(role, mirror(path), color, **rest)]


def contrast(color: str, *choices: str) -> str:
    """The first of the choices that does not clash with the colour."""
    return next((c for c in choices if not clash(c, color)), choices[-1])


def wobble(seed: int, amplitude: float):
    """A hand's tremor: a smooth random field that moves (x, y) by about `amplitude` units, plus a little jitter."""
    rng = random.Random(seed)
    bounds = ((-0.16, 0.16), (-0.16, 0.16), (0, 6.28), (0, 6.28))  # wave vector, and a phase for each direction
    waves = [tuple(rng.uniform(*b) for b in bounds) for _ in range(4)]

    def move(x: float, y: float) -> tuple[float, float]:
        # displacement = amplitude/2 * sum over four plane waves of sin(k.x + phase), plus uniform jitter
        u = sum(math.sin(a * x + b * y + p) for a, b, p, _ in waves) + rng.uniform(-0.5, 0.5)
        v = sum(math.sin(a * x + b * y + q) for a, b, _, q in waves) + rng.uniform(-0.5, 0.5)
        return x + 0.5 * amplitude * u, y + 0.5 * amplitude * v

    return move

"""Drawings of nothing in particular: the autoencoder learns lines, patterns and colours from them, and no style.

Each is a ground and a few layers chosen at random: gradients, stripes, grids, dots, blobs, polygons with outlines,
scribbles, hatching, blocks. An autoencoder that saw only portraits in five styles would redraw a sixth in one of the
five; these pictures teach it to keep what it is given.
"""

from __future__ import annotations

import math
import random

from PIL import Image

from helpers.world.paint import document, fill, ground, line, rasterise
from helpers.world.paths import CANVAS


def _color(rng: random.Random) -> str:
    """A colour: half of the time any, else near black, near white or gray."""
    if rng.random() < 0.5:
        return f"#{rng.randrange(1 << 24):06x}"
    gray = rng.choice((rng.randrange(50), rng.randrange(205, 256), rng.randrange(256)))
    return "#" + "".join(f"{min(255, max(0, gray + rng.randrange(-12, 13))):02x}" for _ in range(3))


def _point(rng: random.Random) -> tuple[float, float]:
    return rng.uniform(-10, CANVAS + 10), rng.uniform(-10, CANVAS + 10)


def _blob(rng: random.Random) -> str:
    """A closed outline around a random centre, smooth or cornered."""
    x, y = _point(rng)
    n, size = rng.randrange(3, 11), rng.choice((3, 6, 12, 25, 50)) * rng.uniform(0.6, 1.4)
    angles = sorted(rng.uniform(0, math.tau) for _ in range(n))
    corners = []
    for a in angles:
        u, v = size * rng.uniform(0.5, 1) * math.cos(a), size * rng.uniform(0.5, 1) * math.sin(a)
        corners.append((x + u, y + v))
    points = [f"{u:.1f},{v:.1f}" for u, v in corners]
    if rng.random() < 0.5:
        return "M" + " L".join(points) + " Z"
    turns = " ".join(f"Q{points[i]} {points[(i + 1) % n]}" for i in range(1, n, 2))
    return f"M{points[0]} {turns} Z"


def _blobs(rng: random.Random) -> list[str]:
    parts = []
    outline, width = _color(rng), rng.choice((0, 0, 1, 1.5, 2.5, 4))
    for _ in range(rng.randrange(2, 14)):
        path = _blob(rng)
        parts.append(fill(path, _color(rng), rng.choice((1, 1, 1, 0.5))))
        if width:
            parts.append(line(path, outline, width))
    return parts


def _scribble(rng: random.Random) -> list[str]:
    """Pen strokes of one ink."""
    paint, width = _color(rng), rng.choice((0.8, 1.2, 2, 3, 5))
    strokes = []
    for _ in range(rng.randrange(3, 20)):
        x, y = _point(rng)
        reach = rng.choice((4, 10, 30))
        points = [f"{x + rng.uniform(-reach, reach):.1f},{y + rng.uniform(-reach, reach):.1f}" for _ in range(4)]
        curved = rng.random() < 0.6
        strokes.append(f"M{points[0]} C{points[1]} {points[2]} {points[3]}" if curved else "M" + " L".join(points))
    return [line(" ".join(strokes), paint, width, rng.choice((1, 1, 0.6)))]


def _pattern(rng: random.Random) -> list[str]:
    """Stripes, hatching, a grid, dots or checks, over everything or inside a blob."""
    step = rng.choice((3, 4, 6, 8, 12, 20)) * rng.uniform(0.8, 1.2)
    paint, thick = _color(rng), rng.uniform(0.15, 0.6) * step
    inside = rng.choice((
        f'<rect width="{step}" height="{thick}" fill="{paint}"/>',
        f'<path d="M0,0 H{step} M0,0 V{step}" stroke="{paint}" stroke-width="{thick}"/>',
        f'<circle cx="{step / 2}" cy="{step / 2}" r="{thick}" fill="{paint}"/>',
        f'<rect width="{step / 2}" height="{step / 2}" fill="{paint}"/><rect x="{step / 2}" y="{step / 2}" '
        f'width="{step / 2}" height="{step / 2}" fill="{paint}"/>',
    ))  # fmt: skip
    name, turn = f"p{rng.randrange(1 << 30)}", rng.choice((0, 0, 45, rng.uniform(-90, 90)))
    defs = (f'<defs><pattern id="{name}" width="{step}" height="{step}" patternUnits="userSpaceOnUse" '
            f'patternTransform="rotate({turn})">{inside}</pattern></defs>')  # fmt: skip
    where = f"M0,0 H{CANVAS} V{CANVAS} H0 Z" if rng.random() < 0.4 else _blob(rng)
    return [defs, fill(where, f"url(#{name})", rng.choice((1, 0.6, 0.3)))]


def _gradient(rng: random.Random) -> list[str]:
    name = f"g{rng.randrange(1 << 30)}"
    stops = "".join(f'<stop offset="{o}" stop-color="{_color(rng)}"/>' for o in (0, rng.uniform(0.2, 0.8), 1))
    kind = rng.choice(('linearGradient x1="0" y1="0" x2="{}" y2="1"', 'radialGradient cx="{}" cy=".4" r=".8"'))
    tag = kind.split()[0]
    defs = f'<defs><{kind.format(round(rng.random(), 2))} id="{name}">{stops}</{tag}></defs>'
    where = f"M0,0 H{CANVAS} V{CANVAS} H0 Z" if rng.random() < 0.4 else _blob(rng)
    return [defs, fill(where, f"url(#{name})")]


def _blocks(rng: random.Random) -> list[str]:
    """A patch of square cells on a grid, each of one of a few colours, with hard edges."""
    cell, paints = rng.choice((2, 4, 4, 5, 8)), [_color(rng) for _ in range(rng.randrange(2, 6))]
    x0, y0 = cell * rng.randrange(-4, CANVAS // cell), cell * rng.randrange(-4, CANVAS // cell)
    n = rng.choice((6, 10, 16, 32))
    cells = [
        f'<rect x="{x0 + cell * i}" y="{y0 + cell * j}" width="{cell}" height="{cell}" fill="{rng.choice(paints)}"/>'
        for i in range(n) for j in range(n) if rng.random() < 0.7
    ]  # fmt: skip
    return [f'<g shape-rendering="crispEdges">{"".join(cells)}</g>']


def random_drawing(rng: random.Random, size: int) -> Image.Image:
    """A drawing of random layers, RGB, size x size pixels."""
    parts = [ground(_color(rng))]
    for _ in range(rng.randrange(1, 5)):
        parts += rng.choice((_blobs, _blobs, _scribble, _scribble, _pattern, _gradient, _blocks))(rng)
    return rasterise(document("".join(parts)), size)

"""Four styles that no model of the course has seen in its pretraining: pixel art, blueprint, stained glass, chalk."""

from __future__ import annotations

import math
import random

from PIL import Image

from helpers.world.drawing import shapes_of
from helpers.world.paint import (
    HATCHED,
    PALETTE,
    SCENERY,
    Color,
    css,
    document,
    fill,
    ground,
    hatch,
    line,
    luminance,
    mix,
    outlined,
    rasterise,
    tint,
    toned,
)
from helpers.world.paths import CANVAS, map_points, wobble
from helpers.world.scenes import Scene

CELL = 4  # units; one block of pixel art
# The parts that make up the silhouette.
BLACK_EDGE = {
    "head",
    "body",
    "ears",
    "hair",
    "hat crown",
    "hat brim",
    "scarf",
    "cape",
    "neck",
    "pom-pom",
    "tip",
    "bolts",
    "antenna",
}


def pixel(scene: Scene) -> str:
    """A flat drawing with a dark rim, sampled at 32 x 32 points, in 20 colours; runs of equal cells are rectangles."""
    back = SCENERY[scene.background]
    shapes = shapes_of(scene)
    parts = [ground(css(back))]
    parts += [line(s.path, css(PALETTE["ink"]), 6) for s in shapes if s.role in BLACK_EDGE and not s.width]
    for s in shapes:
        paint = css(tint(s))
        if s.role == "star rim":
            parts.append(line(s.path, paint, 3))
        thick = max(4.2 if s.role == "antenna" else 3.4, s.width)  # else no sample point falls on it
        parts.append(line(s.path, paint, thick) if s.width else fill(s.path, paint, s.opacity))
    crisp = f'<g shape-rendering="crispEdges">{"".join(parts)}</g>'
    n = CANVAS // CELL
    small = rasterise(document(crisp), n).quantize(20, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    small = small.convert("RGB")
    # Pillow's hints leave open whether a pixel is a number or a tuple, and whether there are pixels at all
    sky = max(
        small.getcolors(),  # type: ignore[arg-type]
        key=lambda item: -sum(abs(u - v) for u, v in zip(item[1], back, strict=True)),  # type: ignore[call-overload]
    )[1]
    cells, rects = small.load(), []
    for y in range(n):
        row = []
        for x in range(n):
            # The sky is a chequered tile map
            checker = cells[x, y] == sky and (x // 2 + y // 2) % 2  # type: ignore[index]
            row.append(css(toned(sky, 0.22)) if checker else css(cells[x, y]))  # type: ignore[index, arg-type]
        start = 0
        for x in range(1, n + 1):
            if x == n or row[x] != row[start]:
                rects.append(
                    f'<rect x="{CELL * start}" y="{CELL * y}" width="{CELL * (x - start)}" height="{CELL}" '
                    f'fill="{row[start]}"/>'
                )
                start = x
    return f'<g shape-rendering="crispEdges">{"".join(rects)}</g>'


def blueprint(scene: Scene) -> str:
    """White lines on a blue grid, with a measure at the side."""
    blue, chalk = (24, 70, 150), "#eaf3ff"
    lines = "".join(f"M{t},0 L{t},128 M0,{t} L128,{t} " for t in range(8, 128, 8))
    parts = [ground(css(blue)), line(lines, "#4f83cc", 0.9)]
    for s in shapes_of(scene):
        if s.width:
            parts.append(line(s.path, chalk, min(s.width, 2.2)))
            continue
        # Tone becomes a wash: what is bright is a paler blue, and the grid shines through.
        solid = s.color == "ink"
        wash = "#0f2d6b" if solid else css(mix(blue, (150, 195, 245), 0.55 * luminance(tint(s))))
        parts.append(fill(s.path, wash, min(s.opacity, 0.95 if solid else 0.72)))
        if outlined(s, scene):
            parts.append(line(s.path, chalk, 1.9))
    parts.append(line("M7,14 L7,114 M3.5,18 L7,13 L10.5,18 M3.5,110 L7,115 L10.5,110", "#bcd6ff", 1.6))
    parts.append('<rect x="1.2" y="1.2" width="125.6" height="125.6" fill="none" stroke="#bcd6ff" stroke-width="2.4"/>')
    return "".join(parts)


def vivid(color: Color, gain: float = 1.45) -> Color:
    """The colour with its distance from gray multiplied by `gain`."""
    gray = 255 * luminance(color)
    return tuple(min(255.0, max(0.0, gray + gain * (c - gray))) for c in color)  # type: ignore[return-value]


def stained_glass(scene: Scene) -> str:
    """Vivid panes between leads, in an arched window."""
    lead, rng = "#15121a", random.Random(scene.seed)
    back = vivid(SCENERY[scene.background], 1.5)
    glow = (
        '<radialGradient id="glow" cx=".5" cy=".42" r=".62"><stop offset="0" stop-color="#fff" stop-opacity=".28"/>'
        '<stop offset=".6" stop-color="#fff" stop-opacity="0"/>'
        '<stop offset="1" stop-color="#000" stop-opacity=".3"/></radialGradient>'
    )
    parts = [f"<defs>{glow}</defs>", ground(css(back))]
    spokes = [
        (64 + 130 * math.cos(t), 60 + 130 * math.sin(t))
        for t in (math.tau * (k + rng.uniform(-0.25, 0.25)) / 12 for k in range(12))
    ]
    for radius, shift in ((1.0, 0.0), (0.4, 0.13)):  # two rings of panes around the head
        for k, (x, y) in enumerate(spokes):
            u, v = spokes[(k + 1) % 12]
            tone = rng.choice((-0.3, -0.12, 0.08, 0.3)) + shift
            corners = [(64 + radius * (p - 64), 60 + radius * (q - 60)) for p, q in ((x, y), (u, v))]
            path = f"M64,60 L{corners[0][0]:.1f},{corners[0][1]:.1f} L{corners[1][0]:.1f},{corners[1][1]:.1f} Z"
            parts += [fill(path, css(toned(back, tone))), line(path, lead, 2.6)]
    for s in shapes_of(scene):
        color = vivid(tint(s))
        if s.width:
            parts.append(line(s.path, lead if s.color != "white" else "#ffffff", max(2.2, 0.9 * s.width)))
            continue
        parts.append(fill(s.path, css(color), s.opacity))
        if s.role in ("body", "hair"):  # larger panes are cut in two tones
            parts.append(fill(map_points(s.path, lambda x, y: (64 + 0.5 * (x - 64), y)), css(toned(color, 0.22))))
        if outlined(s, scene):
            parts.append(line(s.path, lead, 3.6 if s.role in BLACK_EDGE else 2.4))
    parts.append(f'<rect width="{CANVAS}" height="{CANVAS}" fill="url(#glow)"/>')
    # What lies outside the pointed arch is stone.
    arch = "M0,0 L128,0 L128,128 L0,128 Z M6,128 L122,128 L122,62 C122,36 100,10 64,-6 C28,10 6,36 6,62 Z"
    parts.append(fill(arch, "#5b5763", extra='fill-rule="evenodd"') + line(arch[arch.index("M6") :], lead, 4))
    return "".join(parts)


def chalkboard(scene: Scene) -> str:
    """Chalk strokes on a dark green board."""
    board, chalk = (34, 66, 54), (240, 240, 228)
    rng = random.Random(scene.seed)
    parts = [f"<defs>{hatch('h', css(board), 5.5, 1.8, -38)}</defs>", ground(css(board))]
    for _ in range(4):  # where the sponge passed
        x, y, turn = rng.uniform(10, 118), rng.uniform(10, 118), rng.uniform(-30, 30)
        parts.append(
            f'<ellipse cx="{x:.1f}" cy="{y:.1f}" rx="44" ry="15" fill="#dfe8dc" opacity=".08" '
            f'transform="rotate({turn:.0f} {x:.1f} {y:.1f})"/>'
        )
    again = wobble(scene.seed + 7, 0.8)  # the second stroke of the chalk
    for s in shapes_of(scene, tremor=0.9):
        color = mix(tint(s), chalk, 0.25)
        if s.width:
            dust = css(chalk if luminance(color) < 0.45 or s.color == "white" else color)
            parts.append(line(s.path, dust, min(s.width, 2.4), 0.95))
            continue
        parts.append(fill(s.path, css(board), s.opacity))  # what lies behind is wiped away
        if s.color not in ("ink", "black"):
            solid = s.role in ("eyes", "star", "teeth", "jewel", "nose", "tip")
            parts.append(fill(s.path, css(color), s.opacity * (0.9 if solid else 0.75)))
            if s.role in HATCHED:
                parts.append(fill(s.path, "url(#h)", 0.5 * s.opacity))
        if s.role == "star rim" or not outlined(s, scene):
            continue
        parts.append(line(s.path, css(chalk), 1.9, 0.95, 'stroke-dasharray="9 1.1 5 0.7"'))
        parts.append(line(map_points(s.path, again), css(chalk), 1.1, 0.5))
    parts.append('<rect x="2.5" y="2.5" width="123" height="123" fill="none" stroke="#8a5a33" stroke-width="5"/>')
    return "".join(parts)

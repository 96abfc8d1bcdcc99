"""How each style paints the shapes of a scene: `to_svg(scene, style)` and `render(scene, style, size)`.

Every style is a function from a scene to the inside of an SVG of 128 x 128 units. No fonts, no filters and no clock:
the same scene and style always give the same pixels.
"""

from __future__ import annotations

import random

from PIL import Image

from helpers.world.drawing import backdrop, face_parts, figure, shapes_of
from helpers.world.extra_styles import blueprint, chalkboard, pixel, stained_glass
from helpers.world.paint import (
    HATCHED,
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
    ramp,
    rasterise,
    sky,
    tint,
    toned,
)
from helpers.world.paths import CANVAS, map_points, wobble
from helpers.world.scenes import STYLES, Scene

# --------------------------------------------------------------------------------------------------- base styles


def _flat(scene: Scene) -> str:
    parts = [sky(scene, SCENERY[scene.background])]
    for s in shapes_of(scene):
        paint = css(tint(s))
        parts.append(line(s.path, paint, s.width, s.opacity) if s.width else fill(s.path, paint, s.opacity))
    return "".join(parts)


GLOSSY = {"head", "hat crown", "body", "lens"}


def _render(scene: Scene) -> str:
    back = SCENERY[scene.background]
    depth = 0.5 if scene.backdrop == "gradient" else 0.16
    defs = [
        '<radialGradient id="gloss" cx=".34" cy=".2" r=".42"><stop offset="0" stop-color="#fff" stop-opacity=".55"/>'
        '<stop offset="1" stop-color="#fff" stop-opacity="0"/></radialGradient>',
    ]
    parts = [ramp("sky", (toned(back, depth), toned(back, -depth))), ground("url(#sky)")]
    known: dict[str, str] = {}
    for s in shapes_of(scene):
        color = tint(s)
        if s.width:
            parts.append(line(s.path, css(color), s.width, s.opacity))
            continue
        if s.opacity < 1 or s.role == "backdrop":
            parts.append(fill(s.path, css(color), s.opacity))
            continue
        if css(color) not in known:
            name = known[css(color)] = f"g{len(known)}"
            stops = zip((0, 0.45, 1), (toned(color, 0.3), color, toned(color, -0.48)), strict=True)
            shades = "".join(f'<stop offset="{o}" stop-color="{css(c)}"/>' for o, c in stops)
            defs.append(f'<radialGradient id="{name}" cx=".36" cy=".28" r=".85">{shades}</radialGradient>')
        if s.role in ("head", "hat brim"):  # a soft shadow on what lies below
            low = map_points(s.path, lambda x, y: (x + 1.5, y + 3.5))
            parts.append(fill(low, "#000", 0.22))
        parts.append(fill(s.path, f"url(#{known[css(color)]})"))
        if s.role in GLOSSY:
            parts.append(fill(s.path, "url(#gloss)"))
    return f"<defs>{''.join(defs)}</defs>" + "".join(parts)


def _sketch(scene: Scene) -> str:
    pencil, paper = "#333333", "#f4f4f2"
    parts = [f"<defs>{hatch('h', '#5c5c5c', 6, 1.7, -45)}</defs>", ground(paper)]
    for s in shapes_of(scene, tremor=0.9):
        light = luminance(tint(s))
        if s.role == "backdrop":  # a light wash
            wash = css((190 + 54 * light,) * 3)
            parts.append(line(s.path, wash, s.width) if s.width else fill(s.path, wash) + line(s.path, "#a8a8a8", 1.1))
            continue
        if s.width:
            gray: float = 245 if light > 0.8 else 50
            parts.append(line(s.path, css((gray,) * 3), s.width * 0.85, s.opacity))
            continue
        dark = s.color == "ink" or s.role in ("pupils", "lens") and light < 0.3
        gray = 44 if dark else 135 + 110 * light  # graphite never gets quite black, paper shines through
        parts.append(fill(s.path, css((gray,) * 3), s.opacity))
        if s.role in HATCHED and light < HATCHED[s.role]:
            parts.append(fill(s.path, "url(#h)", 0.85 if light < 0.45 and s.role != "head" else 0.5))
        if outlined(s, scene):
            parts.append(line(s.path, pencil, 1.9))
    return "".join(parts)


# --------------------------------------------------------------------------------------------------- held-out styles


PEN = "#2b1c38"
SMALL = {"eyes", "pupils", "jewel", "tip", "nose", "button", "star", "teeth", "mouth", "glint", "lens"}
SLIP = (1.7, 1.3)  # how far the colours lie beside the lines, as when a felt pen misses


def _pastel(color: Color, share: float = 0.4) -> str:
    return css(mix(color, (255, 255, 255), share))


def _doodles(scene: Scene) -> str:
    """Pastel felt pen under a dark line that a hand draws twice: once firmly, once in a hurry."""
    again = wobble(scene.seed + 7, 1.2)
    parts = [sky(scene, mix(SCENERY[scene.background], (255, 255, 255), 0.42))]
    for s in shapes_of(scene, tremor=1.8):
        if s.role == "backdrop":
            paint = _pastel(tint(s), 0.3)
            parts.append(line(s.path, paint, s.width) if s.width else fill(s.path, paint))
            continue
        paint = PEN if s.color == "ink" else _pastel(tint(s), 0.4 if s.color != "black" else 0.3)
        if s.width:
            bold = s.role in ("rim", "temple", "bridge", "mouth", "antenna", "lashes", "sleeve", "brows")
            paint = PEN if s.role not in ("glint", "grille", "sleeve") else ("#ffffff" if s.role != "sleeve" else paint)
            if s.role == "sleeve":
                parts.append(line(s.path, PEN, s.width + 4))
            parts.append(line(s.path, paint, max(3.0, s.width) if bold else 2.4, s.opacity))
            continue
        small = s.role in SMALL
        edged = outlined(s, scene) and s.color != "ink"
        if edged and not small:  # the paper shows where the colour misses
            parts.append(fill(s.path, "#fffdf8", s.opacity))
            parts.append(f'<g transform="translate({SLIP[0]} {SLIP[1]})">{fill(s.path, paint, 0.92)}</g>')
        else:
            parts.append(fill(s.path, paint, s.opacity))
        if edged:
            parts.append(line(s.path, PEN, 2.2 if small else 3.0))
            if not small:
                parts.append(line(map_points(s.path, again), PEN, 1.2, 0.8))
    return "".join(parts)


INK, PAPER = (58, 36, 24), (236, 219, 176)
SHRUNK, LEFT, TOP = 0.84, 10.2, 4.5  # the portrait within the panel
DOTTED = {"head", "body", "hat crown", "hair", "cape", "balloon"}
TITLES = ("AMAZING", "MYSTERY", "WESTERN", "COMICS", "WEIRD", "TALES")
# Each letter is one stroke or more on a grid of 2 x 4, y down.
_LETTERS = {
    "A": "M0,4 L1,0 L2,4 M0.5,2.6 L1.5,2.6", "C": "M2,0.2 L0.2,0.2 L0.2,3.8 L2,3.8",
    "D": "M0,0 L0,4 L1.2,4 L2,3 L2,1 L1.2,0 Z",
    "E": "M2,0 L0,0 L0,4 L2,4 M0,2 L1.5,2", "G": "M2,0 L0,0 L0,4 L2,4 L2,2.3 L1.2,2.3", "I": "M1,0 L1,4",
    "L": "M0,0 L0,4 L2,4", "M": "M0,4 L0,0 L1,2 L2,0 L2,4", "N": "M0,4 L0,0 L2,4 L2,0", "O": "M0,0 L2,0 L2,4 L0,4 Z",
    "R": "M0,4 L0,0 L2,0 L2,2 L0,2 L2,4", "S": "M2,0 L0,0 L0,2 L2,2 L2,4 L0,4", "T": "M0,0 L2,0 M1,0 L1,4",
    "W": "M0,0 L0.4,4 L1,1.6 L1.6,4 L2,0", "Y": "M0,0 L1,2 L2,0 M1,2 L1,4", "Z": "M0,0 L2,0 L0,4 L2,4",
}  # fmt: skip


def aged(color: Color, t: float = 0.5) -> Color:
    """The colour as an old print shows it: `t` of the way to a brown ramp from ink to paper."""
    return mix(color, mix(INK, PAPER, luminance(color) ** 0.9), t)


def _sunburst(base: Color) -> str:
    parts = [fill("M6,6 H122 V107 H6 Z", css(toned(base, -0.26)))]
    corners = [
        (64, -100),
        (150, -100),
        (230, -60),
        (260, 0),
        (260, 60),
        (260, 140),
        (220, 200),
        (140, 240),
        (64, 240),
        (-12, 240),
        (-92, 200),
        (-132, 140),
        (-132, 60),
        (-132, 0),
        (-102, -60),
        (-22, -100),
    ]
    for k in range(0, 16, 2):
        (a, b), (c, d) = corners[k], corners[(k + 1) % 16]
        parts.append(fill(f"M64,66 L{a},{b} L{c},{d} Z", css(toned(base, 0.12))))
    return "".join(parts)


def _title(seed: int) -> str:
    """A word in block capitals under the panel, as wide as the panel."""
    word = TITLES[seed % len(TITLES)]
    step = 108 / len(word)
    width, height = 0.62 * step, 11.5
    strokes = []
    for k, letter in enumerate(word):
        x = 10 + k * step + 0.19 * step
        strokes.append(map_points(_LETTERS[letter], lambda u, v, x=x: (x + u * width / 2, 111.2 + v * height / 4)))
    return line(" ".join(strokes), css(INK), 3.2)


def _wear(seed: int) -> str:
    """What the years did to the paper: a stain, flecks, a fold across."""
    rng = random.Random(seed)
    x, y = rng.choice((8.0, 120.0)), rng.choice((10.0, 118.0))
    parts = [f'<circle cx="{x:g}" cy="{y:g}" r="{rng.uniform(14, 22):.1f}" fill="#8a6236" opacity=".16"/>']
    for _ in range(16):
        x, y, r = rng.uniform(0, 128), rng.uniform(0, 128), rng.uniform(0.5, 1.2)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" fill="{css(PAPER)}" opacity=".5"/>')
    y = rng.uniform(20, 100)
    parts.append(line(f"M0,{y:.1f} L128,{y + rng.uniform(-4, 4):.1f}", css(PAPER), 0.9, 0.45))
    return "".join(parts)


def _print(s, scene: Scene, dots: str = "d") -> str:
    """One shape as a cheap press prints it: flat aged ink, halftone dots in the shadows, a brown line."""
    color = aged(tint(s)) if s.color != "ink" else INK
    if s.role == "backdrop":
        paint = css(aged(tint(s), 0.72))
        return line(s.path, paint, s.width) if s.width else fill(s.path, paint)
    if s.width:
        edge = line(s.path, css(INK), s.width + 3.6) if s.role == "sleeve" else ""
        return edge + line(s.path, css(color), s.width, s.opacity)
    parts = [fill(s.path, css(color), s.opacity)]
    if s.role in DOTTED:  # the light comes from the left: dots where the shape turns away
        parts.append(fill(s.path, f"url(#{dots})", 0.4 if s.role == "head" else 0.55))
    if outlined(s, scene):
        parts.append(line(s.path, css(INK), 2.2))
    return "".join(parts)


def _vintage(scene: Scene) -> str:
    ink = css(INK)
    # Halftone: rows of dots, staggered, that grow from nothing at the left to their full size at the right. The screen
    # belongs to the print and not to the portrait, so that the portrait's own scale is undone.
    grow = "".join(
        f'<circle cx="{4 * i + 2}" cy="{8 * j + 2 + 4 * (i % 2)}" r="{min(2.2, 0.16 * i - 0.9):.2f}" fill="{ink}"/>'
        for i in range(7, 32) for j in range(16)
    )  # fmt: skip
    defs = (
        '<defs><pattern id="d" width="128" height="128" patternUnits="userSpaceOnUse" '
        f'patternTransform="scale({1 / SHRUNK:.6f}) translate(-{LEFT} -{TOP})">{grow}</pattern>'
        '<clipPath id="panel"><rect x="6" y="6" width="116" height="101"/></clipPath></defs>'
    )
    base = aged(SCENERY[scene.background], 0.66)
    behind = _sunburst(base) if scene.backdrop == "plain" else f'<g transform="scale(1 .84)">{sky(scene, base)}</g>'
    scenery = "".join(_print(s, scene) for s in backdrop(scene))
    portrait = "".join(_print(s, scene) for s in figure(scene))
    return "".join([
        defs, ground(css(PAPER)), f'<g clip-path="url(#panel)">{behind}{scenery}',
        f'<g transform="translate({LEFT} {TOP}) scale({SHRUNK})">{portrait}</g></g>',
        f'<rect x="6" y="6" width="116" height="101" fill="none" stroke="{ink}" stroke-width="1.8"/>',
        _title(scene.seed), _wear(scene.seed),
    ])  # fmt: skip


_PAINTERS = {
    "render": _render, "flat": _flat, "sketch": _sketch, "doodles": _doodles, "vintage": _vintage,
    "pixel": pixel, "blueprint": blueprint, "stained_glass": stained_glass, "chalkboard": chalkboard,
}  # fmt: skip


def to_svg(scene: Scene, style: str) -> str:
    """The scene as a standalone SVG of 128 x 128 units.

    Raises ValueError for a style that is not in STYLES.
    """
    if style not in _PAINTERS:
        raise ValueError(f"unknown style {style!r}; known: {', '.join(STYLES)}")
    return document(_PAINTERS[style](scene))


def parts_in(scene: Scene, style: str) -> list[tuple[str, float, float]]:
    """`face_parts` where the style draws them: (name, x, y) with x and y in 0..1 of the picture's width and height."""
    scale, left, top = (SHRUNK, LEFT, TOP) if style == "vintage" else (1.0, 0.0, 0.0)
    return [(name, (left + scale * x) / CANVAS, (top + scale * y) / CANVAS) for name, x, y in face_parts(scene)]


def render(scene: Scene, style: str, size: int = 128) -> Image.Image:
    """The scene drawn in a style: an RGB picture of size x size pixels, the same at every call.

    Raises ValueError for an unknown style or a size below 1.
    """
    if size < 1:
        raise ValueError(f"size is a positive number of pixels, not {size!r}")
    return rasterise(to_svg(scene, style), size)

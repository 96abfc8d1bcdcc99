"""How each style paints the shapes of a scene: `to_svg(scene, style)` and `render(scene, style, size)`.

Every style is a function from a scene to the inside of an SVG of 128 x 128 units. No fonts, no filters and no clock:
the same scene and style always give the same pixels.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import replace

import resvg_py
from PIL import Image

from helpers.world.drawing import CANVAS, Shape, map_points, shapes_of
from helpers.world.scenes import STYLES, Scene

PALETTE = {
    "light": (246, 205, 172), "tan": (212, 152, 100), "brown": (134, 84, 50), "black": (48, 46, 54),
    "white": (246, 246, 244), "gray": (148, 153, 162), "red": (218, 48, 48), "orange": (244, 134, 40),
    "yellow": (250, 205, 50), "green": (66, 166, 84), "blue": (52, 108, 208), "purple": (138, 76, 180),
    "pink": (245, 160, 190), "blond": (240, 205, 105), "ink": (28, 26, 36), "rose": (240, 130, 150),
    "cream": (250, 232, 208), "glow": (190, 226, 70), "crimson": (176, 32, 52),
}
SCENERY = {  # backgrounds are paler than clothes of the same name
    "pink": (247, 170, 198), "blue": (112, 158, 226), "green": (124, 196, 134), "yellow": (250, 222, 112),
    "purple": (172, 132, 212), "orange": (248, 172, 98), "gray": (182, 187, 194),
}
Color = tuple[float, float, float]


def mix(a: Color, b: Color, t: float) -> Color:
    """(1 - t) a + t b."""
    return tuple((1 - t) * x + t * y for x, y in zip(a, b, strict=True))  # type: ignore[return-value]  # of three


def toned(color: Color, tone: float) -> Color:
    """The colour moved towards white (tone > 0) or black (tone < 0)."""
    return mix(color, (255, 255, 255) if tone > 0 else (0, 0, 0), abs(tone))


def luminance(color: Color) -> float:
    """Relative brightness, 0 … 1, with the Rec. 601 weights."""
    r, g, b = color
    return (0.299 * r + 0.587 * g + 0.114 * b) / 255


def css(color: Color) -> str:
    """A colour, three numbers in 0..255, as SVG writes it: "#e69f00"."""
    return "#" + "".join(f"{min(255, max(0, round(c))):02x}" for c in color)


def fill(path: str, paint: str, opacity: float = 1.0, extra: str = "") -> str:
    """An SVG path filled with a colour or gradient."""
    alpha = f' opacity="{opacity}"' if opacity < 1 else ""
    return f'<path d="{path}" fill="{paint}"{alpha} {extra}/>'


def line(path: str, paint: str, width: float, opacity: float = 1.0, extra: str = "") -> str:
    """An SVG path drawn as a round-ended line of that width, in pixels of the canvas."""
    alpha = f' opacity="{opacity}"' if opacity < 1 else ""
    return (f'<path d="{path}" fill="none" stroke="{paint}" stroke-width="{width:.1f}" stroke-linecap="round" '
            f'stroke-linejoin="round"{alpha} {extra}/>')


def ground(paint: str) -> str:
    """An SVG rectangle over the whole canvas."""
    return f'<rect width="{CANVAS}" height="{CANVAS}" fill="{paint}"/>'


def tint(shape: Shape) -> Color:
    """A shape's colour in 0..255, with its tone applied."""
    return toned(PALETTE[shape.color], shape.tone)


# Too small, or drawn over an edge that is already there: no outline of their own.
NO_OUTLINE = {"pupils", "glint", "cheeks", "teeth", "teeth rim", "inner ears", "star rim", "tongue", "face plate"}


def outlined(shape: Shape, scene: Scene) -> bool:
    """Whether an inked style draws a line around the shape; the rim of glasses already frames the eyes."""
    framed = shape.role == "eyes" and scene.eyewear == "glasses"
    return shape.opacity == 1 and shape.role not in NO_OUTLINE and not framed


# --------------------------------------------------------------------------------------------------- base styles


def _flat(scene: Scene) -> str:
    parts = [ground(css(SCENERY[scene.background]))]
    for s in shapes_of(scene):
        paint = css(tint(s))
        parts.append(line(s.path, paint, s.width, s.opacity) if s.width else fill(s.path, paint, s.opacity))
    return "".join(parts)


GLOSSY = {"head", "hat crown", "body", "lens"}


def _render(scene: Scene) -> str:
    back = SCENERY[scene.background]
    defs = [
        f'<linearGradient id="sky" x1="0" y1="0" x2="0" y2="1"><stop offset="0" stop-color="{css(toned(back, 0.32))}"/>'
        f'<stop offset="1" stop-color="{css(toned(back, -0.34))}"/></linearGradient>',
        '<radialGradient id="gloss" cx=".34" cy=".2" r=".42"><stop offset="0" stop-color="#fff" stop-opacity=".55"/>'
        '<stop offset="1" stop-color="#fff" stop-opacity="0"/></radialGradient>',
    ]
    parts, known = [ground("url(#sky)")], {}  # type: list[str], dict[str, str]
    for s in shapes_of(scene):
        color = tint(s)
        if s.width:
            parts.append(line(s.path, css(color), s.width, s.opacity))
            continue
        if s.opacity < 1:
            parts.append(fill(s.path, css(color), s.opacity))
            continue
        if css(color) not in known:
            name = known[css(color)] = f"g{len(known)}"
            stops = zip((0, 0.45, 1), (toned(color, 0.3), color, toned(color, -0.48)), strict=True)
            ramp = "".join(f'<stop offset="{o}" stop-color="{css(c)}"/>' for o, c in stops)
            defs.append(f'<radialGradient id="{name}" cx=".36" cy=".28" r=".85">{ramp}</radialGradient>')
        if s.role in ("head", "hat brim"):  # a soft shadow on what lies below
            low = map_points(s.path, lambda x, y: (x + 1.5, y + 3.5))
            parts.append(fill(low, "#000", 0.22))
        parts.append(fill(s.path, f"url(#{known[css(color)]})"))
        if s.role in GLOSSY:
            parts.append(fill(s.path, "url(#gloss)"))
    return f'<defs>{"".join(defs)}</defs>' + "".join(parts)


def hatch(name: str, paint: str, step: float, width: float, angle: float) -> str:
    """A pattern of parallel strokes, `step` units apart."""
    return (f'<pattern id="{name}" width="{step}" height="{step}" patternUnits="userSpaceOnUse" '
            f'patternTransform="rotate({angle})"><rect width="{step}" height="{width}" fill="{paint}"/></pattern>')


# The brightness below which a role is hatched: faces stay clear so that they can be read.
HATCHED = {"body": 0.72, "hat crown": 0.72, "hair": 0.72, "cape": 0.72, "head": 0.38, "scarf": 0.5, "ears": 0.4}


def _sketch(scene: Scene) -> str:
    pencil, paper = "#333333", "#f4f4f2"
    parts = [f'<defs>{hatch("h", "#5c5c5c", 6, 1.7, -45)}</defs>', ground(paper)]
    for s in shapes_of(scene, tremor=0.9):
        light = luminance(tint(s))
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


def _doodles(scene: Scene) -> str:
    pen = "#2b1c38"
    parts = [ground(css(mix(SCENERY[scene.background], (255, 255, 255), 0.42)))]
    for s in shapes_of(scene, tremor=2.0):
        paint = pen if s.color == "ink" else css(mix(tint(s), (255, 255, 255), 0.4 if s.color != "black" else 0.3))
        if s.width:
            thick = max(3.0, s.width) if s.role in ("rim", "temple", "bridge", "mouth", "antenna", "lashes") else 2.4
            parts.append(line(s.path, pen if s.role not in ("glint", "grille") else "#ffffff", thick, s.opacity))
            continue
        parts.append(fill(s.path, paint, s.opacity))
        if outlined(s, scene) and s.color != "ink":
            small = s.role in ("eyes", "jewel", "tip", "nose", "button", "star", "muzzle")
            parts.append(line(s.path, pen, 2.4 if small else 3.8))
    return "".join(parts)


INK, PAPER = (58, 36, 24), (236, 219, 176)
DOTTED = {"head", "body", "hat crown", "hair", "cape"}


def aged(color: Color, t: float = 0.56) -> Color:
    """The colour as an old print shows it: `t` of the way to a brown ramp from ink to paper."""
    return mix(color, mix(INK, PAPER, luminance(color) ** 0.9), t)


def _sunburst(background: str) -> str:
    base = aged(SCENERY[background], 0.72)
    panel = f'<rect x="6" y="6" width="116" height="101" fill="{css(toned(base, -0.26))}"/>'
    parts = [f'<g clip-path="url(#panel)">{panel}']
    corners = [(64, -100), (150, -100), (230, -60), (260, 0), (260, 60), (260, 140), (220, 200), (140, 240),
               (64, 240), (-12, 240), (-92, 200), (-132, 140), (-132, 60), (-132, 0), (-102, -60), (-22, -100)]
    for k in range(0, 16, 2):
        (a, b), (c, d) = corners[k], corners[(k + 1) % 16]
        parts.append(fill(f"M64,66 L{a},{b} L{c},{d} Z", css(toned(base, 0.12))))
    return "".join(parts) + "</g>"


def _lettering(seed: int) -> str:
    """Words of block glyphs: dark blocks with a notch cut out, as illegible as small print on an old poster."""
    rng, parts, x = random.Random(seed), [], 12.0
    gap = rng.randrange(3, 6)
    for k in range(14):
        if k == gap or k == gap + 5:
            x += 3.5
        if x > 111:
            break
        parts.append(f'<rect x="{x}" y="111" width="6" height="9.5" fill="{css(INK)}"/>')
        notch = rng.choice(((2, 113, 2, 3), (2, 116.5, 2, 4), (2.2, 111, 1.8, 4), (3, 113.5, 3, 2.2), (0, 115, 3, 2.2)))
        dx, y, w, h = notch
        parts.append(f'<rect x="{x + dx}" y="{y}" width="{w}" height="{h}" fill="{css(PAPER)}"/>')
        x += 7.6
    return "".join(parts)


def _vintage(scene: Scene) -> str:
    ink, paper = css(INK), css(PAPER)
    dots = (f'<pattern id="d" width="6.4" height="6.4" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
            f'<circle cx="3.2" cy="3.2" r="1.9" fill="{ink}"/></pattern>'
            '<clipPath id="panel"><rect x="6" y="6" width="116" height="101"/></clipPath>')
    parts = [f"<defs>{dots}</defs>", ground(paper), _sunburst(scene.background)]
    figure = []
    for s in shapes_of(scene):
        color = aged(tint(s)) if s.color != "ink" else INK
        if s.width:
            figure.append(line(s.path, css(color), s.width, s.opacity))
            continue
        figure.append(fill(s.path, css(color), s.opacity))
        if s.role in DOTTED:
            figure.append(fill(s.path, "url(#d)", 0.28 if s.role == "head" else 0.45))
        if outlined(s, scene):
            figure.append(line(s.path, ink, 2.4))
    parts.append(f'<g clip-path="url(#panel)"><g transform="translate(10.2 4.5) scale(.84)">{"".join(figure)}</g></g>')
    parts.append(f'<rect x="6" y="6" width="116" height="101" fill="none" stroke="{ink}" stroke-width="1.6"/>')
    return "".join(parts) + _lettering(scene.seed)


# --------------------------------------------------------------------------------------------------- extra styles

CELL = 4  # units; one block of pixel art
# The parts that make up the silhouette.
BLACK_EDGE = {"head", "body", "ears", "hair", "hat crown", "hat brim", "scarf", "cape", "neck", "pom-pom", "tip",
              "bolts", "antenna"}


def _pixel(scene: Scene) -> str:
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
    small = _rasterise(_document(crisp), n).quantize(20, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
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
                rects.append(f'<rect x="{CELL * start}" y="{CELL * y}" width="{CELL * (x - start)}" height="{CELL}" '
                             f'fill="{row[start]}"/>')
                start = x
    return f'<g shape-rendering="crispEdges">{"".join(rects)}</g>'


def _blueprint(scene: Scene) -> str:
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


def _stained_glass(scene: Scene) -> str:
    lead, rng = "#15121a", random.Random(scene.seed)
    back = vivid(SCENERY[scene.background], 1.5)
    glow = ('<radialGradient id="glow" cx=".5" cy=".42" r=".62"><stop offset="0" stop-color="#fff" stop-opacity=".28"/>'
            '<stop offset=".6" stop-color="#fff" stop-opacity="0"/>'
            '<stop offset="1" stop-color="#000" stop-opacity=".3"/></radialGradient>')
    parts = [f"<defs>{glow}</defs>", ground(css(back))]
    spokes = [(64 + 130 * math.cos(t), 60 + 130 * math.sin(t))
              for t in (math.tau * (k + rng.uniform(-0.25, 0.25)) / 12 for k in range(12))]
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
    parts.append(fill(arch, "#5b5763", extra='fill-rule="evenodd"') + line(arch[arch.index("M6"):], lead, 4))
    return "".join(parts)


def _chalkboard(scene: Scene) -> str:
    board, chalk = (34, 66, 54), (240, 240, 228)
    rng = random.Random(scene.seed)
    parts = [f"<defs>{hatch('h', css(board), 5.5, 1.8, -38)}</defs>", ground(css(board))]
    for _ in range(4):  # where the sponge passed
        x, y, turn = rng.uniform(10, 118), rng.uniform(10, 118), rng.uniform(-30, 30)
        parts.append(f'<ellipse cx="{x:.1f}" cy="{y:.1f}" rx="44" ry="15" fill="#dfe8dc" opacity=".08" '
                     f'transform="rotate({turn:.0f} {x:.1f} {y:.1f})"/>')
    once, again = shapes_of(scene, tremor=0.9), shapes_of(replace(scene, seed=scene.seed + 1), tremor=1.0)
    for s, t in zip(once, again, strict=True):
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
        parts.append(line(t.path, css(chalk), 1.1, 0.5))
    parts.append('<rect x="2.5" y="2.5" width="123" height="123" fill="none" stroke="#8a5a33" stroke-width="5"/>')
    return "".join(parts)


_PAINTERS = {
    "render": _render, "flat": _flat, "sketch": _sketch, "doodles": _doodles, "vintage": _vintage,
    "pixel": _pixel, "blueprint": _blueprint, "stained_glass": _stained_glass, "chalkboard": _chalkboard,
}  # fmt: skip


def _document(inside: str) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 128 128" width="128" height="128">{inside}</svg>'


def _rasterise(svg: str, size: int) -> Image.Image:
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGB")


def to_svg(scene: Scene, style: str) -> str:
    """The scene as a standalone SVG of 128 x 128 units.

    Raises ValueError for a style that is not in STYLES.
    """
    if style not in _PAINTERS:
        raise ValueError(f"unknown style {style!r}; known: {', '.join(STYLES)}")
    return _document(_PAINTERS[style](scene))


def render(scene: Scene, style: str, size: int = 64) -> Image.Image:
    """The scene drawn in a style: an RGB picture of size x size pixels, the same at every call.

    Raises ValueError for an unknown style or a size below 1.
    """
    if size < 1:
        raise ValueError(f"size is a positive number of pixels, not {size!r}")
    return _rasterise(to_svg(scene, style), size)

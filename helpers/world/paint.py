"""Paints and pens: the palette, colour arithmetic, and the SVG elements that every style is made of."""

from __future__ import annotations

import io

import resvg_py
from PIL import Image

from helpers.world.paths import CANVAS, Shape
from helpers.world.scenes import Scene

PALETTE = {
    "light": (246, 205, 172),
    "tan": (212, 152, 100),
    "brown": (134, 84, 50),
    "black": (48, 46, 54),
    "white": (246, 246, 244),
    "gray": (148, 153, 162),
    "red": (218, 48, 48),
    "orange": (244, 134, 40),
    "yellow": (250, 205, 50),
    "green": (66, 166, 84),
    "blue": (52, 108, 208),
    "purple": (138, 76, 180),
    "pink": (245, 160, 190),
    "blond": (240, 205, 105),
    "ink": (28, 26, 36),
    "rose": (240, 130, 150),
    "cream": (250, 232, 208),
    "glow": (190, 226, 70),
    "crimson": (176, 32, 52),
}
SCENERY = {  # backgrounds are paler than clothes of the same name
    "pink": (247, 170, 198),
    "blue": (112, 158, 226),
    "green": (124, 196, 134),
    "yellow": (250, 222, 112),
    "purple": (172, 132, 212),
    "orange": (248, 172, 98),
    "gray": (182, 187, 194),
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
    return (
        f'<path d="{path}" fill="none" stroke="{paint}" stroke-width="{width:.1f}" stroke-linecap="round" '
        f'stroke-linejoin="round"{alpha} {extra}/>'
    )


def ground(paint: str) -> str:
    """An SVG rectangle over the whole canvas."""
    return f'<rect width="{CANVAS}" height="{CANVAS}" fill="{paint}"/>'


def tint(shape: Shape) -> Color:
    """A shape's colour in 0..255, with its tone applied."""
    names = SCENERY if shape.role == "backdrop" else PALETTE
    return toned(names[shape.color], shape.tone)


# Too small, or drawn over an edge that is already there: no outline of their own.
NO_OUTLINE = {"pupils", "glint", "cheeks", "teeth", "teeth rim", "inner ears", "star rim", "tongue", "face plate"}


def outlined(shape: Shape, scene: Scene) -> bool:
    """Whether an inked style draws a line around the shape; the rim of glasses already frames the eyes."""
    framed = shape.role == "eyes" and scene.eyewear == "glasses"
    return shape.opacity == 1 and shape.role not in NO_OUTLINE and not framed


def hatch(name: str, paint: str, step: float, width: float, angle: float) -> str:
    """A pattern of parallel strokes, `step` units apart."""
    return (
        f'<pattern id="{name}" width="{step}" height="{step}" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate({angle})"><rect width="{step}" height="{width}" fill="{paint}"/></pattern>'
    )


# The brightness below which a role is hatched: faces stay clear so that they can be read.
HATCHED = {"body": 0.72, "hat crown": 0.72, "hair": 0.72, "cape": 0.72, "head": 0.38, "scarf": 0.5, "ears": 0.4}


def ramp(name: str, colors: tuple[Color, ...]) -> str:
    """A gradient from the canvas' top to its bottom, to be defined once and used as "url(#name)"."""
    stops = "".join(f'<stop offset="{k / (len(colors) - 1)}" stop-color="{css(c)}"/>' for k, c in enumerate(colors))
    return f'<defs><linearGradient id="{name}" x1="0" y1="0" x2="0" y2="1">{stops}</linearGradient></defs>'


def sky(scene: Scene, color: Color) -> str:
    """The ground behind everything, in this colour: a gradient where the scene asks for one."""
    if scene.backdrop != "gradient":
        return ground(css(color))
    return ramp("sky", (toned(color, 0.55), color, toned(color, -0.35))) + ground("url(#sky)")


def document(inside: str) -> str:
    """The inside of an SVG as a standalone one of 128 x 128 units."""
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 128 128" width="128" height="128">{inside}</svg>'


def rasterise(svg: str, size: int) -> Image.Image:
    """The SVG as an RGB picture of size x size pixels."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGB")

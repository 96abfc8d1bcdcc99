"""The geometry of a scene: an ordered list of named shapes, from the body at the back to the glasses in front.

Shapes carry the name of their colour and never a paint: `helpers.world.styles` decides how a style paints them. The
canvas is 128 x 128 units, x to the right and y down; the head is centred near (64, 58).
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass, replace

from helpers.world.scenes import Scene, clash

CANVAS = 128
_PAIR = re.compile(r"(-?[\d.]+),(-?[\d.]+)")


@dataclass(frozen=True)
class Shape:
    """A filled region, or an open line when `width` is not 0."""

    role: str  # body, neck, head, ears, hair, eyes, muzzle, nose, mouth, hat crown, hat brim, band, lens, scarf, …
    path: str  # an SVG path of absolute M, L, C, Q and Z, points written "x,y"
    color: str  # a colour name of helpers.world.scenes, or "ink", "rose", "cream", "teal", "glow"
    tone: float = 0.0  # -1 … 1: the same colour darker or lighter
    width: float = 0.0  # of a line, in units
    head: bool = True  # tilts with the head
    opacity: float = 1.0


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


# --------------------------------------------------------------------------------------------------- body and neck


def _body(scene: Scene) -> list[Shape]:
    neck_color = {"hero": "light", "skeleton": "white"}.get(scene.subject, scene.color)
    half = {"skeleton": 6, "alien": 6, "robot": 8}.get(scene.subject, 10)
    shapes = []
    if scene.subject == "hero":
        shapes += both("cape", "M64,150 L18,150 C14,120 26,96 42,86 L64,96 Z", scene.color, tone=-0.2, head=False)
    shapes.append(Shape("neck", box(64 - half, 72, 64 + half, 102), neck_color, tone=-0.16, head=False))
    torso = "M18,150 C18,116 22,100 50,93 C54,100 74,100 78,93 C106,100 110,116 110,150 Z"
    shapes.append(Shape("body", torso, scene.clothes_color, head=False))
    arm = "M35,132 C35,124 34,118 32,113"
    shapes += both("fold", arm, scene.clothes_color, tone=-0.3, width=2.2, head=False)
    return shapes


def _neckwear(scene: Scene) -> list[Shape]:
    color, kind = scene.neckwear_color, scene.neckwear
    if kind == "scarf":
        return [
            Shape("scarf", "M70,92 L86,90 L89,122 L73,124 Z", color, tone=-0.1, head=False),
            Shape("fringe", "M74,119 L88.5,117", color, tone=-0.4, width=2.4, head=False),
            Shape("scarf", "M41,84 C50,92 78,92 87,84 C93,88 92,98 86,100 C72,106 56,106 42,100 C36,98 35,88 41,84 Z",
                  color, head=False),
            Shape("fold", "M46,94 C56,98 72,98 82,94", color, tone=-0.3, width=2.2, head=False),
        ]
    if kind == "tie":
        return [
            Shape("tie", "M59,103 L69,103 L74,124 L64,136 L54,124 Z", color, head=False),
            Shape("knot", "M56,94 L72,94 L69,105 L59,105 Z", color, tone=-0.22, head=False),
        ]
    if kind == "bow tie":
        return [
            *both("bow tie", "M64,99 L44,89 C41,95 41,103 44,109 Z", color, head=False),
            Shape("knot", ellipse(64, 99, 5, 5.5), color, tone=-0.25, head=False),
        ]
    return []


def _badge(scene: Scene) -> list[Shape]:
    if scene.badge == "none":
        return []
    return [
        Shape("star rim", star(40, 110, 13.5), "ink", head=False),
        Shape("star", star(40, 110, 10), "yellow", head=False),
    ]


# --------------------------------------------------------------------------------------------------- faces


def _eyes(x: float = 9.5, y: float = 57.0, r: float = 5.6, pupil: float = 3.4) -> list[Shape]:
    shapes = both("eyes", ellipse(64 - x, y, r), "white")
    shapes += both("pupils", ellipse(64 - x + 0.4, y + 0.4, pupil), "ink")
    return shapes


def _mouth(scene: Scene, y: float = 73.0, half: float = 9.0, width: float = 2.8, color: str = "ink") -> list[Shape]:
    bend = {"smile": 5, "neutral": 0, "frown": -5}[scene.expression]
    line = f"M{64 - half},{y - bend * 0.6} Q64,{y + bend * 1.3} {64 + half},{y - bend * 0.6}"
    if bend > 0:  # an open, laughing mouth
        left, right = f"{64 - half},{y - 3}", f"{64 + half},{y - 3}"
        return [Shape("mouth", f"M{left} Q64,{y - 1} {right} Q64,{y + 13} {left} Z", color)]
    return [Shape("mouth", line, color, width=width)]


def _person(scene: Scene) -> list[Shape]:
    woman = scene.subject == "woman"
    back, front = [], []
    if woman:
        back.append(Shape("hair", "M64,28 C30,28 31,58 31,74 C31,90 26,100 30,106 C42,108 86,108 98,106 "
                          "C102,100 97,90 97,74 C97,58 98,28 64,28 Z", scene.hair, tone=-0.08))
        front.append(Shape("hair", "M40,62 C37,40 48,29 64,29 C80,29 91,40 88,62 C86,54 82,48 74,43 "
                           "C64,52 48,50 40,62 Z", scene.hair))
        skull = "M41,56 C41,24 87,24 87,56 C87,72 76,85 64,85 C52,85 41,72 41,56 Z"
    else:
        back += both("ears", ellipse(40, 60, 4.8, 6.5), scene.color, tone=-0.1)
        front.append(Shape("hair", "M39,58 C34,28 50,24 64,24 C78,24 94,28 89,58 L85,58 C86,50 84,46 82,43 "
                           "C72,46 58,45 48,41 C44,45 42,50 43,58 Z", scene.hair))
        skull = "M40,54 C40,26 88,26 88,54 C88,64 87,72 83,77 C76,87 52,87 45,77 C41,72 40,64 40,54 Z"
    face = [Shape("head", skull, scene.color)]
    face += _eyes()
    if woman:
        face += both("lashes", "M46,54 Q53,46 60,53", "ink", width=2.4)
        face += both("cheeks", ellipse(48, 67, 4, 2.8), "rose", opacity=0.6)
    else:
        face += both("brows", "M47,50 Q54,46 60,50", scene.hair, tone=-0.15, width=3)
    face.append(Shape("nose", "M64,60 Q68,67 63,67", scene.color, tone=-0.35, width=2.4))
    return back + face + _mouth(scene, 74.5, 8.5, color="crimson" if woman else "ink") + front


def _muzzle_color(scene: Scene) -> tuple[str, float]:
    return {"black": ("gray", 0.25), "gray": ("white", 0.0), "white": ("cream", 0.0), "brown": ("tan", 0.25),
            "orange": ("cream", 0.0), "yellow": ("cream", 0.0)}[scene.color]


def _cat(scene: Scene) -> list[Shape]:
    hat = scene.headwear != "none"
    ear = "M38,60 L25,15 L58,38 Z" if hat else "M38,58 L36,12 L62,34 Z"
    inner = "M37,48 L30,25 L48,39 Z" if hat else "M42,46 L40,21 L54,34 Z"
    muzzle, tone = _muzzle_color(scene)
    shapes = both("ears", ear, scene.color) + both("inner ears", inner, "rose")
    shapes.append(Shape("head", "M64,33 C82,33 92,44 92,58 C92,64 95,67 94,71 C86,82 76,84 64,84 C52,84 42,82 34,71 "
                        "C33,67 36,64 36,58 C36,44 46,33 64,33 Z", scene.color))
    if not hat:
        shapes += [Shape("stripe", f"M{x},36 L{64 + (x - 64) * 0.8},46", scene.color, tone=-0.3, width=3.4)
                   for x in (55, 64, 73)]
    shapes += both("eyes", ellipse(52, 57, 6.4, 5.8), "glow")
    shapes += both("pupils", ellipse(52, 57, 2.1, 5.2), "ink")
    shapes += both("muzzle", ellipse(57.5, 72, 8.5, 7), muzzle, tone=tone)
    shapes.append(Shape("nose", "M59,64.5 L69,64.5 L64,70 Z", "rose", tone=-0.12))
    whisker = "ink" if scene.color != "black" else "white"
    for y0, y1 in ((68, 63), (72, 72), (76, 81)):
        shapes += both("whiskers", f"M46,{y0} L24,{y1}", whisker, width=1.8)
    return shapes + _mouth(scene, 75, 6.5, 2.4)


def _dog(scene: Scene) -> list[Shape]:
    ear, tone = {"brown": ("brown", -0.4), "white": ("tan", -0.12), "yellow": ("brown", 0.0)}[scene.color]
    muzzle, light = _muzzle_color(scene)
    shapes = [Shape("head", "M64,31 C82,31 89,42 88,58 C88,72 80,86 64,86 C48,86 40,72 40,58 C39,42 46,31 64,31 Z",
                    scene.color)]
    shapes += both("ears", "M48,36 C36,32 27,42 25,58 C23,74 26,84 33,84 C42,83 44,66 44,54 C44,46 46,42 48,36 Z",
                   ear, tone=tone)
    shapes += _eyes(9.5, 54, 5.4)
    shapes.append(Shape("muzzle", "M64,58 C76,58 81,68 80,76 C79,86 72,89 64,89 "
                        "C56,89 49,86 48,76 C47,68 52,58 64,58 Z", muzzle, tone=light))
    if scene.expression == "smile":
        shapes.append(Shape("tongue", "M59,79 L69,79 L69,87 Q64,94 59,87 Z", "rose", tone=-0.12))
    shapes.append(Shape("nose", "M56,62 Q64,58 72,62 Q72,68 64,71 Q56,68 56,62 Z", "ink"))
    bend = {"smile": 5, "neutral": 0, "frown": -5}[scene.expression]
    shapes.append(Shape("mouth", f"M54,{78.5 - bend * 0.5} Q64,{78.5 + bend} 74,{78.5 - bend * 0.5}", "ink", width=2.6))
    return shapes


def _bear(scene: Scene) -> list[Shape]:
    x, y = (34, 36) if scene.headwear != "none" else (42, 36)
    muzzle, tone = _muzzle_color(scene)
    shapes = both("ears", ellipse(x, y, 11), scene.color, tone=-0.06)
    shapes += both("inner ears", ellipse(x, y, 6), muzzle, tone=tone)
    shapes.append(Shape("head", "M64,31 C80,31 90,42 91,58 C92,76 80,85 64,85 C48,85 36,76 37,58 C38,42 48,31 64,31 Z",
                        scene.color))
    shapes += _eyes(10, 55.5, 4.8, 3.2)
    shapes.append(Shape("muzzle", ellipse(64, 71, 14, 11.5), muzzle, tone=tone))
    shapes.append(Shape("nose", ellipse(64, 64.5, 6.2, 4.4), "ink"))
    return shapes + _mouth(scene, 75, 7, 2.6)


def _rabbit(scene: Scene) -> list[Shape]:
    hat = scene.headwear != "none"
    x, y, turn = (34, 25, -24) if hat else (51, 26, -7)
    shapes = both("ears", ellipse(x, y, 8, 23 if hat else 17, turn), scene.color, tone=-0.04)
    shapes += both("inner ears", ellipse(x, y, 4, 16 if hat else 13, turn), "rose")
    shapes.append(Shape("head", "M64,34 C80,34 87,44 88,58 C91,66 90,72 86,77 C80,84 72,85 64,85 C56,85 48,84 42,77 "
                        "C38,72 37,66 40,58 C41,44 48,34 64,34 Z", scene.color))
    shapes += _eyes(10, 56.5, 5.2, 4)
    shapes += both("cheeks", ellipse(46, 69, 4.5, 3), "rose", opacity=0.6)
    shapes.append(Shape("nose", "M59.5,63.5 L68.5,63.5 L64,68.5 Z", "rose", tone=-0.2))
    shapes += _mouth(scene, 73, 7.5, 2.6)
    teeth = 75 if scene.expression == "smile" else 73
    shapes.append(Shape("teeth rim", box(58.5, teeth - 0.5, 69.5, teeth + 9.2, 1), "ink"))
    shapes += [Shape("teeth", box(x, teeth + 0.6, x + 4, teeth + 7.8, 0.5), "white") for x in (59.7, 64.4)]
    return shapes


def _robot(scene: Scene) -> list[Shape]:
    shapes = []
    if scene.headwear == "none":
        shapes.append(Shape("antenna", "M64,38 L64,20", "ink", width=3.4))
        shapes.append(Shape("antenna", ellipse(64, 17, 5.5), "red", tone=0.1))
    shapes += both("bolts", box(31, 51, 42, 68, 2), "gray", tone=-0.35)
    shapes.append(Shape("head", box(38, 33, 90, 86, 6), scene.color))
    shapes.append(Shape("face plate", box(43, 46, 85, 67, 4), scene.color, tone=-0.45))
    shapes += both("eyes", ellipse(53.5, 56.5, 6.6), "glow", tone=0.1) + both("pupils", ellipse(53.5, 56.5, 2.8), "ink")
    bend = {"smile": 5, "neutral": 0, "frown": -5}[scene.expression]
    y = 76 - bend * 0.3
    side, middle = y - bend * 0.6, y + bend
    shapes.append(Shape("mouth", f"M47,{side - 4.5} Q64,{middle - 4.5} 81,{side - 4.5} L81,{side + 4} Q64,{middle + 4} "
                        f"47,{side + 4} Z", "ink"))
    for x in (51.5, 57.7, 64, 70.3, 76.5):
        v = side + (middle - side) * 0.5 * (1 - ((x - 64) / 17) ** 2)
        shapes.append(Shape("grille", f"M{x},{v - 3.6:.1f} L{x},{v + 3.2:.1f}", "white", width=2.4))
    return shapes


def _alien(scene: Scene) -> list[Shape]:
    hat = scene.headwear != "none"
    stalk, x, y = ("M44,44 Q36,34 29,24", 28, 21) if hat else ("M52,36 Q48,26 43,19", 42, 16)
    shapes = both("antenna", stalk, scene.color, tone=-0.25, width=3.6)
    shapes += both("antenna", ellipse(x, y, 5.5), scene.color, tone=0.15)
    shapes.append(Shape("head", "M64,30 C84,30 95,42 93,57 C91,71 75,88 64,88 C53,88 37,71 35,57 C33,42 44,30 64,30 Z",
                        scene.color))
    shapes += both("eyes", ellipse(51, 59, 9, 6.3, 32), "ink")
    shapes += both("glint", ellipse(48.5, 56.5, 2.3), "white")
    shapes += both("nose", ellipse(62.2, 70.5, 1, 1.6), "ink")
    return shapes + _mouth(scene, 77.5, 6.5, 2.6)


def _skeleton(scene: Scene) -> list[Shape]:
    shapes = [Shape("head", "M64,29 C84,29 91,42 90,56 C90,64 86,67 82,70 L80,84 Q64,90 48,84 L46,70 "
                    "C42,67 38,64 38,56 C37,42 44,29 64,29 Z", "white")]
    shapes += both("sockets", "M46,52 C48,48 58,48 60,53 C61,60 57,65 52,65 C46,65 44,58 46,52 Z", "ink")
    shapes.append(Shape("nose", "M64,62 L68.5,70 L64,68.6 L59.5,70 Z", "ink"))
    bend = {"smile": 4, "neutral": 0, "frown": -4}[scene.expression]
    y = 77
    side, middle = y - bend * 0.6, y + bend
    shapes.append(Shape("mouth", f"M50,{side} Q64,{middle} 78,{side}", "ink", width=2.6))
    for x in (54.5, 60.8, 67.2, 73.5):
        v = side + (middle - side) * 0.5 * (1 - ((x - 64) / 14) ** 2)
        shapes.append(Shape("teeth", f"M{x},{v - 4:.1f} L{x},{v + 4:.1f}", "ink", width=2))
    return shapes


def _hero(scene: Scene) -> list[Shape]:
    ear = "M39,60 L22,12 L56,36 Z" if scene.headwear != "none" else "M40,56 L38,6 L58,34 Z"
    shapes = both("ears", ear, scene.color)
    shapes.append(Shape("jaw", "M44,58 L84,58 L83,74 C80,84 72,87 64,87 C56,87 48,84 45,74 Z", "light"))
    shapes.append(Shape("head", "M64,29 C82,29 90,40 90,58 L87,80 L81,77 L79,67 L68,65.5 L64,70 L60,65.5 L49,67 L47,77 "
                        "L41,80 L38,58 C38,40 46,29 64,29 Z", scene.color))
    shapes += both("eyes", "M45,52 L60,57.5 L59,61 C54,63 47,60 45,52 Z", "white")
    return shapes + _mouth(scene, 78, 7.5, 2.8)


_SUBJECTS = {"man": _person, "woman": _person, "cat": _cat, "dog": _dog, "bear": _bear, "rabbit": _rabbit,
             "robot": _robot, "alien": _alien, "skeleton": _skeleton, "hero": _hero}

# --------------------------------------------------------------------------------------------------- things worn


def _headwear(scene: Scene) -> list[Shape]:
    color, kind = scene.headwear_color, scene.headwear
    trim = contrast(color, "ink" if color != "black" else "white")
    if kind == "cowboy hat":
        return [
            Shape("hat crown", "M41,42 C42,28 43,11 52,9 C57,8 60,14 64,14 C68,14 71,8 76,9 C85,11 86,28 87,42 Z",
                  color),
            Shape("fold", "M64,15 L64,26", color, tone=-0.3, width=2.6),
            Shape("band", "M42,33 Q64,38 86,33 L87,41 Q64,46 41,41 Z", trim),
            Shape("hat brim", "M15,26 C22,40 46,39 64,39 C82,39 106,40 113,26 C116,42 90,50 64,50 C38,50 12,42 15,26 Z",
                  color, tone=-0.12),
        ]
    if kind == "beanie":
        return [
            Shape("pom-pom", ellipse(64, 14, 8, 7), contrast(color, "white", "yellow") if color != "white" else "gray"),
            Shape("hat crown", "M38,44 C36,22 52,17 64,17 C76,17 92,22 90,44 Z", color),
            *[Shape("rib", f"M{64 + x},21 Q{64 + 1.5 * x},28 {64 + 1.7 * x},36", color, tone=-0.28, width=2.4)
              for x in (-9, 0, 9)],
            Shape("hat brim", "M35,37 Q64,32 93,37 Q95,42 93,48 Q64,44 35,48 Q33,42 35,37 Z", color, tone=0.3),
        ]
    if kind == "crown":
        jewel = contrast(color, "red", "blue", "green")
        return [
            Shape("hat crown", "M40,45 L36,17 L50,29 L64,11 L78,29 L92,17 L88,45 Q64,49 40,45 Z", color),
            *[Shape("tip", ellipse(x, y, 3.8), color, tone=0.25) for x, y in ((36, 16), (64, 10.5), (92, 16))],
            Shape("band", "M39,39 Q64,43 89,39 L88.5,46 Q64,50 39.5,46 Z", color, tone=-0.25),
            Shape("jewel", "M64,24 L69,31 L64,38 L59,31 Z", jewel),
            *both("jewel", ellipse(49.5, 36, 3), jewel),
        ]
    if kind == "top hat":
        return [
            Shape("hat crown", "M44,42 C46,28 45,18 42,8 Q64,4 86,8 C83,18 82,28 84,42 Z", color),
            Shape("band", "M44.5,31 Q64,35 83.5,31 L84,41 Q64,45 44,41 Z", contrast(color, "red", "white")),
            Shape("hat brim", ellipse(64, 42, 37, 5.6), color, tone=-0.14),
        ]
    if kind == "cap":
        return [
            Shape("hat crown", "M38,46 C35,22 50,14 64,14 C80,14 92,24 90,46 Q64,42 38,46 Z", color),
            Shape("fold", "M64,16 Q52,24 52,42", color, tone=-0.28, width=2.2),
            Shape("button", ellipse(64, 13.5, 4.5, 3), color, tone=-0.25),
            Shape("hat brim", "M56,45 C66,36 96,34 116,42 C121,45 120,50 115,50 C98,46 78,50 58,50 Q54,49 56,45 Z",
                  color, tone=-0.25),
        ]
    return []


def _eyewear(scene: Scene) -> list[Shape]:
    y, dark = (58 if scene.subject in ("alien", "cat") else 57), scene.color in ("black",) or scene.subject == "robot"
    rim = "white" if dark else "ink"
    if scene.eyewear == "glasses":
        ring = ellipse(52.5, y, 9.6, 9)
        return [
            *both("lens", ring, "white", opacity=0.16),
            *both("rim", ring, rim, width=3),
            *both("temple", f"M43,{y - 2} L38,{y - 4}", rim, width=3),
            Shape("bridge", f"M61.5,{y - 1} Q64,{y - 4} 66.5,{y - 1}", rim, width=3),
        ]
    if scene.eyewear == "sunglasses":
        lens = f"M40,{y - 8} L62,{y - 8} C63,{y + 2} 60,{y + 8} 52,{y + 8} C43,{y + 8} 40,{y} 40,{y - 8} Z"
        shapes = both("rim", lens, rim, width=3.6) if dark else []
        shapes += both("lens", lens, "ink") + [Shape("bridge", f"M60,{y - 6.5} L68,{y - 6.5}", rim, width=3.4)]
        glints = [f"M{x},{y - 4} L{x - 4},{y + 2}" for x in (51, 75)]
        return shapes + [Shape("glint", path, "white", width=2, opacity=0.85) for path in glints]
    return []


# --------------------------------------------------------------------------------------------------- the whole scene


def _pose(scene: Scene):
    """(x, y, head) -> where the point lies after tilting the head and moving and zooming everything."""
    c, s = math.cos(math.radians(scene.tilt)), math.sin(math.radians(scene.tilt))

    def place(x: float, y: float, head: bool) -> tuple[float, float]:
        if head:  # a rotation about the nape (64, 86)
            u, v = x - 64, y - 86
            x, y = 64 + c * u - s * v, 86 + s * u + c * v
        return 64 + scene.zoom * (x - 64) + CANVAS * scene.dx, 66 + scene.zoom * (y - 66) + CANVAS * scene.dy

    return place


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


def shapes_of(scene: Scene, tremor: float = 0.0) -> list[Shape]:
    """The shapes of a scene from back to front, in pose, drawn by a hand that trembles by `tremor` units."""
    shapes = _body(scene)
    face = _SUBJECTS[scene.subject](scene)
    if scene.subject == "woman":  # long hair falls over the shoulders, behind everything else
        shapes, face = [face[0], *shapes], face[1:]
    shapes += face + _eyewear(scene) + _headwear(scene)
    at = next(i for i, s in enumerate(shapes) if s.role in ("head", "ears", "jaw", "antenna", "bolts"))
    shapes[at:at] = _neckwear(scene) + _badge(scene)
    place, shake = _pose(scene), wobble(scene.seed, tremor) if tremor else None

    def move(path: str, head: bool) -> str:
        path = map_points(path, lambda x, y: place(x, y, head))
        return map_points(path, shake) if shake else path

    return [replace(s, path=move(s.path, s.head)) for s in shapes]

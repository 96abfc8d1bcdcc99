"""A scene as an ordered list of named shapes: the backdrop, the body behind the head, the glasses in front.

`shapes_of` puts them in pose; `face_parts` says where the eyes and the mouth have come to lie.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

from helpers.world.faces import face
from helpers.world.paths import CANVAS, Shape, along, box, ellipse, map_points, wobble
from helpers.world.scenes import Scene
from helpers.world.things import badge, balloon, body, eyewear, headwear, neckwear, prop

# --------------------------------------------------------------------------------------------------- backdrops

_EDGE = (-8, CANVAS + 8)  # backdrops reach beyond the canvas, so that a trembling hand leaves no gap


def _scenery(path: str, scene: Scene, tone: float, **rest) -> Shape:
    return Shape("backdrop", path, scene.background, tone=tone, head=False, **rest)


def _stripes(scene: Scene, rng: random.Random) -> list[Shape]:
    shift, low, high = rng.uniform(0, 24), *_EDGE
    starts = [shift + 24 * k for k in range(-7, 6)]
    return [_scenery(f"M{x},{high} L{x + 12},{high} L{x + 88},{low} L{x + 76},{low} Z", scene, -0.16) for x in starts]


def _dots(scene: Scene, rng: random.Random) -> list[Shape]:
    shift = rng.uniform(0, 22)
    places = [(22 * i + 11 * (j % 2) + shift - 22, 18 * j + 2) for i in range(8) for j in range(8)]
    return [_scenery(ellipse(x, y, 4.6), scene, 0.45) for x, y in places]


def _hills(scene: Scene, rng: random.Random) -> list[Shape]:
    low, high = _EDGE
    shapes = [_scenery(ellipse(rng.choice((18, 110)), 22, 10), scene, 0.8)]  # the sun
    for y, tone in ((70, -0.14), (88, -0.3)):
        a, b = rng.uniform(-14, 14), rng.uniform(-14, 14)
        ridge = f"M{low},{y + a} C20,{y - 22} 44,{y - 22} 64,{y + b} C84,{y + 20} 104,{y - 20 - a} {high},{y - b}"
        shapes.append(_scenery(f"{ridge} L{high},{high} L{low},{high} Z", scene, tone))
    return shapes


def _city(scene: Scene, rng: random.Random) -> list[Shape]:
    shapes, x = [], -6.0
    while x < CANVAS:
        width, top = rng.uniform(15, 22), rng.uniform(20, 66)
        shapes.append(_scenery(box(x, top, x + width - 1.5, CANVAS + 8, 0.5), scene, -0.34))
        for y in range(int(top) + 6, 112, 12):
            shapes += [_scenery(box(u, y, u + 3.6, y + 5.5, 0.4), scene, 0.5) for u in (x + 3.2, x + width - 8.2)]
        x += width
    return shapes


def _night_sky(scene: Scene, rng: random.Random) -> list[Shape]:
    low, high = _EDGE
    shapes = [_scenery(box(low, low, high, high, 0), scene, -0.6)]
    x = rng.choice((20, 108))
    shapes += [_scenery(ellipse(x, 20, 11), scene, 0.75), _scenery(ellipse(x + 5, 17, 9), scene, -0.6)]
    places = [(rng.uniform(2, 126), rng.uniform(2, 100), rng.uniform(1.2, 2.2)) for _ in range(22)]
    around = [(u, v, r) for u, v, r in places if (u - x) ** 2 + (v - 20) ** 2 > 300]  # not on the moon
    return shapes + [_scenery(ellipse(u, v, r), scene, 0.85) for u, v, r in around]


def _room(scene: Scene, rng: random.Random) -> list[Shape]:
    low, high = _EDGE
    x = rng.choice((6, 88))
    return [
        _scenery(box(x, 14, x + 34, 58, 1), scene, 0.7),  # a window
        _scenery(f"M{x + 17},14 L{x + 17},58 M{x},36 L{x + 34},36", scene, -0.35, width=3),
        _scenery(box(102 - x, 20, 122 - x, 44, 1), scene, -0.2),  # a picture on the wall
        _scenery(box(105 - x, 24, 119 - x, 40, 1), scene, 0.35),
        _scenery(box(low, 98, high, high, 0), scene, -0.4),  # the floor
        _scenery(box(low, 95, high, 99, 0), scene, 0.3),
    ]


_BACKDROPS = {
    "stripes": _stripes, "dots": _dots, "hills": _hills, "city": _city, "night sky": _night_sky, "room": _room,
}  # fmt: skip


def backdrop(scene: Scene) -> list[Shape]:
    """What stands behind the portrait; none for a plain ground and for a gradient, which are a style's own matter."""
    draw = _BACKDROPS.get(scene.backdrop)
    return draw(scene, random.Random(scene.seed + 1)) if draw else []


# --------------------------------------------------------------------------------------------------- pose

# How far a part stands out in front of the head's axis, in units, for a head of radius 26. What is not named turns
# with the silhouette, which stays where it is.
_DEPTH = {
    "eyes": 21, "pupils": 23, "sockets": 21, "brows": 22, "lashes": 22, "glint": 24, "lens": 24, "rim": 24,
    "bridge": 25, "mouth": 22, "teeth": 23, "teeth rim": 23, "grille": 23, "nose": 28, "muzzle": 22, "tongue": 23,
    "cheeks": 18,
    "face plate": 12, "visor": 12, "jaw": 12, "whiskers": 18, "stripe": 16, "fold": 10, "jewel": 16, "rib": 10,
    "temple": 10, "inner ears": -2, "ears": -6, "bolts": -4, "pom-pom": -2, "antenna": -2, "hat brim": 4,
}  # fmt: skip


def _turned(x: float, depth: float, angle: float) -> float:
    """Where a point at x comes to lie when the head turns by `angle` degrees."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    narrow = c if depth > 8 else 1.0  # the outline keeps its width
    return 64 + narrow * (x - 64) + depth * s


def _pose(scene: Scene):
    """(x, y, shape) -> where the point of the shape lies after turning, tilting, moving and zooming."""
    c, s = math.cos(math.radians(scene.tilt)), math.sin(math.radians(scene.tilt))

    def place(x: float, y: float, shape: Shape) -> tuple[float, float]:
        if shape.head:
            # a rotation about the nape (64, 86)
            u, v = _turned(x, _DEPTH.get(shape.role, 0), scene.angle) - 64, y - 86
            x, y = 64 + c * u - s * v, 86 + s * u + c * v
        return 64 + scene.zoom * (x - 64) + CANVAS * scene.dx, 66 + scene.zoom * (y - 66) + CANVAS * scene.dy

    return place


def figure(scene: Scene) -> list[Shape]:
    """The portrait's shapes from back to front, in pose."""
    shapes, head = body(scene), face(scene)
    if scene.subject == "woman":  # long hair falls over the shoulders, behind everything else
        shapes, head = [head[0], *shapes], head[1:]
    shapes = balloon(scene) + shapes + head + eyewear(scene) + headwear(scene)
    at = next(i for i, s in enumerate(shapes) if s.role in ("head", "ears", "jaw", "antenna", "bolts"))
    shapes[at:at] = neckwear(scene) + badge(scene)
    place = _pose(scene)
    posed = []
    for s in shapes + prop(scene):
        path = map_points(s.path, lambda x, y, s=s: place(x, y, s))
        posed.append(replace(s, path=path, width=s.width * scene.zoom))
    return posed


def shapes_of(scene: Scene, tremor: float = 0.0) -> list[Shape]:
    """Backdrop and portrait from back to front, in pose, drawn by a hand that trembles by `tremor` units."""
    shapes = backdrop(scene) + figure(scene)
    if not tremor:
        return shapes
    shake = wobble(scene.seed, tremor)
    return [replace(s, path=map_points(s.path, shake)) for s in shapes]


# --------------------------------------------------------------------------------------------------- where the face is

_EYES = {"eyes", "sockets"}


def _center(path: str) -> tuple[float, float]:
    """The middle of the box around a path."""
    xs, ys = zip(*along(path), strict=True)
    return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2


def face_parts(scene: Scene) -> list[tuple[str, float, float]]:
    """Where the parts of the face lie: ("eye" | "lens" | "mouth", x, y), in units, before a style's own framing.

    Two eyes and a mouth; sunglasses hide the eyes, and their lenses stand in for them.
    """
    shapes = figure(scene)
    dark = scene.eyewear == "sunglasses"
    kind, roles = ("lens", {"lens"}) if dark else ("eye", _EYES)
    parts = [(kind, *_center(s.path)) for s in shapes if s.role in roles]
    return parts + [("mouth", *_center(s.path)) for s in shapes if s.role == "mouth"]

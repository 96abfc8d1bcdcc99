"""The body and what it wears and holds: clothes, neckwear, star, hats, glasses, and a thing in the hand."""

from __future__ import annotations

import math

from helpers.world.paths import Shape, both, box, contrast, ellipse, star
from helpers.world.scenes import Scene


def body(scene: Scene) -> list[Shape]:
    """Shoulders, neck and clothes, which every portrait stands on."""
    neck_color = {"hero": "light", "skeleton": "white"}.get(scene.subject, scene.color)
    half = {"skeleton": 6, "alien": 6, "robot": 8}.get(scene.subject, 10)
    shapes = []
    if scene.subject == "hero":
        cape = "M64,190 L14,190 L16,150 C14,120 26,96 42,86 L64,96 Z"
        shapes += both("cape", cape, scene.color, tone=-0.2, head=False)
    shapes.append(Shape("neck", box(64 - half, 72, 64 + half, 102), neck_color, tone=-0.16, head=False))
    torso = "M18,190 L18,150 C18,116 22,100 50,93 C54,100 74,100 78,93 C106,100 110,116 110,150 L110,190 Z"
    shapes.append(Shape("body", torso, scene.clothes_color, head=False))
    arm = "M35,132 C35,124 34,118 32,113"
    shapes += both("fold", arm, scene.clothes_color, tone=-0.3, width=2.2, head=False)
    return shapes


def neckwear(scene: Scene) -> list[Shape]:
    """The scarf, tie or bow tie below the chin; nothing for none."""
    color, kind = scene.neckwear_color, scene.neckwear
    if kind == "scarf":
        return [
            Shape("scarf", "M70,92 L86,90 L89,122 L73,124 Z", color, tone=-0.1, head=False),
            Shape("fringe", "M74,119 L88.5,117", color, tone=-0.4, width=2.4, head=False),
            Shape(
                "scarf",
                "M41,84 C50,92 78,92 87,84 C93,88 92,98 86,100 C72,106 56,106 42,100 C36,98 35,88 41,84 Z",
                color,
                head=False,
            ),
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


def badge(scene: Scene) -> list[Shape]:
    """The star on the chest; nothing for none."""
    if scene.badge == "none":
        return []
    return [
        Shape("star rim", star(40, 110, 13.5), "ink", head=False),
        Shape("star", star(40, 110, 10), "yellow", head=False),
    ]


def headwear(scene: Scene) -> list[Shape]:
    """The hat, cap, crown or other thing on the head; nothing for none."""
    color, kind = scene.headwear_color, scene.headwear
    trim = contrast(color, "ink" if color != "black" else "white")
    if kind == "cowboy hat":
        return [
            Shape(
                "hat crown", "M41,42 C42,28 43,11 52,9 C57,8 60,14 64,14 C68,14 71,8 76,9 C85,11 86,28 87,42 Z", color
            ),
            Shape("fold", "M64,15 L64,26", color, tone=-0.3, width=2.6),
            Shape("band", "M42,33 Q64,38 86,33 L87,41 Q64,46 41,41 Z", trim),
            Shape(
                "hat brim",
                "M15,26 C22,40 46,39 64,39 C82,39 106,40 113,26 C116,42 90,50 64,50 C38,50 12,42 15,26 Z",
                color,
                tone=-0.12,
            ),
        ]
    if kind == "beanie":
        return [
            Shape("pom-pom", ellipse(64, 14, 8, 7), contrast(color, "white", "yellow") if color != "white" else "gray"),
            Shape("hat crown", "M38,44 C36,22 52,17 64,17 C76,17 92,22 90,44 Z", color),
            *[
                Shape("rib", f"M{64 + x},21 Q{64 + 1.5 * x},28 {64 + 1.7 * x},36", color, tone=-0.28, width=2.4)
                for x in (-9, 0, 9)
            ],
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
            Shape(
                "hat brim",
                "M56,45 C66,36 96,34 116,42 C121,45 120,50 115,50 C98,46 78,50 58,50 Q54,49 56,45 Z",
                color,
                tone=-0.25,
            ),
        ]
    return []


def eyewear(scene: Scene) -> list[Shape]:
    """Glasses or sunglasses at the height of the eyes; nothing for none."""
    y = 58 if scene.subject in ("alien", "cat", "owl", "astronaut") else 57
    dark = scene.color == "black" or scene.subject == "robot"
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


# --------------------------------------------------------------------------------------------------- things held


def _petals(x: float, y: float, color: str) -> list[Shape]:
    turns = [math.tau * k / 5 - math.pi / 2 for k in range(5)]
    around = [Shape("petal", ellipse(x + 7 * math.cos(t), y + 7 * math.sin(t), 5.2), color, head=False) for t in turns]
    return [*around, Shape("jewel", ellipse(x, y, 4.6), contrast(color, "yellow", "white"), head=False)]


def balloon(scene: Scene) -> list[Shape]:
    """A balloon beside the head; it hangs behind everything else."""
    if scene.prop != "balloon":
        return []
    color = scene.prop_color
    return [
        Shape("string", "M97,118 C100,100 112,92 109,64", "ink", width=1.8, head=False),
        Shape(
            "balloon",
            "M109,26 C119,26 124,35 122,45 C120,55 113,62 109,63 C105,62 98,55 96,45 C94,35 99,26 109,26 Z",
            color,
            head=False,
        ),
        Shape("knot", "M109,61 L113,67 L105,67 Z", color, tone=-0.2, head=False),
        Shape("glint", "M103,34 Q100,38 101,43", "white", width=2.4, opacity=0.8, head=False),
    ]


def _held(kind: str, color: str) -> list[Shape]:
    if kind == "cup":
        return [
            Shape("rim", ellipse(110, 105, 6, 6.5), color, tone=-0.2, width=3.6, head=False),
            Shape("cup", box(88, 94, 110, 117, 3.5), color, head=False),
            Shape("coffee", ellipse(99, 95.5, 10, 2.8), "ink", head=False),
        ]
    if kind == "flower":
        stem = Shape("stem", "M97,124 Q95,108 97,94", "green", tone=-0.25, width=3.2, head=False)
        return [stem, *_petals(97, 86, color)]
    if kind == "book":
        return [
            Shape("pages", "M80,93 L113,97 L111,122 L79,118 Z", "cream", head=False),
            Shape("book", "M78,91 L110,95 L108,120 L76,116 Z", color, head=False),
            Shape("fold", "M82.5,92 L80.5,116", color, tone=-0.35, width=2, head=False),
            Shape("title", "M89,100 L103,101.8", contrast(color, "white", "ink"), width=3, head=False),
        ]
    return []


def prop(scene: Scene) -> list[Shape]:
    """The thing in the hand, the arm and the hand in front of it."""
    if scene.prop == "none":
        return []
    paw = {"hero": "light", "skeleton": "white", "astronaut": "white"}.get(scene.subject, scene.color)
    arm = Shape("sleeve", "M112,160 C114,140 108,128 98,121", scene.clothes_color, tone=-0.14, width=15, head=False)
    hand = Shape("hand", ellipse(97, 119, 7.4, 6.8), paw, head=False)
    return [arm, *_held(scene.prop, scene.prop_color), hand]

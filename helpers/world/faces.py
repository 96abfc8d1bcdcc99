"""The faces: one function for each subject, from ears at the back to the mouth in front."""

from __future__ import annotations

from helpers.world.paths import Shape, both, box, ellipse
from helpers.world.scenes import Scene


def _eyes(scene: Scene, x: float = 9.5, y: float = 57.0, r: float = 5.6, pupil: float = 3.4) -> list[Shape]:
    """Two eyes, wide open in surprise, and the brows that a frown or surprise moves."""
    wide = scene.expression == "surprise"
    r, pupil = (1.15 * r, 0.8 * pupil) if wide else (r, pupil)
    shapes = both("eyes", ellipse(64 - x, y, r), "white")
    return shapes + both("pupils", ellipse(64 - x + 0.4, y + 0.4, pupil), "ink") + _brows(scene, x, y - r)


def _brows(scene: Scene, x: float, top: float, color: str = "ink") -> list[Shape]:
    """Slanted for a frown, raised for surprise, else none; `top` is the upper end of the eyes."""
    if color == "ink" and scene.color == "black":
        color = "white"
    if scene.expression == "frown":
        return both("brows", f"M{64 - x - 6},{top - 4.5} L{64 - x + 6},{top + 1.5}", color, width=2.8)
    if scene.expression == "surprise":
        arch = f"M{64 - x - 5},{top - 2.5} Q{64 - x},{top - 6.5} {64 - x + 5},{top - 2.5}"
        return both("brows", arch, color, width=2.4)
    return []


def _mouth(scene: Scene, y: float = 73.0, half: float = 9.0, width: float = 2.8, color: str = "ink") -> list[Shape]:
    if scene.expression == "smile":  # open and laughing
        left, right = f"{64 - half},{y - 3}", f"{64 + half},{y - 3}"
        return [Shape("mouth", f"M{left} Q64,{y - 1} {right} Q64,{y + 13} {left} Z", color)]
    if scene.expression == "surprise":  # round
        return [Shape("mouth", ellipse(64, y + 1, 0.45 * half + 0.6, 0.6 * half + 0.6), color)]
    bend = 6 if scene.expression == "frown" else 0
    line = f"M{64 - half},{y + bend * 0.6} Q64,{y - bend * 1.3} {64 + half},{y + bend * 0.6}"
    return [Shape("mouth", line, color, width=width)]


def _person(scene: Scene) -> list[Shape]:
    woman = scene.subject == "woman"
    back, front = [], []
    if woman:
        back.append(
            Shape(
                "hair",
                "M64,28 C30,28 31,58 31,74 C31,90 26,100 30,106 C42,108 86,108 98,106 "
                "C102,100 97,90 97,74 C97,58 98,28 64,28 Z",
                scene.hair,
                tone=-0.08,
            )
        )
        front.append(
            Shape(
                "hair",
                "M40,62 C37,40 48,29 64,29 C80,29 91,40 88,62 C86,54 82,48 74,43 C64,52 48,50 40,62 Z",
                scene.hair,
            )
        )
        skull = "M41,56 C41,24 87,24 87,56 C87,72 76,85 64,85 C52,85 41,72 41,56 Z"
    else:
        back += both("ears", ellipse(40, 60, 4.8, 6.5), scene.color, tone=-0.1)
        front.append(
            Shape(
                "hair",
                "M39,58 C34,28 50,24 64,24 C78,24 94,28 89,58 L85,58 C86,50 84,46 82,43 "
                "C72,46 58,45 48,41 C44,45 42,50 43,58 Z",
                scene.hair,
            )
        )
        skull = "M40,54 C40,26 88,26 88,54 C88,64 87,72 83,77 C76,87 52,87 45,77 C41,72 40,64 40,54 Z"
    face = [Shape("head", skull, scene.color)]
    face += _eyes(scene)
    if woman:
        face += both("lashes", "M46,54 Q53,46 60,53", "ink", width=2.4)
        face += both("cheeks", ellipse(48, 67, 4, 2.8), "rose", opacity=0.6)
    elif scene.expression in ("smile", "neutral"):
        face += both("brows", "M47,50 Q54,46 60,50", scene.hair, tone=-0.15, width=3)
    face.append(Shape("nose", "M64,60 Q68,67 63,67", scene.color, tone=-0.35, width=2.4))
    return back + face + _mouth(scene, 74.5, 8.5, color="crimson" if woman else "ink") + front


def _muzzle_color(scene: Scene) -> tuple[str, float]:
    return {
        "black": ("gray", 0.25),
        "gray": ("white", 0.0),
        "white": ("cream", 0.0),
        "brown": ("tan", 0.25),
        "orange": ("cream", 0.0),
        "yellow": ("cream", 0.0),
    }[scene.color]


def _cat(scene: Scene) -> list[Shape]:
    hat = scene.headwear != "none"
    ear = "M38,60 L25,15 L58,38 Z" if hat else "M38,58 L36,12 L62,34 Z"
    inner = "M37,48 L30,25 L48,39 Z" if hat else "M42,46 L40,21 L54,34 Z"
    muzzle, tone = _muzzle_color(scene)
    shapes = both("ears", ear, scene.color) + both("inner ears", inner, "rose")
    shapes.append(
        Shape(
            "head",
            "M64,33 C82,33 92,44 92,58 C92,64 95,67 94,71 C86,82 76,84 64,84 C52,84 42,82 34,71 "
            "C33,67 36,64 36,58 C36,44 46,33 64,33 Z",
            scene.color,
        )
    )
    if not hat:
        shapes += [
            Shape("stripe", f"M{x},36 L{64 + (x - 64) * 0.8},46", scene.color, tone=-0.3, width=3.4)
            for x in (55, 64, 73)
        ]
    wide = 1.15 if scene.expression == "surprise" else 1.0
    shapes += both("eyes", ellipse(52, 57, 6.4 * wide, 5.8 * wide), "glow")
    shapes += both("pupils", ellipse(52, 57, 2.1, 5.2), "ink") + _brows(scene, 12, 51)
    shapes += both("muzzle", ellipse(57.5, 72, 8.5, 7), muzzle, tone=tone)
    shapes.append(Shape("nose", "M59,64.5 L69,64.5 L64,70 Z", "rose", tone=-0.12))
    whisker = "ink" if scene.color != "black" else "white"
    for y0, y1 in ((68, 63), (72, 72), (76, 81)):
        shapes += both("whiskers", f"M46,{y0} L24,{y1}", whisker, width=1.8)
    return shapes + _mouth(scene, 75, 6.5, 2.4)


def _dog(scene: Scene) -> list[Shape]:
    ear, tone = {"brown": ("brown", -0.4), "white": ("tan", -0.12), "yellow": ("brown", 0.0)}[scene.color]
    muzzle, light = _muzzle_color(scene)
    shapes = [
        Shape(
            "head", "M64,31 C82,31 89,42 88,58 C88,72 80,86 64,86 C48,86 40,72 40,58 C39,42 46,31 64,31 Z", scene.color
        )
    ]
    shapes += both(
        "ears", "M48,36 C36,32 27,42 25,58 C23,74 26,84 33,84 C42,83 44,66 44,54 C44,46 46,42 48,36 Z", ear, tone=tone
    )
    shapes += _eyes(scene, 9.5, 54, 5.4)
    shapes.append(
        Shape(
            "muzzle",
            "M64,58 C76,58 81,68 80,76 C79,86 72,89 64,89 C56,89 49,86 48,76 C47,68 52,58 64,58 Z",
            muzzle,
            tone=light,
        )
    )
    if scene.expression == "smile":
        shapes.append(Shape("tongue", "M59,79 L69,79 L69,87 Q64,94 59,87 Z", "rose", tone=-0.12))
    shapes.append(Shape("nose", "M56,62 Q64,58 72,62 Q72,68 64,71 Q56,68 56,62 Z", "ink"))
    if scene.expression != "smile":
        return shapes + _mouth(scene, 78.5, 9, 2.6)
    return [*shapes, Shape("mouth", "M53,76 Q64,83.5 75,76", "ink", width=2.6)]


def _bear(scene: Scene) -> list[Shape]:
    x, y = (34, 36) if scene.headwear != "none" else (42, 36)
    muzzle, tone = _muzzle_color(scene)
    shapes = both("ears", ellipse(x, y, 11), scene.color, tone=-0.06)
    shapes += both("inner ears", ellipse(x, y, 6), muzzle, tone=tone)
    shapes.append(
        Shape(
            "head", "M64,31 C80,31 90,42 91,58 C92,76 80,85 64,85 C48,85 36,76 37,58 C38,42 48,31 64,31 Z", scene.color
        )
    )
    shapes += _eyes(scene, 10, 55.5, 4.8, 3.2)
    shapes.append(Shape("muzzle", ellipse(64, 71, 14, 11.5), muzzle, tone=tone))
    shapes.append(Shape("nose", ellipse(64, 64.5, 6.2, 4.4), "ink"))
    return shapes + _mouth(scene, 75, 7, 2.6)


def _rabbit(scene: Scene) -> list[Shape]:
    hat = scene.headwear != "none"
    x, y, turn = (34, 25, -24) if hat else (51, 26, -7)
    shapes = both("ears", ellipse(x, y, 8, 23 if hat else 17, turn), scene.color, tone=-0.04)
    shapes += both("inner ears", ellipse(x, y, 4, 16 if hat else 13, turn), "rose")
    shapes.append(
        Shape(
            "head",
            "M64,34 C80,34 87,44 88,58 C91,66 90,72 86,77 C80,84 72,85 64,85 C56,85 48,84 42,77 "
            "C38,72 37,66 40,58 C41,44 48,34 64,34 Z",
            scene.color,
        )
    )
    shapes += _eyes(scene, 10, 56.5, 5.2, 4)
    shapes += both("cheeks", ellipse(46, 69, 4.5, 3), "rose", opacity=0.6)
    shapes.append(Shape("nose", "M59.5,63.5 L68.5,63.5 L64,68.5 Z", "rose", tone=-0.2))
    shapes += _mouth(scene, 73, 7.5, 2.6)
    if scene.expression == "surprise":
        return shapes
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
    if scene.expression == "surprise":
        return shapes + _brows(scene, 10.5, 51.5, "glow") + _mouth(scene, 76, 11)
    bend = {"smile": 5, "neutral": 0, "frown": -5}[scene.expression]
    y = 76 - bend * 0.3
    side, middle = y - bend * 0.6, y + bend
    shapes.append(
        Shape(
            "mouth",
            f"M47,{side - 4.5} Q64,{middle - 4.5} 81,{side - 4.5} L81,{side + 4} Q64,{middle + 4} 47,{side + 4} Z",
            "ink",
        )
    )
    for x in (51.5, 57.7, 64, 70.3, 76.5):
        v = side + (middle - side) * 0.5 * (1 - ((x - 64) / 17) ** 2)
        shapes.append(Shape("grille", f"M{x},{v - 3.6:.1f} L{x},{v + 3.2:.1f}", "white", width=2.4))
    return shapes + _brows(scene, 10.5, 51.5, "glow")


def _alien(scene: Scene) -> list[Shape]:
    hat = scene.headwear != "none"
    stalk, x, y = ("M44,44 Q36,34 29,24", 28, 21) if hat else ("M52,36 Q48,26 43,19", 42, 16)
    shapes = both("antenna", stalk, scene.color, tone=-0.25, width=3.6)
    shapes += both("antenna", ellipse(x, y, 5.5), scene.color, tone=0.15)
    shapes.append(
        Shape(
            "head", "M64,30 C84,30 95,42 93,57 C91,71 75,88 64,88 C53,88 37,71 35,57 C33,42 44,30 64,30 Z", scene.color
        )
    )
    shapes += both("eyes", ellipse(51, 59, 9, 6.3, 32), "ink")
    shapes += both("glint", ellipse(48.5, 56.5, 2.3), "white")
    shapes += both("nose", ellipse(62.2, 70.5, 1, 1.6), "ink")
    return shapes + _mouth(scene, 77.5, 6.5, 2.6)


def _skeleton(scene: Scene) -> list[Shape]:
    shapes = [
        Shape(
            "head",
            "M64,29 C84,29 91,42 90,56 C90,64 86,67 82,70 L80,84 Q64,90 48,84 L46,70 "
            "C42,67 38,64 38,56 C37,42 44,29 64,29 Z",
            "white",
        )
    ]
    shapes += both("sockets", "M46,52 C48,48 58,48 60,53 C61,60 57,65 52,65 C46,65 44,58 46,52 Z", "ink")
    shapes.append(Shape("nose", "M64,62 L68.5,70 L64,68.6 L59.5,70 Z", "ink"))
    if scene.expression == "surprise":
        return shapes + _mouth(scene, 77, 8)
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
    shapes.append(
        Shape(
            "head",
            "M64,29 C82,29 90,40 90,58 L87,80 L81,77 L79,67 L68,65.5 L64,70 L60,65.5 L49,67 L47,77 "
            "L41,80 L38,58 C38,40 46,29 64,29 Z",
            scene.color,
        )
    )
    shapes += both("eyes", "M45,52 L60,57.5 L59,61 C54,63 47,60 45,52 Z", "white")
    return shapes + _mouth(scene, 78, 7.5, 2.8)


def _fox(scene: Scene) -> list[Shape]:
    hat = scene.headwear != "none"
    muzzle, tone = _muzzle_color(scene)
    ear = "M40,62 L22,18 L56,38 Z" if hat else "M39,58 L33,10 L60,35 Z"
    inner = "M38,50 L28,28 L48,39 Z" if hat else "M42,47 L38,21 L53,35 Z"
    shapes = both("ears", ear, scene.color, tone=-0.1) + both("inner ears", inner, "ink", opacity=0.75)
    shapes.append(
        Shape(
            "head",
            "M64,32 C82,32 90,42 92,54 L101,68 L88,73 C82,82 74,87 64,91 C54,87 46,82 40,73 "
            "L27,68 L36,54 C38,42 46,32 64,32 Z",
            scene.color,
        )
    )
    cheek = "M64,91 C54,87 46,82 40,73 L28,68 C42,62 56,62 61,70 C63,76 64,84 64,91 Z"
    shapes += both("muzzle", cheek, muzzle, tone=tone)
    shapes += _eyes(scene, 11, 56, 5, 3.4)
    shapes.append(Shape("nose", "M57.5,70 Q64,67 70.5,70 Q69,76 64,78 Q59,76 57.5,70 Z", "ink"))
    return shapes + _mouth(scene, 82, 6, 2.4)


def _owl(scene: Scene) -> list[Shape]:
    hat = scene.headwear != "none"
    disc, tone = _muzzle_color(scene)
    shapes = both("ears", "M42,56 L25,27 L56,40 Z" if hat else "M42,50 L34,17 L60,34 Z", scene.color, tone=-0.15)
    shapes.append(
        Shape(
            "head", "M64,30 C84,30 95,44 94,60 C93,78 80,88 64,88 C48,88 35,78 34,60 C33,44 44,30 64,30 Z", scene.color
        )
    )
    shapes += both("muzzle", ellipse(51.5, 58, 13.2, 14), disc, tone=tone)
    wide = 1.12 if scene.expression == "surprise" else 1.0
    shapes += both("eyes", ellipse(52, 57.5, 8 * wide), "yellow") + both("pupils", ellipse(52.4, 57.8, 4.4), "ink")
    shapes += _brows(scene, 12, 49.5)
    shapes.append(Shape("nose", "M58,66 Q64,62 70,66 L64,77 Z", "orange"))
    return shapes + _mouth(scene, 81, 5.5, 2.4)


def _astronaut(scene: Scene) -> list[Shape]:
    skin = ("light", "tan", "brown")[scene.seed % 3]
    shapes = both("bolts", box(27, 49, 37, 68, 3), scene.color, tone=-0.3)
    shapes.append(Shape("head", ellipse(64, 57, 32, 31), scene.color))
    shapes.append(Shape("visor", ellipse(64, 60, 25, 23), "ink"))
    shapes.append(Shape("jaw", ellipse(64, 62, 20.5, 20), skin))
    shapes += _eyes(scene, 9, 58, 5, 3.2)
    shapes.append(Shape("nose", "M64,61 Q67.5,67 63,67", skin, tone=-0.35, width=2.4))
    return shapes + _mouth(scene, 73, 6.5, 2.6)


_FACES = {
    "man": _person,
    "woman": _person,
    "cat": _cat,
    "dog": _dog,
    "bear": _bear,
    "rabbit": _rabbit,
    "fox": _fox,
    "owl": _owl,
    "robot": _robot,
    "alien": _alien,
    "skeleton": _skeleton,
    "hero": _hero,
    "astronaut": _astronaut,
}


def face(scene: Scene) -> list[Shape]:
    """The head without what it wears, from back to front."""
    return _FACES[scene.subject](scene)

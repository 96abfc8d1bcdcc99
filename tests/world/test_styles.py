"""The drawn world: every scene can be drawn in every style, always the same, and each style looks like itself."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import numpy as np
import pytest

from helpers.world.captions import prompt
from helpers.world.drawing import face_parts, shapes_of
from helpers.world.paint import tint
from helpers.world.paths import CANVAS, along, ellipse, map_points, mirror, wobble
from helpers.world.scenes import (
    BACKDROPS,
    BADGES,
    EXPRESSIONS,
    EYEWEAR,
    HAIR_COLORS,
    HEADWEAR,
    NECKWEAR,
    PROPS,
    STYLES,
    SUBJECT_COLORS,
    SUBJECTS,
    Scene,
    another_take,
    sample_scene,
)
from helpers.world.styles import render, to_svg

PLAIN = Scene(
    subject="bear", color="brown", hair="none", headwear="none", headwear_color="none", eyewear="none",
    neckwear="none", neckwear_color="none", badge="none", clothes_color="blue", background="green",
    expression="neutral", seed=5,
)  # fmt: skip


def pixels(scene: Scene, style: str, size: int = 64) -> np.ndarray:
    return np.asarray(render(scene, style, size), dtype=np.float32)


def scene_of(subject: str, **changes) -> Scene:
    hair = HAIR_COLORS[1] if subject in ("man", "woman") else "none"
    return replace(PLAIN, subject=subject, color=SUBJECT_COLORS[subject][0], hair=hair, **changes)


def scenes(n: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, "all") for _ in range(n)]


@pytest.mark.parametrize("style", STYLES)
def test_every_subject_and_headwear_renders_and_the_hat_shows(style):
    for subject in SUBJECTS:
        bare = pixels(scene_of(subject), style)
        assert bare.shape == (64, 64, 3)
        for headwear in HEADWEAR[1:]:
            hatted = pixels(scene_of(subject, headwear=headwear, headwear_color="red"), style)
            changed = np.abs(hatted - bare).max(axis=2) > 30
            assert changed[:40].mean() > 0.06, (subject, headwear)  # the upper 40 of 64 rows
            assert changed[:40].sum() > 0.7 * changed.sum(), (subject, headwear)


@pytest.mark.parametrize("style", STYLES)
def test_a_scene_is_always_drawn_with_the_same_pixels(style):
    for scene in scenes(3):
        assert to_svg(scene, style) == to_svg(scene, style)
        assert render(scene, style).tobytes() == render(scene, style).tobytes()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "change",
    [{"eyewear": e} for e in EYEWEAR[1:]]
    + [{"neckwear": n, "neckwear_color": "yellow"} for n in NECKWEAR[1:]]
    + [{"badge": BADGES[1]}]
    + [{"expression": e} for e in ("smile", "frown", "surprise")]
    + [{"backdrop": b} for b in BACKDROPS[2:]]
    + [{"prop": p, "prop_color": "yellow"} for p in PROPS[1:]],
    ids=lambda change: "-".join(change.values()),
)
def test_every_attribute_changes_pixels_in_every_style(style, change):
    changed = np.abs(pixels(replace(PLAIN, **change), style) - pixels(PLAIN, style)).max(axis=2) > 25
    assert changed.sum() >= 8


def test_pictures_of_all_attributes_differ_from_each_other():
    subjects = [scene_of(subject) for subject in SUBJECTS]
    moods = [replace(PLAIN, expression=expression) for expression in EXPRESSIONS]
    for variants in (subjects, moods):
        assert len({render(scene, "flat").tobytes() for scene in variants}) == len(variants)


@pytest.mark.parametrize("size", [1, 32, 64, 100])
def test_any_size(size):
    picture = render(PLAIN, "vintage", size)
    assert picture.size == (size, size) and picture.mode == "RGB"


def test_unknown_style_and_size_are_refused_in_words():
    with pytest.raises(ValueError, match="unknown style 'oil'; known: render, flat"):
        render(PLAIN, "oil")
    with pytest.raises(ValueError, match="positive number of pixels"):
        render(PLAIN, "flat", 0)


# ------------------------------------------------------------------------------------------- each style's own marks


def share_dark(picture: np.ndarray, below: float = 90) -> float:
    return float((picture.mean(axis=2) < below).mean())


def test_sketch_has_no_colours_and_lies_on_light_paper():
    for scene in scenes(6):
        picture = pixels(scene, "sketch")
        assert (picture.max(axis=2) - picture.min(axis=2)).max() <= 6
        assert np.median(picture[:6, :6]) > (235 if scene.backdrop in ("plain", "gradient") else 150)
        assert 0.02 < share_dark(picture) < 0.35


def test_doodles_have_dark_outlines_on_pastels():
    scene = replace(PLAIN, clothes_color="yellow", color="white")
    doodle, flat = pixels(scene, "doodles"), pixels(scene, "flat")
    assert share_dark(doodle) > share_dark(flat) + 0.05
    assert doodle[2:6, 2:6].mean() > flat[2:6, 2:6].mean() + 15  # the background is paler
    widths = [float(w) for w in re.findall(r'stroke-width="([\d.]+)"', to_svg(scene, "doodles"))]
    assert 2.8 <= max(widths) <= 4


def test_vintage_is_brown_on_a_paper_border_with_a_caption_bar():
    for scene in scenes(6, seed=1):
        picture = pixels(scene, "vintage")
        border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert np.ptp(border, axis=0).max() <= 40  # a stain and a fold, no more
        red, green, blue = border.mean(axis=0)
        assert red > green > blue > 150
        bar = picture[56:61, 6:58].mean(axis=2)
        assert 0.2 < (bar < 130).mean() < 0.85  # dark letters on paper
        assert (picture[..., 0] - picture[..., 2]).mean() > 20


def test_vintage_colours_are_faded():
    def colourfulness(style, rows):  # of the blue clothes
        torso = np.median(pixels(PLAIN, style)[rows, 26:38], axis=(0, 1))
        return torso.max() - torso.min()

    assert colourfulness("flat", slice(56, 62)) > 100
    assert colourfulness("vintage", slice(48, 52)) < 0.6 * colourfulness("flat", slice(56, 62))


def test_pixel_art_is_made_of_even_blocks_of_few_colours():
    picture = render(PLAIN, "pixel", 64)
    cells = np.asarray(picture).reshape(32, 2, 32, 2, 3)
    assert (cells == cells[:, :1, :, :1]).all()
    assert 8 <= len(picture.getcolors()) <= 24


def test_blueprint_is_blue_and_chalkboard_dark_green():
    for scene in scenes(4, seed=2):
        red, green, blue = pixels(scene, "blueprint").mean(axis=(0, 1))
        assert blue > green + 20 > red + 20
        board = pixels(replace(scene, backdrop="plain"), "chalkboard")
        red, green, blue = np.median(board[5:12, 5:59], axis=(0, 1))
        assert green > max(red, blue) and green < 140


def test_styles_are_far_apart_on_average():
    means = {}
    for style in STYLES:
        means[style] = np.stack([pixels(scene, style, 32) for scene in scenes(8, seed=3)])
    for i, a in enumerate(STYLES):
        for b in STYLES[i + 1 :]:
            assert np.abs(means[a] - means[b]).mean() > 8, (a, b)


# ------------------------------------------------------------------------------------------------------- geometry


def test_pose_moves_the_whole_picture_and_tilt_only_the_head():
    def middle(scene, role):
        path = next(s.path for s in shapes_of(scene) if s.role == role)
        points = np.array(re.findall(r"(-?[\d.]+),(-?[\d.]+)", path), dtype=float)
        return points.mean(axis=0)

    for role in ("body", "head"):
        shift = middle(replace(PLAIN, dx=0.05, dy=-0.03), role) - middle(PLAIN, role)
        np.testing.assert_allclose(shift, [0.05 * CANVAS, -0.03 * CANVAS], atol=0.1)
    tilted = replace(PLAIN, tilt=7)
    assert middle(tilted, "head")[0] > middle(PLAIN, "head")[0] + 2
    np.testing.assert_allclose(middle(tilted, "body"), middle(PLAIN, "body"))
    eyes = [s for s in shapes_of(replace(PLAIN, zoom=1.08)) if s.role == "eyes"]
    assert len(eyes) == 2


def test_a_turned_head_looks_that_way_and_keeps_its_outline():
    for angle in (-20, 20):
        parts = {kind: x for kind, x, _ in face_parts(replace(PLAIN, angle=angle))}
        assert np.sign(parts["mouth"] - 64) == np.sign(angle) and abs(parts["mouth"] - 64) > 4
    heads = [next(s.path for s in shapes_of(replace(PLAIN, angle=a)) if s.role == "head") for a in (0, 20)]
    assert heads[0] == heads[1]


def test_face_parts_lie_on_their_own_ink():
    """Two eyes, or the lenses before them, and one mouth below; the eyes do not have the colour of the head."""
    for scene in scenes(40, seed=7):
        (one, x0, y0), (other, x1, y1), (mouth, _, y) = face_parts(scene)
        assert one == other == ("lens" if scene.eyewear == "sunglasses" else "eye") and mouth == "mouth"
        assert abs(x0 - x1) > 8 and y > (y0 + y1) / 2 + 5
        bare = replace(scene, eyewear="none" if scene.eyewear == "glasses" else scene.eyewear)
        picture = np.asarray(render(bare, "flat", 128), dtype=np.float32)
        head = next(s for s in shapes_of(scene) if s.role == "head")
        for u, v in ((x0, y0), (x1, y1)):
            assert np.abs(picture[round(v), round(u)] - tint(head)).max() > 15, scene


def test_a_mouth_s_middle_is_of_its_curve_and_not_of_the_curve_s_control_points():
    # Q64,86 pulls the lower lip to 78 = (70 + 2 * 86 + 70) / 4 and not to 86
    assert along("M55,70 Q64,86 73,70")[0] == (55, 70) and max(y for _, y in along("M55,70 Q64,86 73,70")) == 78
    for expression in ("smile", "surprise"):  # filled: the middle is ink in every pose
        for scene in scenes(20, seed=9):
            if scene.subject in ("dog", "rabbit", "robot", "skeleton"):  # a tongue, teeth or a grille lie there
                continue
            scene = replace(scene, expression=expression, prop="none")
            (_, x, y), paint = face_parts(scene)[-1], next(s for s in shapes_of(scene) if s.role == "mouth")
            picture = np.asarray(render(scene, "flat", 256), dtype=np.float32)
            assert np.abs(picture[round(2 * y), round(2 * x)] - tint(paint)).max() < 8, scene


def test_another_take_is_the_same_portrait_in_another_pose():
    rng = random.Random(5)
    for scene in scenes(30, seed=8):
        again = another_take(scene, rng)
        assert prompt(again) == prompt(scene) and (again.tilt, again.dx, again.seed) != (
            scene.tilt,
            scene.dx,
            scene.seed,
        )
        if scene.badge != "none" or scene.prop != "none":
            assert again.framing != "close"  # the star or the hand would be cut off


def test_the_hat_stays_in_the_frame_at_the_largest_zoom():
    for headwear in HEADWEAR[1:]:
        scene = replace(PLAIN, headwear=headwear, headwear_color="red", zoom=1.08)
        heights = [
            float(y)
            for s in shapes_of(scene)
            if s.role == "hat crown"
            for _, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", s.path)
        ]
        assert -2 < min(heights) < 16, headwear  # a control point lies up to 2.2 units above its curve


def test_mirror_is_its_own_inverse_and_an_ellipse_has_its_axes():
    path = ellipse(40, 50, 8, 5, turn=20)
    numbers = [np.array(re.findall(r"-?[\d.]+", p), dtype=float) for p in (path, mirror(mirror(path)))]
    np.testing.assert_allclose(*numbers, atol=0.11)
    points = []
    map_points(ellipse(40, 50, 8, 5), lambda x, y: points.append((x, y)) or (x, y))
    np.testing.assert_allclose([np.min(points, axis=0), np.max(points, axis=0)], [[32, 45], [48, 55]])


def test_wobble_follows_the_seed_and_stays_small():
    def walk(seed):
        move = wobble(seed, 2.0)
        return np.array([move(x, 60.0) for x in range(0, 128, 4)])

    straight = np.array([(x, 60.0) for x in range(0, 128, 4)])
    assert (walk(1) == walk(1)).all() and not (walk(1) == walk(2)).all()
    assert 0.2 < np.abs(walk(1) - straight).mean() < 3
    assert to_svg(PLAIN, "doodles") != to_svg(replace(PLAIN, seed=6), "doodles")
    assert to_svg(PLAIN, "flat") == to_svg(replace(PLAIN, seed=6), "flat")

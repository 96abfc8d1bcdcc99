"""The map of the face: marks lie on eyes and mouths, peaks are read back, and a ruined part is not asked for."""

import random

import numpy as np
import pytest
import torch

from helpers.evaluation.classifier import PARTS, Classifier
from helpers.evaluation.faces import complete, find_parts, heat, is_complete, peaks, positions
from helpers.minisd.ruin import ruin, windows
from helpers.world.scenes import STYLES, sample_scene
from helpers.world.styles import render

EYES = [(0.4, 0.45), (0.6, 0.45)]
FACE = {"eye": EYES, "lens": [], "mouth": [(0.5, 0.6)]}


def scenes(n):
    return [sample_scene(random.Random(k)) for k in range(n)]


def test_peaks_of_a_drawn_map_are_the_parts():
    some = [scene for scene in scenes(60) if scene.framing != "close"][:40]
    parts = positions(some, [STYLES[k % len(STYLES)] for k in range(len(some))])
    for row, maps in zip(parts, heat(parts), strict=True):
        for kind in range(len(PARTS)):
            wanted = sorted((x, y) for k, x, y in row.tolist() if k == kind)
            np.testing.assert_allclose(sorted(peaks(maps[kind])), wanted, atol=0.5 / 32 + 1e-6)


def test_a_missing_part_leaves_no_mark():
    parts = positions(scenes(2), ["flat", "vintage"])
    parts[0, 2, 0] = -1
    mouth = PARTS.index("mouth")
    assert heat(parts)[0, mouth].max() == 0 and heat(parts)[1, mouth].max() > 0.7


@pytest.mark.parametrize(
    "change",
    [
        {"eye": EYES[:1]},
        {"eye": [*EYES, (0.5, 0.3)]},
        {"mouth": []},
        {"mouth": [(0.5, 0.6), (0.5, 0.8)]},
        {"mouth": [(0.5, 0.3)]},
        {"mouth": [(0.95, 0.6)]},
        {"eye": [(0.5, 0.45), (0.5, 0.35)]},
    ],
    ids=["one eye", "three eyes", "no mouth", "two mouths", "mouth above", "mouth aside", "eyes on one line"],
)
def test_what_is_no_complete_face(change):
    assert is_complete(FACE)
    assert not is_complete(FACE | change)


def test_sunglasses_ask_for_lenses():
    assert not is_complete(FACE, "lens") and is_complete(FACE | {"eye": [], "lens": EYES}, "lens")


def test_finding_parts_takes_pictures_of_any_size_and_refuses_none():
    judge, scene = Classifier().eval(), scenes(1)[0]
    found = find_parts([render(scene, "flat", 64), render(scene, "flat", 128)], judge)
    assert len(found) == 2 and set(found[0]) == set(PARTS)
    assert len(complete([render(scene, "flat", 128)], [scene], judge)) == 1
    with pytest.raises(ValueError, match="no pictures"):
        find_parts([], judge)


def test_ruin_changes_the_part_it_removes_and_nothing_far_from_it():
    some = [scene for scene in scenes(80) if scene.framing == "normal"][:48]
    parts = positions(some, ["flat"] * len(some))
    x = torch.stack([torch.from_numpy(np.array(render(s, "flat", 128))) for s in some])
    x = x.permute(0, 3, 1, 2).float() / 127.5 - 1
    y, left = ruin(x, parts, torch.Generator().manual_seed(0))
    lost = left[..., 0] < 0
    assert 0.25 < lost.any(1).float().mean() < 0.75 and lost.sum(1).max() == 1
    assert (left[..., 1:] == parts[..., 1:]).all() and (left[~lost] == parts[~lost]).all()
    for picture, other, row, gone in zip(x, y, parts, lost, strict=True):
        for (_, u, v), ruined in zip(row.tolist(), gone.tolist(), strict=True):
            near = windows(x[:1], torch.tensor([[u, v]]), torch.tensor([0.05]))[0, 0] > 0
            changed = (picture - other).abs().mean(0)[near].mean()
            assert changed > 0.02 if ruined else True
    for picture, other, row, gone in zip(x, y, parts, lost, strict=True):
        if gone.any():
            far = windows(x[:1], row[gone][:, 1:], torch.tensor([0.12]))[0, 0] == 0
            assert torch.equal(picture[:, far], other[:, far])

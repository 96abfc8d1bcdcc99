"""Measures of what the eye sees, on pictures whose truth is known."""

import random

import numpy as np
import pytest
from PIL import ImageFilter

from helpers.evaluation.imagenet import ImageNetEncoder
from helpers.evaluation.sight import fidelity_to_drawings, seed_diversity, takes, through_vae
from helpers.world.captions import prompt
from helpers.world.scenes import sample_scene
from tests.tiny import tiny_minisd

SCENES = [sample_scene(random.Random(k)) for k in range(12)]


@pytest.fixture(scope="module")
def encoder():
    return ImageNetEncoder()


def test_takes_repeat_and_differ_by_purpose():
    one, again, other = (takes(SCENES[:3], "flat", 48, purpose) for purpose in ("a", "a", "b"))
    assert [p.tobytes() for p in one] == [p.tobytes() for p in again] != [p.tobytes() for p in other]


def test_worse_pictures_are_farther_from_drawings(encoder, monkeypatch):
    components = tiny_minisd()
    blur = lambda pictures, radius: [p.filter(ImageFilter.GaussianBlur(radius)) for p in pictures]  # noqa: E731
    monkeypatch.setattr("helpers.evaluation.sight.through_vae", lambda _, pictures: blur(pictures, 1))
    monkeypatch.setattr(components, "resolution", 96)
    near, far = (
        fidelity_to_drawings(components, SCENES, blur(takes(SCENES, "flat", 96, "made"), radius), "flat", encoder).value
        for radius in (1, 3)
    )
    assert near < far / 2


def test_pictures_through_the_vae_keep_their_size():
    components = tiny_minisd()
    pictures = takes(SCENES[:2], "flat", components.resolution, "a")
    decoded = through_vae(components, pictures)
    assert [p.size for p in decoded] == [p.size for p in pictures]
    assert np.abs(np.asarray(decoded[0], float) - np.asarray(pictures[0], float)).mean() > 1  # random weights


def test_seeds_of_a_model_are_compared_with_the_renderers(encoder, monkeypatch):
    components = tiny_minisd()
    drawn = {prompt(scene): scene for scene in SCENES}

    def renderer(_, prompts, seeds):
        pairs = zip(prompts, seeds, strict=True)
        return [takes([drawn[text]], "render", components.resolution, f"seed {seed}")[0] for text, seed in pairs]

    monkeypatch.setattr("helpers.evaluation.sight.generate", renderer)
    assert seed_diversity(components, SCENES[:3], None, encoder, range(3)).value == pytest.approx(1)
    monkeypatch.setattr("helpers.evaluation.sight.generate", lambda c, p, s: renderer(c, p, [0] * len(s)))
    assert seed_diversity(components, SCENES[:3], None, encoder, range(3)).value == pytest.approx(0, abs=1e-6)

"""The committed runs are what they claim to be: they replay, they resume, and their pictures can be drawn again.

Tolerances allow for another processor's order of summation; on the machine that made the runs all differences are 0.
"""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import lora
from helpers.adapters import loading
from helpers.diffusion.components import load_components
from helpers.diffusion.pictures import to_pictures, to_pil
from helpers.diffusion.sampling import sample
from helpers.presets.variants import get_preset
from helpers.training.loop import replay, resume_from
from helpers.training.runs import REFERENCE, find_run, is_finished, run_key

PRESET = get_preset("mini")
LOSS_TOLERANCE = 2e-3  # relative, of each of the first 50 losses
UPDATE_TOLERANCE = 5e-2  # ||adapter - committed|| / ||committed - checkpoint||: of what the last 50 steps changed
PIXEL_TOLERANCE = 2.0  # mean absolute difference in gray levels of 255


@pytest.fixture(scope="module")
def components():
    return load_components(PRESET, "cpu")


@pytest.fixture(params=["doodles", "vintage"])
def reference(request, monkeypatch, tmp_path):
    """The committed run of a dataset, with an empty runs folder beside it."""
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    run = find_run(PRESET, request.param, run_key(PRESET, request.param))
    assert run is not None, (
        f"no committed run of {request.param} fits this code, weights and data: "
        "course train --dataset doodles --from-scratch --export-reference (and vintage)"
    )
    assert run.source == "reference"
    return run


def test_nothing_stale_is_kept():
    """One run per dataset, each with the key of today's code, weights and data."""
    wanted = {f"{name}-{run_key(PRESET, name)}" for name in PRESET.datasets.names}
    assert {path.name for path in REFERENCE.iterdir() if path.is_dir()} == wanted


def test_first_steps_replay(reference):
    recorded = [line["loss"] for line in reference.metrics()[:50]]
    again = [line["loss"] for line in replay(reference, 50, PRESET, device="cpu")]
    assert len(again) == 50
    np.testing.assert_allclose(again, recorded, rtol=LOSS_TOLERANCE)


def test_last_steps_resume_to_the_committed_adapter(reference, tmp_path):
    assert reference.checkpoints() == [PRESET.train.steps - PRESET.train.checkpoint_every]
    again = resume_from(reference, tmp_path / "again", PRESET, device="cpu")
    new, old = load_file(again.adapter), load_file(reference.adapter)
    assert new.keys() == old.keys()
    difference = torch.sqrt(sum((new[k] - old[k]).pow(2).sum() for k in old))
    # The last steps are small, so they are compared with what they changed: doing nothing is 100% wrong
    start = load_file(reference.checkpoint_dir(reference.checkpoints()[-1]) / "adapter.safetensors")
    update = torch.sqrt(sum((old[k] - start[k]).pow(2).sum() for k in old))
    assert update > 0 and float(difference / update) <= UPDATE_TOLERANCE


def test_validation_pictures_regenerate(reference, components):
    """Four pictures a run, the last validation's: eight in all."""
    step = reference.validations()[-1][0]
    assert step == PRESET.train.steps
    prompts = list(PRESET.validation_prompts[reference.dataset])
    loading.load_adapter(reference.adapter, components.unet)
    try:
        latents = sample(
            components,
            prompts,
            reference.initial_latents(),
            num_inference_steps=PRESET.num_inference_steps,
            guidance_scale=PRESET.guidance_scale,
        )
    finally:
        lora.remove(components.unet)
    drawn, kept = to_pil(to_pictures(components, latents)), reference.validation_pictures(step)
    assert len(drawn) == len(kept) == len(prompts)
    for new, old in zip(drawn, kept, strict=True):
        difference = np.abs(np.asarray(new.resize(old.size), dtype=float) - np.asarray(old, dtype=float)).mean()
        assert difference <= PIXEL_TOLERANCE


def test_a_changed_adapter_does_not_pass(reference, tmp_path):
    """The record of a run names its adapter by hash: other numbers under the same name are not a finished run."""
    other = tmp_path / "run"
    shutil.copytree(reference.dir, other)
    assert is_finished(other)
    tensors = load_file(reference.adapter)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1e-3}, other / "adapter" / reference.adapter.name)
    assert not is_finished(other)

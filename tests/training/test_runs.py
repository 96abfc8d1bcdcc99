"""Run directories: found by key, exported as references, resumed elsewhere."""

import ast
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from training_tools import STEPS, make_preset, quiet, same_tensors, weights, write_pictures

from helpers.base import provenance
from helpers.base.paths import ROOT
from helpers.presets.variants import get_preset
from helpers.training import runs
from helpers.training.loop import replay, resume_from
from helpers.training.runs import Run, TrainingError, export_reference, is_finished, run_config, run_key


def test_own_run_then_reference_then_training(preset, tiny, world, finished):
    assert quiet(preset, tiny) == finished
    reference = export_reference(finished)
    assert reference == world / "reference" / finished.dir.name
    assert quiet(preset, tiny).source == "found in runs", "our own run comes first"
    shutil.rmtree(finished.dir)
    found = quiet(preset, tiny)
    assert (found.source, found.dir) == ("reference", reference)
    assert found.metrics() and found.validation_pictures(10) and found.hashes["adapter"]
    assert quiet(preset, tiny, from_scratch=True).source == "trained now"
    assert quiet(preset, tiny, from_scratch=True).source == "found in runs"


def test_force_trains_a_finished_run_again(preset, tiny, whole, finished):
    trained_steps = []
    again = quiet(preset, tiny, force=True, on_log=lambda step, metrics: trained_steps.append(step))
    assert trained_steps == list(range(STEPS)) and again.source == "trained now" and again.dir == finished.dir
    assert same_tensors(weights(again), weights(whole))


def test_a_damaged_run_is_not_taken_for_finished(preset, tiny, whole, finished):
    finished.adapter.write_bytes(finished.adapter.read_bytes()[:-4])
    repaired = quiet(preset, tiny)
    assert repaired.source == "trained now" and same_tensors(weights(repaired), weights(whole))
    (finished.dir / "done.json").write_text("{")
    assert quiet(preset, tiny).source == "trained now"


def test_a_reference_run_resumes_and_replays(preset, tiny, world, whole):
    run = whole
    folder = export_reference(run)
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter", "checkpoints", "config.json", "done.json", "initial_latents.safetensors", "metrics.jsonl",
        "validation",
    ]  # fmt: skip
    reference = Run(folder, preset.name, "own", run.key, "reference")
    assert reference.checkpoints() == [whole.checkpoints()[-2]] and is_finished(folder)
    resumed = resume_from(reference, world / "resumed", preset, tiny)
    assert same_tensors(weights(resumed), weights(run)) and resumed.metrics() == run.metrics()
    assert torch.equal(resumed.validation_latents(10), run.validation_latents(10))
    assert [m["loss"] for m in replay(reference, 4, preset, tiny)] == [m["loss"] for m in run.metrics()[:4]]
    assert reference.metrics() == run.metrics(), "resuming and replaying write nothing into the reference"


def test_with_other_settings_nothing_resumes_or_replays(whole, tiny, world, pictures):
    other = make_preset(pictures, rank=3, seed=1)
    for call in (lambda: resume_from(whole, world / "again", other, tiny), lambda: replay(whole, 1, other, tiny)):
        with pytest.raises(TrainingError, match="was trained with other settings: rank, seed"):
            call()
    assert not (world / "again").exists()


def test_only_finished_runs_become_references(finished):
    (finished.dir / "done.json").unlink()
    with pytest.raises(TrainingError, match="not finished"):
        export_reference(finished)


def test_the_key_follows_configuration_code_weights_and_data(world, tiny, monkeypatch):
    pictures = world / "pictures"
    write_pictures(pictures)
    preset = make_preset(pictures)
    key = run_key(preset, "own", tiny)
    assert key == run_key(make_preset(pictures), "own", tiny) and len(key) == 12
    changes = [{"seed": 1}, {"rank": 3}, {"steps": 11}, {"num_inference_steps": 3}, {"guidance_scale": 1.0}]
    keys = {run_key(make_preset(pictures, **change), "own", tiny) for change in changes} | {key}
    assert len(keys) == len(changes) + 1

    weight = tiny.unet.conv_in.weight
    weight.data[0, 0, 0, 0] += 1
    assert run_key(preset, "own", tiny) != key
    weight.data[0, 0, 0, 0] -= 1

    caption = pictures / "00.txt"
    text = caption.read_text()
    caption.write_text("another")
    assert run_key(preset, "own", tiny) != key
    caption.write_text(text)
    assert run_key(preset, "own", tiny) == key

    monkeypatch.setattr(provenance, "code_hash", lambda *modules: "other code")
    assert run_key(preset, "own", tiny) != key


# What the loop imports besides, and a run's numbers do not depend on, or are told of by other parts of its key.
ONLY_FILES = {
    *("helpers.training.runs", "helpers.training.guards", "helpers.training.progress", "helpers.training.tracking"),
    *("helpers.base", "helpers.presets", "helpers.adapters", "helpers.lora.lowrank"),  # settings, and files
    *("helpers.world", "helpers.data.fingerprint", "helpers.diffusion.weights"),  # in the hashes of data and weights
}


def imports_of(name: str) -> set[str]:
    """Modules of helpers that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(Path(importlib.util.find_spec(name).origin).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("helpers"):
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                found.add(name if is_module(name) else name.rpartition(".")[0])
    return found


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_every_module_a_result_depends_on_is_in_the_key():
    """All that the loop imports, directly or not, except what only files a run."""
    reached, ahead = set(), {"helpers.training.loop"}
    while ahead:
        name = ahead.pop()
        reached.add(name)
        found = {package_contents(found) for found in imports_of(name)}
        ahead |= {one for names in found for one in names if not is_filing(one)} - reached
    assert reached == set(runs.CODE)


def package_contents(name: str) -> tuple[str, ...]:
    """A module, or what a room's `__init__` imports."""
    spec = importlib.util.find_spec(name)
    return tuple(sorted(imports_of(name))) if spec.submodule_search_locations else (name,)


def is_filing(name: str) -> bool:
    if name in runs.CODE:
        return False
    return any(name == one or name.startswith(f"{one}.") for one in ONLY_FILES)


def test_the_configuration_names_no_folder_of_the_preset(preset, tiny):
    config = run_config(get_preset("smoke", resolution=16), "doodles", tiny)
    assert str(ROOT) not in json.dumps(config)

"""One process, two processes, or one that cuts its batches into parts: the same numbers but for rounding.

Two processes are started with torchrun, as `accelerate launch --cpu --num_processes 2` silently runs one.
"""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import tiny_minisd
from training_tools import STEPS, distance, make_preset, quiet, temporary_files, weights

from helpers import lora
from helpers.base.paths import ROOT
from helpers.presets.configuration import TEXT_ATTENTION, TrainConfig
from helpers.training import steps
from helpers.training.draws import StepDraw, draw_step
from helpers.training.runs import Run
from helpers.training.steps import injected, new_accelerator, training_step

TOLERANCE = 1e-3  # ||difference|| / ||what training changed||

# Each process trains the runs whose settings the file names, and says afterwards who it was.
SCRIPT = """
import json, sys
sys.path[:0] = [ROOT, TESTS]
import torch
torch.set_num_threads(1)
from pathlib import Path
from accelerate import PartialState
from tiny import tiny_minisd
from training_tools import Stop, make_preset, quiet, stop_at

pictures, out, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
found = []
for own in settings:
    stopped = own.pop("stopped", None)
    log = []
    if stopped is not None:  # every process stops there, as when torchrun is killed
        import helpers.training.loop
        original = helpers.training.loop.training_step
        def stopping(components, optimizer, draw, config, step, accelerator):
            if step == stopped:
                raise Stop
            return original(components, optimizer, draw, config, step, accelerator)
        helpers.training.loop.training_step = stopping
        try:
            quiet(make_preset(pictures, **own), tiny_minisd())
        except Stop:
            pass
        helpers.training.loop.training_step = original
    run = quiet(make_preset(pictures, **own), tiny_minisd(), on_log=lambda step, metrics: log.append(step))
    found.append({"dir": str(run.dir), "key": run.key, "logged": log})
state = PartialState()
who = {"rank": state.process_index, "of": state.num_processes, "type": state.distributed_type.value, "runs": found}
(out / f"rank-{state.process_index}.json").write_text(json.dumps(who))
torch.distributed.destroy_process_group()
"""
RUNS = {
    "a last batch of 2": {},  # batches of 4, 4 and 2: even shares
    "batches of 3": {"batch_size": 3},  # 3, 3, 3 and 1: shares of 2 and 1, of 1 and none
    "dropout": {"lora_dropout": 0.2, "steps": 4, "validation_epochs": 1000, "held_out_eval": 0},
    "stopped": {"seed": 1, "stopped": 3, "steps": 4, "validation_epochs": 1000, "held_out_eval": 0},
}


@pytest.fixture(scope="module")
def two(pictures, tmp_path_factory):
    """What two processes left: {"ranks": what each said of itself, name of a run: Run}."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "script.py"
    script.write_text(f"ROOT, TESTS = {str(ROOT)!r}, {str(ROOT / 'tests')!r}\n{SCRIPT}", encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, script, pictures, folder, json.dumps(list(RUNS.values()))]
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "COURSE_RUNS": str(folder / "runs")}
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    done = subprocess.run(list(map(str, command)), env=inherited | own, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
    runs = [Run(folder / "runs" / "smoke" / f"own-{r['key']}", "smoke", "own", r["key"]) for r in ranks[0]["runs"]]
    return {"ranks": ranks, "folder": folder} | dict(zip(RUNS, runs, strict=True))


def start(config, components) -> dict:
    """The LoRA matrices before the first step, by the names of an adapter's file."""
    with injected(components, config, new_accelerator(config, "cpu")):
        return {f"unet.{name}": t.clone() for name, t in lora.lora_state_dict(components.unet).items()}


def relative_difference(ours: dict, theirs: dict, config, components) -> float:
    """||ours - theirs|| / ||ours - start||, of all LoRA matrices together.

    Without two of them: the tiny U-Net's middle is one latent pixel, so that the gradient of its self-attention's query
    and key is 0, or on some processors a rounding error, of which AdamW makes steps of full length.
    """
    before = start(config, components)
    middle = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_"
    kept = [name for name in before if not name.startswith((middle + "q", middle + "k"))]
    assert before.keys() == ours.keys() == theirs.keys() and len(kept) == len(before) - 4
    ours, theirs, before = ({name: state[name] for name in kept} for state in (ours, theirs, before))
    return distance(ours, theirs) / distance(ours, before)


def test_there_were_two_processes(two):
    assert [(rank["rank"], rank["of"]) for rank in two["ranks"]] == [(0, 2), (1, 2)]
    assert {rank["type"] for rank in two["ranks"]} == {"MULTI_CPU"}


@pytest.mark.parametrize("name", ["a last batch of 2", "batches of 3"])
def test_two_processes_train_the_run_of_one(name, two, whole, world, pictures, tiny):
    preset, theirs = make_preset(pictures, **RUNS[name]), two[name]
    ours = quiet(preset, tiny) if RUNS[name] else whole
    assert relative_difference(weights(ours), weights(theirs), preset.train, tiny) <= TOLERANCE
    for mine, other in zip(ours.metrics(), theirs.metrics(), strict=True):
        assert mine.keys() == other.keys()
        for key in mine:
            assert other[key] == pytest.approx(mine[key], rel=1e-4), (key, mine["step"])
    assert theirs.validations() == ours.validations() and theirs.best_step() == ours.best_step()
    for mine, other in zip(ours.validation_metrics(), theirs.validation_metrics(), strict=True):
        assert other["held_out_loss"] == pytest.approx(mine["held_out_loss"], rel=1e-4)
        difference = ours.validation_latents(mine["step"]) - theirs.validation_latents(mine["step"])
        assert difference.abs().max() < 1e-3
    assert torch.equal(ours.initial_latents(), theirs.initial_latents())


@pytest.mark.parametrize("name", ["a last batch of 2", "batches of 3"])
def test_one_process_writes(name, two, whole):
    run = two[name]
    assert [line["step"] for line in run.metrics()] == list(range(STEPS)), "one line a step"
    assert not temporary_files(run.dir)
    files = {path.relative_to(run.dir).parts[0] for path in run.dir.rglob("*")}
    assert files == {path.relative_to(whole.dir).parts[0] for path in whole.dir.rglob("*")}
    number = list(RUNS).index(name)
    logged = [rank["runs"][number]["logged"] for rank in two["ranks"]]
    assert logged == [list(range(STEPS)), []], "on_log is called in the process that writes"
    assert len(list((two["folder"] / "runs" / "smoke").iterdir())) == len(RUNS)


def test_dropout_masks_belong_to_the_part_and_not_to_the_process(two, world, pictures, tiny):
    """Two processes of one part each, and one process of two parts, drop the same inputs."""
    halves = make_preset(pictures, **RUNS["dropout"], gradient_accumulation_steps=2)
    ours, theirs = quiet(halves, tiny), two["dropout"]
    assert relative_difference(weights(ours), weights(theirs), halves.train, tiny) <= TOLERANCE
    in_one = quiet(make_preset(pictures, **RUNS["dropout"]), tiny)
    assert relative_difference(weights(in_one), weights(theirs), halves.train, tiny) > 10 * TOLERANCE


def test_two_stopped_processes_go_on_where_they_were(two, world, pictures, tiny):
    settings = {key: value for key, value in RUNS["stopped"].items() if key != "stopped"}
    resumed, number = two["stopped"], list(RUNS).index("stopped")
    assert two["ranks"][0]["runs"][number]["logged"] == [2, 3], "it went on from the last checkpoint"
    preset = make_preset(pictures, **settings)
    ours = quiet(preset, tiny)
    assert [line["step"] for line in resumed.metrics()] == [0, 1, 2, 3]
    assert relative_difference(weights(ours), weights(resumed), preset.train, tiny) <= TOLERANCE


# --- parts of a batch --------------------------------------------------------------------------------------------


def train_steps(config, latents, number=5) -> dict:
    """The LoRA matrices after some steps on random latents."""
    components, accelerator = tiny_minisd(), new_accelerator(config, "cpu")
    with injected(components, config, accelerator) as optimizer:
        losses = [
            training_step(components, optimizer, draw_step(config, latents, step), config, step, accelerator)["loss"]
            for step in range(number)
        ]
        parts = {"unet": components.unet, "text_encoder": components.text_encoder}
        state = {f"{n}.{k}": t.clone() for n, part in parts.items() for k, t in lora.lora_state_dict(part).items()}
    return state, losses


ACCUMULATE = TrainConfig(batch_size=8, rank=2, steps=5)


@pytest.fixture(scope="module")
def at_once():
    from training_tools import random_cache

    return train_steps(ACCUMULATE, random_cache())


@pytest.mark.parametrize("parts", [2, 4, 3, 8, 16])
def test_a_batch_in_parts_trains_as_a_whole_one(parts, at_once, latents, tiny):
    """23 rows by 8: parts of 2 pictures, of 3, 3 and 2, of 1 each; the last batch has 7. Of 16 parts some are empty."""
    config = dataclasses.replace(ACCUMULATE, gradient_accumulation_steps=parts)
    state, losses = train_steps(config, latents)
    assert losses == pytest.approx(at_once[1], rel=1e-5)
    assert relative_difference(at_once[0], state, config, tiny) <= TOLERANCE


def test_parts_that_are_divided_by_their_own_size_fail_that_test(at_once, latents, tiny, monkeypatch):
    """Negative control. 3, 3 and 2 pictures: means of means are not the mean."""
    config = dataclasses.replace(ACCUMULATE, gradient_accumulation_steps=3)
    original = steps.part_loss

    def wrong(components, part, config):  # the step divides by 8; this makes it 1/3 of the part's own mean
        return original(components, part, config) / len(part) * 8 / 3

    monkeypatch.setattr(steps, "part_loss", wrong)
    state, losses = train_steps(config, latents)
    assert losses != pytest.approx(at_once[1], rel=1e-3)
    assert relative_difference(at_once[0], state, config, tiny) > TOLERANCE


def test_a_text_encoder_that_trains_accumulates_too(latents):
    config = dataclasses.replace(ACCUMULATE, train_text_encoder=True)
    (whole, losses), (state, others) = (
        train_steps(dataclasses.replace(config, gradient_accumulation_steps=parts), latents, 3) for parts in (1, 3)
    )
    assert others == pytest.approx(losses, rel=1e-5)
    assert sum(name.startswith("text_encoder") for name in whole) == 2 * len(TEXT_ATTENTION) * 2
    length = torch.cat([t.flatten() for name, t in whole.items() if name.endswith("lora_B.weight")]).norm().item()
    assert distance(whole, state) <= TOLERANCE * length  # B began at zero


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 11])
def test_the_parts_of_a_draw_make_up_the_draw(count, latents):
    draw = draw_step(TrainConfig(batch_size=8), latents, 3)
    parts = draw.split(count)
    sizes = [len(part) for part in parts]
    assert len(parts) == count and sum(sizes) == len(draw) == 8 and max(sizes) - min(sizes) <= 1
    for field in dataclasses.fields(StepDraw):
        pieces = [getattr(part, field.name) for part in parts]
        assert torch.equal(torch.cat(pieces), getattr(draw, field.name)), field.name


@pytest.mark.parametrize("processes, parts", [(1, 1), (2, 1), (1, 3), (2, 2), (3, 3), (8, 2)])
def test_all_processes_together_compute_each_picture_once(processes, parts, latents):
    config = TrainConfig(batch_size=8, gradient_accumulation_steps=parts)
    draw = draw_step(config, latents, 0)
    found = []
    for rank in range(processes):
        process = type("Process", (), {"num_processes": processes, "process_index": rank})
        found += steps.own_parts(draw, config, process)
    assert torch.equal(torch.cat([part.indices for _, part in found]), draw.indices)
    assert torch.equal(torch.cat([part.noise for _, part in found]), draw.noise)
    assert torch.equal(torch.cat([part.timesteps for _, part in found]), draw.timesteps)
    numbers = [number for number, _ in found]
    assert len(set(numbers)) == len(numbers) and all(len(part) for _, part in found)


@pytest.mark.parametrize(("processes", "parts", "shares"), [(2, 3, [4, 4]), (3, 2, [3, 3, 2]), (5, 4, [2, 2, 2, 1, 1])])
def test_processes_get_shares_as_even_as_the_batch_allows(processes, parts, shares, latents):
    """However many parts each of them cuts its own into."""
    config = TrainConfig(batch_size=8, gradient_accumulation_steps=parts)
    draw = draw_step(config, latents, 0)
    found = []
    for rank in range(processes):
        process = type("Process", (), {"num_processes": processes, "process_index": rank})
        found.append(sum(len(part) for _, part in steps.own_parts(draw, config, process)))
    assert found == shares

"""Stopped anywhere, a run goes on to the same bits: between steps, inside one, while a file is being written.

COURSE_KILLS says how often a process is killed at a random moment (3 times by default), COURSE_KILL_SEED which moments
these are.
"""

import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from training_tools import (
    STEPS,
    Stop,
    make_preset,
    only_run,
    quiet,
    same_run,
    same_tensors,
    stop_at,
    stopped_and_resumed,
    temporary_files,
    weights,
)

from helpers import lora
from helpers.adapters import loading
from helpers.adapters.configuration import AdapterError
from helpers.base.paths import ROOT
from helpers.training import loop as training
from helpers.training.loop import resume_from
from helpers.training.runs import TrainingError

KILLS = int(os.environ.get("COURSE_KILLS", 3))
KILL_SEED = int(os.environ.get("COURSE_KILL_SEED", 0))

# One process forks a child for each kill, which trains and dies at the n-th visit of a place. SIGKILL ends a process
# there and then: no `finally` runs.
DIES = """
import json, os, signal, sys, time
sys.path[:0] = [ROOT, TESTS]
import torch
torch.set_num_threads(THREADS)
from pathlib import Path
import helpers.adapters.writing, helpers.training.checkpoints, helpers.training.loop
import helpers.training.runs, helpers.training.steps
from tiny import tiny_minisd
from training_tools import make_preset, quiet

pictures, folder, moments = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
visits = 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dies(module, name, when):
    original = getattr(module, name)
    def dying(*arguments, **settings):
        global visits
        visits += 1
        now = visits == visit  # visits within the call count as well
        if now and when == "before":
            die()
        if now and when == "half deleted":
            files = [path for path in Path(arguments[0]).rglob("*") if path.is_file()]
            for path in files[: len(files) // 2 + 1]:
                path.unlink()
            die()
        result = original(*arguments, **settings)
        if now and when == "half written":
            path = Path(arguments[1])
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        if now:
            die()
        return result
    setattr(module, name, dying)

PLACES = {
    "in the forward pass": (helpers.training.steps, "part_loss", "before"),
    "before the optimizer's step": (helpers.training.steps, "check_finite", "before"),
    "after the optimizer's step": (helpers.training.loop, "training_step", "after"),
    "in an adapter's file": (helpers.adapters.writing, "save_file", "half written"),
    "in the optimizer's file of a checkpoint": (helpers.training.checkpoints, "save_file", "half written"),
    "between the files of a checkpoint": (helpers.training.checkpoints, "save_file", "before"),
    "before a temporary name becomes the real one": (os, "replace", "before"),
    "after a temporary name became the real one": (os, "replace", "after"),
    "while a folder is deleted": (helpers.training.runs.shutil, "rmtree", "half deleted"),
    "in the held-out loss": (helpers.training.loop, "held_out_loss", "before"),
    "in the pictures of a validation": (helpers.training.loop, "sample", "before"),
    "in the latents of a validation": (helpers.training.loop, "save_file", "half written"),
}
def train(number, place):
    os.environ["COURSE_RUNS"] = str(folder / str(number) / "runs")
    preset, tiny = make_preset(pictures), tiny_minisd()
    if place in PLACES:
        dies(*PLACES[place])
    print("training", file=sys.stderr, flush=True)
    # where the clock chooses the moment, it lies within the ten steps on any machine
    quiet(preset, tiny, on_log=None if place in PLACES else lambda step, metrics: time.sleep(0.1))

for number, (place, visit, seconds) in enumerate(moments):
    (folder / str(number)).mkdir()
    process = os.fork()
    if not process:
        os.dup2(os.open(folder / str(number) / "log", os.O_WRONLY | os.O_CREAT), 2)
        try:
            train(number, place)
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(0)
    if not visit:
        log = folder / str(number) / "log"
        while not log.exists() or "training" not in log.read_text():
            time.sleep(0.01)
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    print(os.waitpid(process, 0)[1])
"""
# Where, and how many times a whole run passes there
IN_A_STEP = {"in the forward pass": 10, "before the optimizer's step": 10, "after the optimizer's step": 10}
IN_A_CHECKPOINT = {
    "in an adapter's file": 8,
    "in the optimizer's file of a checkpoint": 7,
    "between the files of a checkpoint": 7,
    "before a temporary name becomes the real one": 42,
    "after a temporary name became the real one": 42,
    "while a folder is deleted": 31,
}
BY_THE_CLOCK = "at a moment that the clock chose"
IN_A_VALIDATION = {
    "in the held-out loss": 5,
    "in the pictures of a validation": 5,
    "in the latents of a validation": 6,
    BY_THE_CLOCK: 0,
}


def moments(seed, kills):
    """(place, visit, seconds) of each kill, in turn in a step, in a checkpoint, in a validation."""
    rng = random.Random(seed)
    found = []
    for i in range(kills):
        place, visits = rng.choice(list((IN_A_STEP, IN_A_CHECKPOINT, IN_A_VALIDATION)[i % 3].items()))
        found.append((place, rng.randint(1, visits) if visits else 0, rng.uniform(0, 1)))
    return found


@pytest.fixture(scope="module")
def killed(pictures, tmp_path_factory):
    """The folder of what the killed processes left, and how each of them ended."""
    folder = tmp_path_factory.mktemp("killed")
    # The order of summation depends on the number of threads: the same in all processes
    head = f"ROOT, TESTS, THREADS = {str(ROOT)!r}, {str(ROOT / 'tests')!r}, {torch.get_num_threads()}\n"
    arguments = [str(pictures), str(folder), json.dumps(moments(KILL_SEED, KILLS))]
    command = [sys.executable, "-c", head + DIES, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 60 * KILLS)
    assert done.returncode == 0, done.stderr
    return folder, [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork and no SIGKILL on this system")
@pytest.mark.parametrize("number", range(KILLS))
def test_a_process_killed_at_a_random_moment_resumes_to_the_same_bits(number, killed, preset, tiny, whole, monkeypatch):
    place, visit, seconds = moments(KILL_SEED, KILLS)[number]
    what = f"kill {number} of COURSE_KILL_SEED={KILL_SEED} COURSE_KILLS={KILLS}: {place}, " + (
        f"visit {visit}" if visit else f"{seconds:.3f} s after the start"
    )
    folder, ended = killed[0] / str(number), killed[1][number]
    assert ended == signal.SIGKILL, f"{what}: it was not killed\n{(folder / 'log').read_text()}"

    monkeypatch.setenv("COURSE_RUNS", str(folder / "runs"))
    steps = []
    resumed = quiet(preset, tiny, on_log=lambda step, metrics: steps.append(step))
    assert resumed.dir == only_run(folder).dir and steps == list(range(STEPS))[STEPS - len(steps) :], what
    assert not same_run(resumed, whole), what
    assert resumed.checkpoints() == whole.checkpoints(), what


@pytest.mark.parametrize("stopped_after, resumed_at", [(1, 0), (9, 9)])
def test_a_stopped_run_resumes_to_the_same_bits(preset, tiny, whole, stopped_after, resumed_at):
    with pytest.raises(Stop):
        quiet(preset, tiny, on_log=stop_at(stopped_after))
    steps = []
    resumed = quiet(preset, tiny, on_log=lambda step, metrics: steps.append(step))
    assert resumed.dir != whole.dir and resumed.key == whole.key
    # A checkpoint every 2 steps, and of step 9, which has the lowest held-out loss so far
    assert steps == list(range(resumed_at, STEPS))
    assert not same_run(resumed, whole)


def test_a_broken_checkpoint_falls_back_to_the_one_before(preset, tiny, whole, world):
    with pytest.raises(Stop):
        quiet(preset, tiny, on_log=stop_at(7))
    left = only_run(world)
    broken = left.checkpoint_dir(6) / "optimizer.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])
    with (left.dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a line that was being written
    steps = []
    resumed = quiet(preset, tiny, on_log=lambda step, metrics: steps.append(step))
    assert steps[0] == 4 and not same_run(resumed, whole)


def test_a_process_killed_before_it_deletes_old_checkpoints_leaves_them_to_the_next(preset, tiny, whole, monkeypatch):
    """Between the last checkpoint and its clean-up: what stays is bounded all the same."""

    def killed(run, config):
        if STEPS in run.checkpoints():
            raise Stop
        keep(run, config)

    keep = training.keep_checkpoints
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(training, "keep_checkpoints", killed)
        quiet(preset, tiny)
    resumed = quiet(preset, tiny)
    assert not same_run(resumed, whole) and resumed.checkpoints() == whole.checkpoints()


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(preset, tiny, finished, world):
    """Falling back is for what was interrupted; who names a checkpoint wants that one."""
    file = finished.checkpoint_dir(8) / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(TrainingError, match="the checkpoint of step 8 of .* is damaged"):
        resume_from(finished, world / "again", preset, tiny, step=8)
    assert not (world / "again").exists()


@pytest.fixture(scope="module")
def generous(pictures, tmp_path_factory):
    """A finished run that kept all of its checkpoints, of steps 2, 4, 6, 8 and 10 and of the best validation."""
    from tiny import tiny_minisd

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_RUNS", str(tmp_path_factory.mktemp("generous")))
        return quiet(make_preset(pictures, keep_checkpoints=10), tiny_minisd())


def test_a_run_resumes_from_any_checkpoint_that_was_kept(generous, tiny, world, pictures):
    preset = make_preset(pictures, keep_checkpoints=10)
    kept = generous.checkpoints()
    assert kept == sorted({2, 4, 6, 8, 10, generous.best_step()})
    for step in kept[:-1]:
        asked = {} if step == kept[-2] else {"step": step}  # by default it is the last one before the end
        again = resume_from(generous, world / f"from-{step}", preset, tiny, **asked)
        assert not same_run(again, generous), f"from step {step}"
        assert again.checkpoints()[0] == step
    assert generous.checkpoints() == kept, "resuming leaves the run as it was"


def test_an_unknown_checkpoint_is_refused_with_the_known_ones(whole, preset, tiny, world):
    known = [step for step in whole.checkpoints() if step < STEPS]
    for step in (3, STEPS):  # from the end there is nowhere to go
        with pytest.raises(TrainingError, match=rf"no checkpoint of step {step}; known: \[{known[0]}"):
            resume_from(whole, world / "again", preset, tiny, step=step)
    assert not (world / "again").exists()


@pytest.mark.parametrize("kept", [1, 3])
def test_the_last_checkpoints_and_the_best_one_are_kept(kept, world, pictures, tiny, monkeypatch):
    """Held-out losses that grow from the first validation on: the best step is an old one, between two regular ones."""
    losses = iter((0.5, 0.1, 0.2, 0.3, 0.4))
    monkeypatch.setattr(training, "held_out_loss", lambda *arguments: next(losses))
    preset = make_preset(pictures, keep_checkpoints=kept)
    at_most = []
    run = quiet(preset, tiny, on_log=lambda step, metrics: at_most.append(len(only_run(world).checkpoints())))
    assert run.validations()[1][0] == run.best_step() == 3
    assert run.checkpoints() == [3, *(6, 8, 10)[-kept:]]
    assert max(at_most) == kept + 1
    best = load_file(run.checkpoint_dir(3) / "adapter.safetensors")
    assert best.keys() == weights(run).keys() and not same_tensors(best, weights(run))


def test_a_text_encoder_that_trains_resumes_to_the_same_bits(world, pictures, tiny):
    preset = make_preset(pictures, train_text_encoder=True, steps=6, validation_epochs=1000, lora_dropout=0.1)
    undisturbed = quiet(preset, tiny)
    kept = {step: load_file(undisturbed.checkpoint_dir(step) / "optimizer.safetensors") for step in (4, 6)}
    tensors = weights(undisturbed)
    ours = {name for name in tensors if name.startswith("text_encoder.")}
    moved = [tensors[name] for name in ours if name.endswith("lora_B.weight")]
    assert len(moved) == 2 * 4 and all(t.abs().max() > 0 for t in moved), "4 matrices of each of 2 layers have learnt"
    assert len(ours) == 16 and any(name.startswith("text_encoder.") for name in kept[6])

    metrics, pictures_at_end = undisturbed.metrics(), undisturbed.validation_latents(6)
    resumed, steps = stopped_and_resumed(preset, tiny, at=5)
    assert steps == [4, 5] and resumed.metrics() == metrics
    assert same_tensors(weights(resumed), tensors)
    assert same_tensors(load_file(resumed.checkpoint_dir(6) / "optimizer.safetensors"), kept[6])
    assert (resumed.validation_latents(6) == pictures_at_end).all() and not temporary_files(resumed.dir)

    with pytest.raises(AdapterError, match="text_encoder"):
        loading.load_adapter(resumed.adapter, tiny.unet)
    loading.load_adapter(resumed.adapter, tiny.unet, tiny.text_encoder)
    loaded = lora.lora_state_dict(tiny.text_encoder)
    assert sorted(t.sum().item() for t in loaded.values()) == sorted(tensors[name].sum().item() for name in ours)


def test_a_loaded_text_encoder_draws_what_the_last_validation_drew(world, pictures, tiny):
    """The pictures during training used the text encoder as it was then, not cached captions of the base model."""
    from helpers.diffusion.sampling import sample

    preset = make_preset(pictures, train_text_encoder=True, steps=4, learning_rate=1e-2, validation_epochs=1000)
    run = quiet(preset, tiny)
    loading.load_adapter(run.adapter, tiny.unet, tiny.text_encoder)
    settings = 2, preset.guidance_scale
    drawn = sample(tiny, ["a cat", "a man"], run.initial_latents(), *settings)
    assert (drawn - run.validation_latents(4)).abs().max() < 1e-5
    lora.remove(tiny.text_encoder)
    without = sample(tiny, ["a cat", "a man"], run.initial_latents(), *settings)
    assert (without - run.validation_latents(4)).abs().max() > 1e-4

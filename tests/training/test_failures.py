"""What goes wrong outside the loop: one sentence says so, nothing that was done is lost, and the run goes on later."""

import dataclasses
import errno
import os
import select
import shutil
import signal
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_minisd
from training_tools import (
    Stop,
    make_preset,
    only_run,
    quiet,
    same_run,
    same_tensors,
    stop_at,
    temporary_files,
    weights,
    write_pictures,
)

from helpers import lora
from helpers.diffusion.components import Components, load_components
from helpers.presets.configuration import TrainConfig
from helpers.presets.variants import get_preset
from helpers.training import checkpoints, draws, steps
from helpers.training import loop as training
from helpers.training.draws import draw_step
from helpers.training.guards import check_latents, check_model, locked
from helpers.training.loop import replay, resume_from
from helpers.training.runs import Run, TrainingError, is_finished
from helpers.training.steps import injected, training_step

STEPS = 6
BRIEF = {"steps": STEPS, "validation_steps": 4, "held_out_eval": 1}  # checkpoints 2, 4, 6; validations 0, 4, 6


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """A shorter run than other files', that nothing disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_RUNS", str(tmp_path_factory.mktemp("whole")))
        return quiet(make_preset(pictures, **BRIEF), tiny_minisd())


@pytest.fixture
def preset(world, pictures):
    return make_preset(pictures, **BRIEF)


def sentence(error) -> str:
    """The message of an error, which is one line."""
    text = str(error.value)
    assert text and "\n" not in text, text
    return text


# --- the disk ----------------------------------------------------------------------------------------------------


@contextmanager
def files_no_larger_than(size):
    """Within the block a file that grows beyond that is an error, as on a full disk (SIGXFSZ is ignored by Python)."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(os.name != "posix", reason="no limit on the size of files")
def test_a_checkpoint_that_does_not_fit_stops_the_run_and_keeps_the_one_before(preset, tiny, whole, world):
    """The adapter of a checkpoint (48 kB) still fits, its optimizer state (120 kB) does not."""
    last = whole.checkpoint_dir(STEPS)
    sizes = [(last / f"{name}.safetensors").stat().st_size for name in ("adapter", "optimizer")]
    assert sizes[0] < 80_000 < sizes[1]
    with pytest.raises(Stop):
        quiet(preset, tiny, on_log=stop_at(4))
    with files_no_larger_than(80_000), pytest.raises(TrainingError) as error:
        quiet(preset, tiny)
    run = only_run(world)
    assert f"cannot write to {run.dir}: " in sentence(error)
    assert "the checkpoint after step 4 is kept" in sentence(error)
    assert run.checkpoints()[-1] == 4 and not temporary_files(run.dir)
    assert not lora.lora_layers(tiny.unet), "the base model is restored"
    assert not same_run(quiet(preset, tiny), whole)


@pytest.mark.parametrize("where", ["validation", "metrics", "adapter"])
def test_a_full_disk_stops_the_run_wherever_it_strikes(where, preset, tiny, whole, world, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    original = training.Progress.log

    def log(self, step, *arguments):
        if step == 3:
            self.file.write('{"step": 3, "lo')  # what went to the disk before it was full
            full()
        original(self, step, *arguments)

    with monkeypatch.context() as patch:
        if where == "metrics":
            patch.setattr(training.Progress, "log", log)
        elif where == "validation":
            save = training.save_file
            full_at_4 = lambda tensors, path: full() if "step-000004" in str(path) else save(tensors, path)  # noqa: E731
            patch.setattr(training, "save_file", full_at_4)
        else:
            patch.setattr(training.cards, "write_card", full)
        with pytest.raises(TrainingError) as error:
            quiet(preset, tiny)
    run, kept = only_run(world), {"validation": 2, "metrics": 2, "adapter": 6}[where]
    assert f"cannot write to {run.dir}: " in sentence(error) and "No space left on device" in sentence(error)
    assert f"the checkpoint after step {kept} is kept" in sentence(error) and run.checkpoints()[-1] == kept
    assert not temporary_files(run.dir) and not is_finished(run.dir)
    assert not lora.lora_layers(tiny.unet)
    assert not same_run(quiet(preset, tiny), whole)


@pytest.fixture
def open_world(monkeypatch):
    """A folder that everyone may write to, with the pictures in it: pytest's own temporary folders are private."""
    folder = Path(tempfile.mkdtemp(prefix="course-"))
    folder.chmod(0o777)
    write_pictures(folder / "pictures")
    monkeypatch.setenv("COURSE_RUNS", str(folder / "runs"))
    yield folder
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o777)
    shutil.rmtree(folder)


@contextmanager
def as_nobody():
    """Within the block this process may write only where everyone may, even if it is root's, as in a container."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.name != "posix", reason="no permissions to take away")
def test_a_runs_folder_that_cannot_be_written_to_is_one_sentence(open_world, tiny, whole):
    """(`whole` has trained before: what a run imports is imported, which nobody might not be allowed to read.)"""
    preset, folder = make_preset(open_world / "pictures", steps=2), open_world / "runs"
    folder.mkdir()
    folder.chmod(0o555)
    with as_nobody(), pytest.raises((TrainingError, OSError)) as error:
        quiet(preset, tiny)
    assert str(folder) in sentence(error) and not list(folder.iterdir())
    finished = Run(open_world / "finished", whole.preset, whole.dataset, whole.key)
    shutil.copytree(whole.dir, finished.dir)
    for path in finished.dir.rglob("*"):
        path.chmod(0o755)
    with as_nobody(), pytest.raises((TrainingError, OSError)) as error:
        resume_from(finished, folder / "again", make_preset(open_world / "pictures", **BRIEF), tiny)
    assert str(folder) in sentence(error) and not list(folder.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="no permissions to take away")
def test_a_run_that_may_not_be_written_any_longer_keeps_its_checkpoint(open_world, tiny, whole):
    preset = make_preset(open_world / "pictures", **BRIEF)

    def lock_out(step, metrics):
        if step == 5:
            (only_run(open_world).dir / "checkpoints").chmod(0o555)

    with as_nobody(), pytest.raises(TrainingError) as error:
        quiet(preset, tiny, on_log=lock_out)
    run = only_run(open_world)
    assert f"cannot write to {run.dir}: " in sentence(error) and "Permission denied" in sentence(error)
    assert "the checkpoint after step 4 is kept" in sentence(error) and run.checkpoints()[-1] == 4
    (run.dir / "checkpoints").chmod(0o755)
    assert not same_run(quiet(preset, tiny), whole)


def test_what_a_killed_process_was_writing_does_not_stay(preset, tiny, world):
    """SIGKILL leaves the temporary files of `atomic_path`: the next process, which has the lock, may delete them."""
    with pytest.raises(Stop):
        quiet(preset, tiny, on_log=stop_at(3))
    run = only_run(world)
    for name in (".config.0123abcd.tmp.json", ".metrics.0123abcd.tmp.jsonl", ".done.0123abcd.tmp.json"):
        (run.dir / name).write_text("{")
    shutil.copytree(run.checkpoint_dir(2), run.dir / "checkpoints" / ".step-000003.writing")
    assert temporary_files(quiet(preset, tiny).dir) == []


# --- two at once -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_run_is_trained_by_one_process_and_free_when_that_is_killed(preset, tiny, whole, world):
    with pytest.raises(Stop):
        quiet(preset, tiny, on_log=stop_at(4))
    run, (reading, writing) = only_run(world), os.pipe()
    other = os.fork()
    if not other:  # the other process does nothing but hold the lock until it is killed
        try:
            with locked(run):
                os.write(writing, b"held")
                signal.pause()
        finally:
            os._exit(1)
    try:
        assert select.select([reading], [], [], 60)[0] and os.read(reading, 4) == b"held"
        before = {path: path.stat().st_mtime_ns for path in run.dir.rglob("*")}
        for force in (False, True):
            with pytest.raises(TrainingError, match=f"another process is training the run {run.dir.name}: ") as error:
                quiet(preset, tiny, force=force)
            sentence(error)
        assert {path: path.stat().st_mtime_ns for path in run.dir.rglob("*")} == before, "nothing is touched"
        assert not lora.lora_layers(tiny.unet)
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        os.close(reading), os.close(writing)
    assert not same_run(quiet(preset, tiny), whole)


def test_the_lock_is_the_directory_s_and_ends_with_its_block(world):
    run, other = (SimpleNamespace(dir=world / "runs" / "smoke" / name) for name in ("own-1", "own-2"))
    found = []

    def second():
        try:
            with locked(run):
                found.append("free")
        except TrainingError as error:
            found.append(str(error))

    with locked(run), locked(other):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(timeout=60)
    second()
    assert found == ["another process is training the run own-1: wait for it, or stop it", "free"]
    run.dir.mkdir(parents=True)
    link = SimpleNamespace(dir=world / "link" / "own-1")
    link.dir.parent.symlink_to(run.dir.parent, target_is_directory=True)
    with locked(run), pytest.raises(TrainingError, match="another process"), locked(link):
        pass


# --- data and model that changed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_latent_cache_that_is_gone_or_damaged_is_computed_again(damage, preset, tiny, whole, world):
    with pytest.raises(Stop):
        quiet(preset, tiny, on_log=stop_at(5))
    caches = list((world / "runs" / "cache").glob("latents-*"))
    assert len(caches) == 2, "of training and of held-out rows"
    intact = {path: path.read_bytes() for folder in caches for path in folder.glob("*.npy")}
    for folder in caches:
        if damage == "missing":
            shutil.rmtree(folder)
        elif len(np.load(folder / "mean.npy")) == 10:  # of the training rows: another content, of the same form
            np.save(folder / "mean.npy", np.load(folder / "mean.npy") + 1)
        else:
            states = folder / "caption_embeddings.npy"
            states.write_bytes(states.read_bytes()[:-8])
    assert not same_run(quiet(preset, tiny), whole)
    assert {path: path.read_bytes() for path in intact} == intact and not temporary_files(world / "runs" / "cache")


def test_a_dataset_or_model_that_changed_is_another_run(world, tiny):
    pictures = world / "pictures"
    write_pictures(pictures)
    preset = make_preset(pictures, steps=2, checkpoint_every=1, validation_epochs=1000, held_out_eval=0)
    first = quiet(preset, tiny)
    before = weights(first)
    (pictures / "00.txt").write_text("a dog")
    for call in (lambda: resume_from(first, world / "again", preset, tiny), lambda: replay(first, 1, preset, tiny)):
        with pytest.raises(TrainingError, match=f"the dataset is not the one that the run {first.dir.name}") as error:
            call()
        sentence(error)
    assert not (world / "again").exists()
    second = quiet(preset, tiny)
    assert second.dir != first.dir and second.source == "trained now" and same_tensors(weights(first), before)

    with torch.no_grad():
        tiny.unet.conv_in.weight[0, 0, 0, 0] += 1
    for call in (lambda: resume_from(second, world / "again", preset, tiny), lambda: replay(second, 1, preset, tiny)):
        with pytest.raises(TrainingError, match="the base model is not the one that the run"):
            call()
    third = quiet(preset, tiny)
    assert third.dir not in (first.dir, second.dir) and third.source == "trained now"


# --- models that would spoil a run -------------------------------------------------------------------------------


def fake_components(prediction="epsilon", width=768, pad=49407, tokens=49408, vocabulary=49408):
    """As much of Stable Diffusion 1.5 as the check of a model looks at."""

    class Tokenizer:
        pad_token_id = pad

        def __len__(self):
            return tokens

    encoder = SimpleNamespace(config=SimpleNamespace(hidden_size=width, vocab_size=vocabulary))
    parts = {"tokenizer": Tokenizer(), "text_encoder": encoder}
    return SimpleNamespace(name="some model", prediction_type=prediction, **parts)


def test_models_as_they_should_be_pass():
    check_model(fake_components(), get_preset("sd15"))
    check_model(fake_components(width=1024, pad=0), get_preset("sd21-base"))
    check_model(fake_components("v_prediction", width=1024, pad=0), get_preset("sd21"))


@pytest.mark.parametrize("preset, fault, message", [
    ("sd15", {"prediction": "v_prediction"}, "some model predicts v_prediction, the preset 'sd15' says epsilon"),
    ("sd21", {"width": 1024, "pad": 0}, "some model predicts epsilon, the preset 'sd21' says v_prediction"),
    ("sd21-base", {"width": 1024, "pad": 49407}, "pads captions with token 49407, .* token 0 there"),
    ("sd15", {"tokens": 49410}, "knows 49410 tokens, its text encoder 49408"),
])  # fmt: skip
def test_a_model_that_does_not_fit_is_refused(preset, fault, message):
    with pytest.raises(TrainingError, match=message) as error:
        check_model(fake_components(**fault), get_preset(preset))
    sentence(error)


def test_a_model_that_predicts_something_else_stops_a_run_before_it_begins(world, pictures, tiny):
    with pytest.raises(TrainingError, match="predicts v_prediction"):
        quiet(make_preset(pictures, prediction_type="epsilon"), tiny)
    assert not (world / "runs" / "smoke").exists()


@pytest.fixture(scope="module")
def minisd() -> Components:
    return load_components(get_preset("mini"), "cpu")


@pytest.mark.parametrize("factor, fits", [(0.18215, True), (1.0, False), (0.18215**2, False)])
def test_latents_without_or_with_twice_the_scaling_factor_are_refused(factor, fits, minisd):
    """MiniSD's own VAE on its own pictures: the factor as it is, forgotten, and multiplied twice."""
    from helpers.data.caches import compute_cache
    from helpers.data.loading import load_pictures

    spec = dataclasses.replace(get_preset("mini").datasets["doodles"], train_rows=4, held_out_rows=0)
    vae, own = minisd.vae, minisd.vae.config.scaling_factor
    assert own == 0.18215
    try:
        vae.register_to_config(scaling_factor=factor)
        cache = compute_cache(minisd, load_pictures(spec, "train", 64))
        if fits:
            check_latents(minisd, cache)
            return
        with pytest.raises(TrainingError, match=f"root mean square .*scaling factor {factor} ") as error:
            check_latents(minisd, cache)
        sentence(error)
    finally:
        vae.register_to_config(scaling_factor=own)


def test_wrong_latents_stop_a_run_before_its_first_step(preset, tiny, world):
    tiny.vae.register_to_config(scaling_factor=4.0**3)
    with pytest.raises(TrainingError, match="scaling factor 64"):
        quiet(preset, tiny, on_log=lambda step, metrics: pytest.fail("it trained"))


# --- numbers that are none ---------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(preset, tiny, whole, world, monkeypatch):
    def poisoned(config, cache, step, T):
        draw = draw_step(config, cache, step, T)
        return dataclasses.replace(draw, latents=draw.latents * float("nan")) if step == 5 else draw

    rows = [int(i) for i in draws.batch_indices(preset.train, 10, 5)]
    with monkeypatch.context() as patch:
        patch.setattr(training, "draw_step", poisoned)
        with pytest.raises(TrainingError, match=r"step 5: the loss is nan.* timesteps \[.*\], rows ") as error:
            quiet(preset, tiny)
    assert f"rows {rows}" in sentence(error)
    run = only_run(world)
    assert run.checkpoints() == [2, 4] and not (run.dir / "done.json").exists() and not run.adapter.exists()
    assert all(torch.isfinite(t).all() for t in load_file(run.checkpoint_dir(4) / "adapter.safetensors").values())
    assert not lora.lora_layers(tiny.unet), "the base model is restored"
    assert not same_run(quiet(preset, tiny), whole), "without the fault it goes on as if nothing had been"


def with_gradient(loss, parameter, value):
    """The same loss, but the gradient of one matrix is `value` everywhere."""
    total = parameter.sum()
    total.register_hook(lambda gradient: gradient * value)
    return loss + (total - total.detach())


FAULTS = {
    "the loss is inf": lambda loss, parameter: loss + float("inf"),
    "the loss is nan": lambda loss, parameter: loss * float("nan"),
    "its gradient's norm inf": lambda loss, parameter: with_gradient(loss, parameter, float("inf")),
    "its gradient's norm nan": lambda loss, parameter: with_gradient(loss, parameter, float("nan")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_weight_changes_when_loss_or_gradient_is_no_number(fault, tiny, latents, accelerator, monkeypatch):
    config = TrainConfig(batch_size=4, rank=2)
    original = steps.part_loss
    with injected(tiny, config, accelerator) as optimizer:
        training_step(tiny, optimizer, draw_step(config, latents, 0), config, 0, accelerator)
        draw, moments = draw_step(config, latents, 1), optimizer.state_dict()["state"]
        before = [t.clone() for t in lora.lora_state_dict(tiny.unet).values()]
        moments = [t.clone() for state in moments.values() for t in state.values()]
        parameter = lora.lora_parameters(tiny.unet)[3]
        monkeypatch.setattr(steps, "part_loss", lambda *arguments: FAULTS[fault](original(*arguments), parameter))
        with pytest.raises(TrainingError) as error:
            training_step(tiny, optimizer, draw, config, 1, accelerator)
        after = list(lora.lora_state_dict(tiny.unet).values())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        after = [t for state in optimizer.state_dict()["state"].values() for t in state.values()]
        assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    text = sentence(error)
    assert text.startswith("step 1: ") and fault in text
    assert f"timesteps {draw.timesteps.tolist()}, rows {draw.indices.tolist()}" in text


def test_a_gradient_that_is_no_number_stops_a_run_and_keeps_the_checkpoint(preset, tiny, world, monkeypatch):
    original = steps.training_step

    def poisoned(components, optimizer, draw, config, step, accelerator):
        if step == 5:
            part_loss, parameter = steps.part_loss, lora.lora_parameters(components.unet)[0]
            monkeypatch.setattr(steps, "part_loss", lambda *a: with_gradient(part_loss(*a), parameter, float("inf")))
        return original(components, optimizer, draw, config, step, accelerator)

    monkeypatch.setattr(training, "training_step", poisoned)
    with pytest.raises(TrainingError, match=r"step 5: the loss is \d.* and its gradient's norm inf; timesteps"):
        quiet(preset, tiny)
    run = only_run(world)
    assert run.checkpoints()[-1] == 4
    assert [line["step"] for line in run.metrics()] == [0, 1, 2, 3, 4]


def test_a_checkpoint_of_another_shape_changes_nothing(whole, tiny, accelerator, preset):
    """load_checkpoint checks before it writes: a wrong file leaves matrices and moments as they were."""
    config = dataclasses.replace(preset.train, rank=3)
    with injected(tiny, config, accelerator) as optimizer:
        before = {name: t.clone() for name, t in lora.lora_state_dict(tiny.unet).items()}
        with pytest.raises(ValueError, match="wrong shape"):
            checkpoints.load_checkpoint(whole, STEPS, {"unet": tiny.unet}, optimizer)
        assert same_tensors(before, lora.lora_state_dict(tiny.unet)) and not optimizer.state_dict()["state"]

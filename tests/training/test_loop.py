"""The training loop: what a run leaves behind, and what stops it."""

import json
import math
import sys

import pytest
import torch
from training_tools import STEPS, make_preset, quiet, weights

from helpers import lora
from helpers.adapters.reading import read_adapter
from helpers.base import provenance
from helpers.presets.configuration import TrainConfig
from helpers.presets.variants import get_preset
from helpers.training import loop
from helpers.training.loop import train
from helpers.training.progress import Progress, memory_in_use
from helpers.training.runs import Run, is_finished


def test_a_run_leaves_what_it_promises(preset, tiny):
    seen = []
    run = quiet(preset, tiny, on_log=lambda step, metrics: seen.append((step, metrics["loss"])))
    assert run.source == "trained now" and is_finished(run.dir)
    metrics = run.metrics()
    assert [m["step"] for m in metrics] == list(range(STEPS)) == [step for step, _ in seen]
    assert [m["epoch"] for m in metrics] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert all(set(m) == {"step", "epoch", "loss", "lr", "grad_norm", "mean_timestep"} for m in metrics)
    assert [m["loss"] for m in metrics] == [loss for _, loss in seen]
    assert run.validations() == [(0, 0), (3, 1), (6, 2), (9, 3), (10, 3)]
    assert all(m["held_out_loss"] > 0 for m in run.validation_metrics())
    pictures = run.validation_pictures(3)
    assert [p.size for p in pictures] == [(32, 32)] * 2
    assert run.validation_latents(10).shape == run.initial_latents().shape == (2, 10, 4, 4)
    losses = {m["step"]: m["held_out_loss"] for m in run.validation_metrics()}
    assert run.best_step() == min(list(losses)[1:], key=losses.get) == run.done["best_step"]
    assert run.checkpoints() == sorted({8, run.best_step(), 10})
    assert set(run.hashes) == {"code", "weights", "data", "adapter", "initial_latents"}
    assert run.hashes["adapter"] == provenance.tensor_hash(weights(run))
    assert run.done["losses"]["last"] == metrics[-1]["loss"]

    said, config = read_adapter(run.adapter).metadata, run.config
    assert (said["base_model"], said["base_model_hash"]) == (config["model"], run.hashes["weights"])
    assert (said["dataset"], said["dataset_hash"]) == (run.dataset, run.hashes["data"])
    for name in ("seed", "rank", "alpha", "targets"):
        assert said[name] == config["train"][name]
    assert said["prediction_type"] == config["prediction_type"] and said["versions"]["torch"] == torch.__version__
    assert said["step"] == config["train"]["steps"]
    last = read_adapter(run.checkpoint_dir(run.checkpoints()[0]) / "adapter.safetensors").metadata
    assert last == said | {"step": run.checkpoints()[0]}
    assert f"| dataset | {run.dataset} |" in (run.adapter.parent / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"no validation at step 4; known: \[0, 3, 6, 9, 10\]"):
        run.validation_pictures(4)
    assert not [path.name for path in run.dir.rglob(".*")], "no temporary files stay"
    assert not lora.lora_layers(tiny.unet)


def test_missing_weights_and_unknown_names_are_one_sentence(world, pictures):
    with pytest.raises(ValueError, match="no folder nowhere"):
        train(make_preset(pictures, model="nowhere"), "own", progress=False)
    with pytest.raises(ValueError, match="unknown dataset 'photos'"):
        train(get_preset("smoke"), "photos", progress=False)


# --- tracking ----------------------------------------------------------------------------------------------------


@pytest.fixture
def short(world, pictures):
    return make_preset(pictures, steps=2, validation_epochs=1000, held_out_eval=0)


def test_a_tracker_that_fails_is_noted_once_and_stops_nothing(short, tiny, monkeypatch):
    class Broken:
        def init(self, **settings):
            return self

        def Settings(self, **settings):
            return settings

        def log(self, metrics, step):
            raise OSError("disk full")

        def finish(self):
            raise OSError("disk full")

    monkeypatch.setitem(sys.modules, "wandb", Broken())
    run = quiet(short, tiny, tracker="wandb")
    notes = [(m["step"], m["note"]) for m in run.metrics() if "note" in m]
    assert notes == [(0, "tracking with wandb stopped: OSError: disk full")] and is_finished(run.dir)


def test_wandb_records_offline_inside_the_run_and_says_nothing(short, tiny, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = quiet(short, tiny, tracker="wandb")
    out = capfd.readouterr()
    assert (out.out, out.err) == ("", "")
    assert not [m["note"] for m in run.metrics() if "note" in m]
    assert list((run.dir / "wandb").glob("offline-run-*/*.wandb"))


def test_unknown_trackers_are_refused(short, tiny):
    with pytest.raises(ValueError, match="unknown tracker 'mlflow'"):
        quiet(short, tiny, tracker="mlflow")


# --- progress ----------------------------------------------------------------------------------------------------


class Recorder:
    """A tracker that keeps what it is told, and has a note once."""

    def __init__(self):
        self.logged, self.note = [], None

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def take_note(self):
        note, self.note = self.note, None
        return note


def progress_of(folder, tracker, writes=True, bar=False, on_log=None):
    run, config = Run(folder, "smoke", "own", "key"), TrainConfig(steps=20, batch_size=4)
    return run, Progress(run, config, torch.device("cpu"), writes, tracker, bar, on_log)


def test_the_bar_says_loss_speed_and_memory(tmp_path, capsys):
    run, progress = progress_of(tmp_path, Recorder(), bar=True)
    with progress.started(5):
        for step in range(5, 8):
            progress.log(step, {"step": step, "loss": 0.25}, 0.5)
        said = str(progress.bar)
        progress.bar.refresh()
    assert said.startswith("own:  40%") and "8/20" in said
    assert "loss=0.250" in said and "pictures=8.0/s" in said, "4 pictures in half a second"
    assert f"memory={memory_in_use(torch.device('cpu')) / 2**30:.1f} GiB"[:8] in said and "GiB" in said
    assert "loss=0.250" in capsys.readouterr().err
    assert memory_in_use(torch.device("cpu")) > 50 * 2**20, "bytes of this process"


def test_progress_writes_a_line_tells_the_tracker_and_calls_back(tmp_path, capsys):
    tracker, seen = Recorder(), []
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    run, progress = progress_of(tmp_path, tracker, on_log=lambda step, metrics: seen.append((step, dict(metrics))))
    with progress.started(1):
        progress.log(1, {"step": 1, "loss": 1.0}, 2.0)
        assert run.metrics() == [{"step": 0}, {"step": 1, "loss": 1.0}], "a line is on the disk when it is written"
        tracker.note = "it stopped"
        progress.log(2, {"step": 2, "loss": 2.0}, 2.0)
    assert run.metrics()[2] == {"step": 2, "loss": 2.0, "note": "it stopped"}
    assert seen == [(1, {"step": 1, "loss": 1.0}), (2, {"step": 2, "loss": 2.0, "note": "it stopped"})]
    assert tracker.logged == [(step, {"loss": float(step), "pictures_per_second": 2.0}) for step in (1, 2)]
    assert progress.loss == pytest.approx(1.05), "smoothed: 5% of the newest"
    assert capsys.readouterr() == ("", ""), "no bar was asked for"


def test_a_process_that_does_not_write_writes_nothing(tmp_path, capsys):
    tracker = Recorder()
    run, progress = progress_of(tmp_path, tracker, writes=False, bar=True, on_log=lambda *a: pytest.fail("called"))
    with progress.started(0):
        progress.log(0, {"step": 0, "loss": 1.0}, 1.0)
    assert not list(tmp_path.iterdir()) and not tracker.logged and capsys.readouterr() == ("", "")


def test_steps_that_fp16_skips_are_counted_and_leave_json_without_infinity(preset, tiny, monkeypatch, capsys):
    real = loop.training_step

    def overflowing(components, optimizer, draw, config, step, accelerator):
        metrics = real(components, optimizer, draw, config, step, accelerator)
        return metrics | {"grad_norm": math.inf} if step in (2, 5) else metrics

    monkeypatch.setattr(loop, "training_step", overflowing)
    run = train(preset, "own", components=tiny)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("skipped")] == [2, 5] and lines[2]["grad_norm"] is None
    assert run.done["skipped_steps"] == 2 and run.done["steps"] == STEPS
    assert "skipped=2" in capsys.readouterr().err

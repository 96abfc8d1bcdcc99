"""Trackers: what is logged can be read back, nothing is printed or sent, and a failing one takes nothing with it."""

import ast
import io
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.base.paths import ROOT
from helpers.training import tracking
from helpers.training.tracking import TRACKERS, Tracker

CONFIG = {"steps": 3, "train": {"rank": 4, "targets": ("to_q", "to_v")}}
COLOURS = [(255, 0, 0), (0, 0, 255)]
CAPTIONS = ["a red cat", "a blue dog"]
NAMES = list(TRACKERS)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")  # so that what the tracker sets goes again with the test


def pictures():
    return [Image.new("RGB", (8, 6), colour) for colour in COLOURS]


def log_everything(tracker):
    for step in range(3):
        tracker.log({"loss": 1 / (step + 1), "epoch": step // 2}, step)
    tracker.log_pictures(pictures(), CAPTIONS, 2)
    tracker.finish()


def events(folder):
    """TensorBoard's event files, read by its own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard")).Reload()


def losses(folder):
    return [(event.step, round(event.value, 3)) for event in events(folder).Scalars("loss")]


def wandb_files(folder):
    return list((folder / "wandb").glob("offline-run-*/*.wandb"))


def wandb_recorded(folder):
    """The content of W&B's one file; its service writes the end of it a moment after `finish` has returned."""
    [file] = wandb_files(folder)
    patience = time.monotonic() + 10
    while b"loss" not in file.read_bytes() and time.monotonic() < patience:
        time.sleep(0.02)
    return file.read_bytes()


def wandb_pictures(folder):
    return list(folder.glob("wandb/offline-run-*/files/media/images/*.png"))


# --- what is written ----------------------------------------------------------------------------------------------


def test_none_tracks_nothing_and_imports_nothing(tmp_path):
    code = (
        "import sys; from helpers.training.tracking import Tracker\n"
        "for names in (None, []):\n"
        "    tracker = Tracker(names, sys.argv[1], 'title', {})\n"
        "    tracker.log({'loss': 1.0}, 0); tracker.log_pictures([1], ['x'], 0); tracker.finish()\n"
        "    assert tracker.take_note() is None\n"
        "print(sorted({'wandb', 'tensorboard'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and list(tmp_path.iterdir()) == []


def test_the_file_itself_imports_no_library():
    """Its room does (the loop needs torch), but trackers are imported when one is asked for."""
    body = ast.parse(Path(tracking.__file__).read_text(encoding="utf-8")).body
    names = {node.module for node in body if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    assert names and {name.split(".")[0] for name in names} <= sys.stdlib_module_names | {"numpy"}


def test_tensorboard_can_be_read_back(tmp_path, capfd):
    tracker = Tracker("tensorboard", tmp_path, "doodles-1", CONFIG)
    log_everything(tracker)
    assert tracker.take_note() is None
    assert (*capfd.readouterr(),) == ("", "")
    assert [file.name for file in tmp_path.iterdir()] == ["tensorboard"]
    found = events(tmp_path)
    assert losses(tmp_path) == [(0, 1.0), (1, 0.5), (2, 0.333)]
    assert [event.value for event in found.Scalars("epoch")] == [0, 0, 1]
    assert found.Tags()["images"] == ["validation/0 a red cat", "validation/1 a blue dog"]
    for tag, colour in zip(found.Tags()["images"], COLOURS, strict=True):
        [event] = found.Images(tag)
        picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        assert event.step == 2 and picture.shape == (6, 8, 3) and (picture == colour).all()
    [text] = found.Tensors("config/text_summary")
    assert json.loads(text.tensor_proto.string_val[0]) == {
        "title": "doodles-1",
        "steps": 3,
        "train": {"rank": 4, "targets": ["to_q", "to_v"]},
    }


def test_pictures_of_several_sizes_and_modes_with_equal_prompts(tmp_path):
    tracker = Tracker("tensorboard", tmp_path, "title", {})
    tracker.log_pictures([Image.new("L", (4, 4)), Image.new("RGBA", (9, 5))], ["same", "same"], 0)
    tracker.log_pictures([], [], 1)
    tracker.finish()
    assert tracker.take_note() is None
    assert events(tmp_path).Tags()["images"] == ["validation/0 same", "validation/1 same"]


def test_wandb_writes_offline_and_says_nothing(tmp_path, capfd, monkeypatch):
    """Its server is one of ours, which nobody may call."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)  # signed in, even
        tracker = Tracker("wandb", tmp_path, "doodles-1", CONFIG)
        run = tracker._running["wandb"].tracker.run
        assert run.offline and run.name == "doodles-1" and run.config["train"]["rank"] == 4
        log_everything(tracker)
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()
    assert tracker.take_note() is None
    assert (*capfd.readouterr(),) == ("", "")
    written = wandb_recorded(tmp_path)
    assert all(caption.encode() in written for caption in CAPTIONS) and b"loss" in written
    assert len(wandb_pictures(tmp_path)) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["wandb"]


def test_wandb_can_be_switched_off_by_its_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = Tracker("wandb", tmp_path, "title", CONFIG)
    log_everything(tracker)
    assert tracker.take_note() is None and wandb_files(tmp_path) == []


def test_both_at_once(tmp_path):
    tracker = Tracker(["tensorboard", "wandb", "tensorboard"], tmp_path, "title", CONFIG)
    log_everything(tracker)
    tracker.finish()  # a second time does nothing
    assert tracker.take_note() is None
    assert len(losses(tmp_path)) == 3 and len(wandb_files(tmp_path)) == 1


def test_two_runs_in_one_process_stay_apart(tmp_path):
    for name in ("one", "two"):
        log_everything(Tracker(NAMES, tmp_path / name, name, CONFIG))
    for name in ("one", "two"):
        assert len(losses(tmp_path / name)) == 3 and len(wandb_files(tmp_path / name)) == 1


def test_only_the_main_process_writes(tmp_path, monkeypatch):
    from accelerate import PartialState

    monkeypatch.setattr(PartialState, "is_main_process", False)
    tracker = Tracker(NAMES, tmp_path, "title", CONFIG)
    log_everything(tracker)
    assert tracker.take_note() is None and list(tmp_path.iterdir()) == []


# --- what fails ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["mlflow", ["wandb", "mlflow"], [None], ""])
def test_unknown_names_are_refused(tmp_path, names):
    with pytest.raises(ValueError, match="unknown tracker ('mlflow'|None|''); known: wandb, tensorboard, or None"):
        Tracker(names, tmp_path, "title", CONFIG)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["start", "log", "log_pictures", "finish"])
@pytest.mark.parametrize("name", NAMES)
def test_a_failing_tracker_is_noted_once_and_the_other_goes_on(tmp_path, monkeypatch, name, method):
    calls = []
    original = getattr(TRACKERS[name], method)

    def broken(self, *args):
        calls.append(method)
        with suppress(AttributeError):
            original(self, *args)
        raise OSError("disk\n full")

    monkeypatch.setattr(TRACKERS[name], method, broken)
    tracker = Tracker(NAMES, tmp_path, "title", CONFIG)
    log_everything(tracker)
    assert tracker.take_note() == f"tracking with {name} stopped: OSError: disk full"
    assert tracker.take_note() is None and calls == [method]
    if name == "wandb":
        import wandb

        assert len(losses(tmp_path)) == 3 and len(events(tmp_path).Tags()["images"]) == 2
        assert wandb.run is None, "the failed run is closed, or the next one would go on with it"
    else:
        assert b"loss" in wandb_recorded(tmp_path) and len(wandb_pictures(tmp_path)) == 2


def test_what_fails_really(tmp_path, monkeypatch, capfd):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    tracker = Tracker(NAMES, tmp_path, "title", CONFIG)
    first, second = tracker.take_note().split("; ")
    assert first.startswith("tracking with wandb stopped: ") and "mode" in first and "\n" not in first
    assert second.startswith("tracking with tensorboard stopped: FileExistsError")
    log_everything(tracker)
    assert tracker.take_note() is None
    assert (*capfd.readouterr(),) == ("", "")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_noted(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    tracker = Tracker(name, tmp_path, "title", CONFIG)
    log_everything(tracker)
    assert tracker.take_note().startswith(f"tracking with {name} stopped: ModuleNotFoundError: import of {name}")


def test_captions_must_fit_the_pictures(tmp_path):
    tracker = Tracker("tensorboard", tmp_path, "title", CONFIG)
    tracker.log_pictures(pictures(), CAPTIONS[:1], 0)
    assert "ValueError" in tracker.take_note()


def test_an_interrupt_is_no_failure(tmp_path, monkeypatch):
    def interrupted(self, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(tracking.TensorBoard, "log", interrupted)
    tracker = Tracker("tensorboard", tmp_path, "title", CONFIG)
    with pytest.raises(KeyboardInterrupt):
        tracker.log({"loss": 1.0}, 0)
    tracker.finish()

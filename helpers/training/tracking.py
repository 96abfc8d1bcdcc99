"""Weights & Biases and TensorBoard beside a training run: silent, on this machine, never the reason that it stops."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = "stable-diffusion-lora"  # what the runs are filed under in W&B


class WandB:
    """A run of Weights & Biases, its files in `folder`/wandb.

    It stays offline unless the environment variable WANDB_MODE says otherwise (online, offline or disabled).
    """

    def start(self, folder: Path, title: str, config: dict) -> None:
        """Begin a run of that title, in files under the folder; with WANDB_MODE=online it is sent to W&B as well."""
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb
        from accelerate.tracking import WandBTracker

        settings = wandb.Settings(silent=True, console="off", show_errors=False, show_warnings=False, show_info=False)
        mode = os.environ.get("WANDB_MODE", "offline")
        self.tracker = WandBTracker(PROJECT, name=title, dir=str(folder), config=config, mode=mode, settings=settings)
        self.tracker.start()

    def log(self, metrics: dict, step: int) -> None:
        """Note {name: number} of a step."""
        self.tracker.log(metrics, step=step)

    def log_pictures(self, pictures: list, captions: Sequence[str], step: int) -> None:
        """Note the validation pictures of a step, each with its caption."""
        import wandb

        # accelerate's log_images would leave the captions out
        images = [wandb.Image(picture, caption=caption) for picture, caption in zip(pictures, captions, strict=True)]
        self.tracker.log({"validation": images}, step=step)

    def finish(self) -> None:
        """Close the run; what is pending is written."""
        self.tracker.finish()


class TensorBoard:
    """TensorBoard's event files in `folder`/tensorboard; `tensorboard --logdir runs` shows them."""

    def start(self, folder: Path, title: str, config: dict) -> None:
        """Begin a run of that title, in files under the folder."""
        import torch.utils.tensorboard  # noqa: F401  (or accelerate would say that tensorboardX is missing)
        from accelerate.tracking import TensorBoardTracker

        self.tracker = TensorBoardTracker("tensorboard", str(folder))
        self.tracker.start()
        # As text: accelerate's store_init_configuration takes no nested values and writes into a second folder.
        text = json.dumps({"title": title, **config}, indent=2, ensure_ascii=False, default=str)
        self.tracker.writer.add_text("config", textwrap.indent(text, "    "))  # indented: Markdown's block of code

    def log(self, metrics: dict, step: int) -> None:
        """Note {name: number} of a step."""
        self.tracker.log(metrics, step=step)

    def log_pictures(self, pictures: list, captions: Sequence[str], step: int) -> None:
        """Note the validation pictures of a step, each with its caption."""
        arrays = [np.asarray(picture.convert("RGB"))[None] for picture in pictures]  # (1, height, width, 3), 0 to 255
        names = [f"validation/{number} {caption}" for number, caption in enumerate(captions)]
        self.tracker.log_images(dict(zip(names, arrays, strict=True)), step=step, dataformats="NHWC")

    def finish(self) -> None:
        """Close the files; what is pending is written."""
        self.tracker.finish()


TRACKERS = {"wandb": WandB, "tensorboard": TensorBoard}


class Tracker:
    """Sends metrics and pictures to Weights & Biases, to TensorBoard, to both or nowhere.

    names: None (no tracking), one of "wandb" and "tensorboard", or a list of them. folder: of the run; the trackers'
    files go to folders `wandb` and `tensorboard` in it. title: of the run. config: its settings, as JSON could hold
    them. Of several processes, only the main one writes.
    The first failure of a tracker, whatever it is, ends it and leaves the other alone; `take_note()` then says it
    once. Raises ValueError for an unknown name.
    """

    def __init__(self, names: str | Sequence[str] | None, folder: Path, title: str, config: dict) -> None:
        names = [names] if isinstance(names, str) else list(dict.fromkeys(names or []))
        unknown = [repr(name) for name in names if name not in TRACKERS]
        if unknown:
            raise ValueError(f"unknown tracker {', '.join(unknown)}; known: {', '.join(TRACKERS)}, or None")
        self._notes: list[str] = []
        self._running: dict[str, Any] = {}
        for name in names:
            self._guard(name, self._start, name, folder, title, config)

    def log(self, metrics: dict, step: int) -> None:
        """Numbers of one step."""
        for name, tracker in list(self._running.items()):
            self._guard(name, tracker.log, metrics, step)

    def log_pictures(self, pictures: list, captions: Sequence[str], step: int) -> None:
        """Validation pictures (PIL, of any size) with their prompts, as many as pictures."""
        for name, tracker in list(self._running.items()) if pictures else ():
            self._guard(name, tracker.log_pictures, pictures, captions, step)

    def finish(self) -> None:
        """Flush and close. A second call does nothing."""
        for name in list(self._running):
            self._guard(name, self._running.pop(name).finish)

    def take_note(self) -> str | None:
        """Which trackers ended early and why, once; None otherwise."""
        note, self._notes = "; ".join(self._notes), []
        return note or None

    def _start(self, name: str, folder: Path, title: str, config: dict) -> None:
        from accelerate import PartialState

        # accelerate's trackers need this object; it is made here unless an Accelerator was there before. The question
        # is asked here as well, since accelerate lets W&B run in every process.
        if PartialState().is_main_process:
            self._running[name] = TRACKERS[name]()
            self._running[name].start(folder, title, config)

    def _guard(self, name: str, call: Callable, *args: Any) -> None:
        try:
            call(*args)
        except Exception as error:  # a tracker may fail in any way it likes: the training must not
            self._notes.append(f"tracking with {name} stopped: {type(error).__name__}: {' '.join(str(error).split())}")
            if name in self._running:
                with suppress(Exception):  # or the next run in this process would go on with this one's
                    self._running.pop(name).finish()

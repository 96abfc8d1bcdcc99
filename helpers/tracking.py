"""Weights & Biases beside a training run: silent, offline by default, and never the reason that training stops."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

TRACKERS = ("wandb",)


class Tracker:
    """Sends metrics and pictures to Weights & Biases, or nowhere.

    name: "wandb" or None (no tracking). Offline unless the environment variable WANDB_MODE says otherwise; its files
    go to `folder`/wandb. The first failure, whatever it is, ends the tracking; `take_note()` then says it once.
    Raises ValueError for an unknown name.
    """

    def __init__(self, name: str | None, folder: Path, title: str, config: dict) -> None:
        if name is not None and name not in TRACKERS:
            raise ValueError(f"unknown tracker {name!r}; known: {', '.join(TRACKERS)}, or None")
        self._note: str | None = None
        self._run: Any = None
        if name == "wandb":
            self._guard(self._start, folder, title, config)

    def log(self, metrics: dict, step: int) -> None:
        """Numbers of one step."""
        if self._run is not None:
            self._guard(self._run.log, metrics, step=step)

    def log_pictures(self, pictures: list, captions: list[str], step: int) -> None:
        """Validation pictures (PIL) with their prompts."""
        if self._run is not None:
            self._guard(self._log_pictures, pictures, captions, step)

    def finish(self) -> None:
        """Flush and close."""
        if self._run is not None:
            self._guard(self._run.finish)
            self._run = None

    def take_note(self) -> str | None:
        """Why tracking ended, once; None otherwise."""
        note, self._note = self._note, None
        return note

    def _start(self, folder: Path, title: str, config: dict) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        settings = wandb.Settings(silent=True, console="off", show_errors=False, show_warnings=False, show_info=False)
        mode = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project="stable-diffusion-lora", name=title, dir=str(folder), config=config, mode=mode, settings=settings
        )

    def _log_pictures(self, pictures: list, captions: list[str], step: int) -> None:
        import wandb

        images = [wandb.Image(p, caption=c) for p, c in zip(pictures, captions, strict=True)]
        self._run.log({"validation": images}, step=step)

    def _guard(self, call, *args, **kwargs) -> None:
        try:
            call(*args, **kwargs)
        except Exception as error:  # a tracker may fail in any way it likes: the training must not
            self._run = None
            self._note = f"tracking stopped: {type(error).__name__}: {error}"

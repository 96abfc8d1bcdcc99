"""What a training run tells of each step: a line in metrics.jsonl, and a bar, trackers or a callback if asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch
from tqdm.auto import tqdm

from helpers.presets.configuration import TrainConfig
from helpers.training.runs import Run
from helpers.training.tracking import Tracker

SMOOTHING = 0.05  # of the bar's loss and speed: the share of the newest step


def memory_in_use(device: torch.device) -> int:
    """Bytes: the most that PyTorch has allocated on a CUDA device, elsewhere what this process occupies now."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


class Progress:
    """Writes down each step of a run. Only the process that `writes` does; in the others nothing happens.

    bar: whether to show a progress bar, with loss, pictures a second, memory and the time left.
    on_log: is called with (step, metrics) after each step.
    """

    def __init__(
        self,
        run: Run,
        config: TrainConfig,
        device: torch.device,
        writes: bool,
        tracker: Tracker,
        bar: bool,
        on_log: Callable[[int, dict], None] | None,
    ) -> None:
        self.run, self.config, self.device, self.writes = run, config, device, writes
        self.tracker, self.show_bar, self.on_log = tracker, bar, on_log
        self.loss = self.seconds = 0.0
        self.skipped = 0  # steps that fp16 did not take, since started

    @contextmanager
    def started(self, step: int) -> Iterator[None]:
        """Within the block steps are logged, from that one on."""
        if not self.writes:
            yield
            return
        settings = {"desc": self.run.dataset, "unit": "step", "disable": not self.show_bar}
        with (
            tqdm(total=self.config.steps, initial=step, **settings) as self.bar,
            (self.run.dir / "metrics.jsonl").open("a", buffering=1, encoding="utf-8") as self.file,
        ):
            yield

    def log(self, step: int, metrics: dict, seconds: float) -> None:
        """The metrics of one step, and the time it took, to everyone who wants to know."""
        if not self.writes:
            return
        new = SMOOTHING if self.seconds else 1.0
        self.loss += new * (metrics["loss"] - self.loss)
        self.seconds += new * (seconds - self.seconds)
        speed = self.config.batch_size / max(self.seconds, 1e-9)
        self.skipped += "skipped" in metrics
        sent = {key: value for key, value in metrics.items() if key != "step" and value is not None}
        sent["pictures_per_second"] = speed
        self.tracker.log(sent, step)
        if note := self.tracker.take_note():
            metrics["note"] = note
        self.file.write(json.dumps(metrics) + "\n")
        memory = f"{memory_in_use(self.device) / 2**30:.1f} GiB"
        shown = {"loss": f"{self.loss:.3f}", "pictures": f"{speed:.1f}/s", "memory": memory}
        shown |= {"skipped": str(self.skipped)} if self.skipped else {}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        if self.on_log is not None:
            self.on_log(step, metrics)

"""What the benchmarks share: blocks timed in turn, ratios with intervals, and the peak memory of new processes."""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol
from unittest.mock import patch

import numpy as np
import torch

from helpers.base.paths import ROOT


class Trains(Protocol):
    """One of the things that are compared."""

    def train(self, steps: int) -> None: ...


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- time --------------------------------------------------------------------------------------------------------


def block_seconds(side: Trains, steps: int, device: torch.device) -> float:
    """Seconds of one training step, the mean over a block of them."""
    gc.collect()
    gc.disable()  # a collection that falls into one block would be counted against one side
    try:
        began = time.perf_counter()
        side.train(steps)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / steps
    finally:
        gc.enable()


def time_in_turn(
    sides: Mapping[str, Trains], rounds: int, steps: int, warmup: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of a step in each block, by side: A, B, B, A, A, B … for two of them.

    The order turns round with every round, so that a machine that slows down or warms up slows all sides alike.
    """
    for side in sides.values():
        side.train(warmup)
    seconds = {name: [] for name in sides}
    gc.collect()
    gc.freeze()  # what is here now stays, and the collection before each block need not go through it
    try:
        for number in range(rounds):
            for name in list(sides) if number % 2 == 0 else reversed(sides):
                seconds[name].append(block_seconds(sides[name], steps, device))
    finally:
        gc.unfreeze()
    return seconds


def ratio_interval(ours: list[float], other: list[float], draws: int = 2000) -> list[float]:
    """95% interval of median(ours) / median(other): bootstrap over the pairs, which stay together. [low, high]"""
    pairs = np.array([ours, other])
    rows = np.random.default_rng(0).integers(len(ours), size=(draws, len(ours)))
    medians = np.median(pairs[:, rows], axis=2)  # [2, draws]
    return np.quantile(medians[0] / medians[1], [0.025, 0.975]).tolist()


def compare(amounts: Mapping[str, list[float]], one: str, other: str) -> dict:
    """Medians of two sides, the ratio of the first's to the second's, and its 95% interval."""
    medians = {name: statistics.median(amounts[name]) for name in (one, other)}
    ratio = medians[one] / medians[other]
    return {**medians, "ratio": ratio, "interval": ratio_interval(amounts[one], amounts[other])}


Piece = tuple[object, str, str]  # whose function, its name, and what the record calls the piece


class Stopwatch:
    """Where the time of something goes: seconds in each of its pieces, and in the rest.

    A piece is a function that is called on the way. It is replaced by one that looks at the clock before and after,
    so what is measured is the very code that is used. Pieces must not call each other.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            began = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += self.now() - began

        return call

    def once(self, run: Callable[[], object], names: list[str]) -> dict[str, float]:
        """Seconds of each piece in one run; "rest" is what was spent outside of them."""
        self.seconds.clear()
        began = self.now()
        run()
        whole = self.now() - began
        return {name: self.seconds[name] for name in names} | {"rest": whole - sum(self.seconds.values())}

    def medians(self, run: Callable[[], object], pieces: list[Piece], times: int) -> dict[str, float]:
        """Median seconds of each piece, and of the rest, over so many runs."""
        names = list(dict.fromkeys(name for _, _, name in pieces))
        with ExitStack() as replaced:
            for owner, attribute, name in pieces:
                function = getattr(owner, attribute)
                replaced.enter_context(patch.object(owner, attribute, self.timed(name, function)))
            runs = [self.once(run, names) for _ in range(times)]
        return {name: statistics.median(one[name] for one in runs) for name in [*names, "rest"]}


# --- memory ------------------------------------------------------------------------------------------------------


def peak_resident_bytes() -> int | None:
    """The most memory that this process has occupied so far; None where the system does not tell (Windows)."""
    # Not ru_maxrss where there is another way: on Linux a child's begins at what its parent occupied
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:
        return None
    # In bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_while(run: Callable[[], object], device: torch.device) -> dict[str, int] | None:
    """Run it in this process: {"peak": bytes, "growth": bytes of it that came after the imports}.

    On CUDA the peak is what PyTorch allocated there, which no import adds to. None where the system does not tell.
    """
    before = peak_resident_bytes()
    run()
    if device.type == "cuda":
        return {"peak": torch.cuda.max_memory_allocated()}
    after = peak_resident_bytes()
    return None if after is None else {"peak": after, "growth": after - before}


def in_new_process(benchmark: str, order: dict) -> dict[str, int] | None:
    """What a benchmark's `--worker` prints for that order, in a process of its own, which has done nothing else."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--worker", json.dumps(order)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peaks_in_turn(
    sides: tuple[str, ...], processes: int, peak: Callable[[str], dict[str, int] | None]
) -> dict[str, dict[str, list[int]]]:
    """{"peak" and, on a CPU, "growth": {side: bytes in each process}}, sides alternating; empty if nothing tells."""
    found = {side: [] for side in sides}
    for _ in range(processes):
        for side in sides:
            found[side].append(peak(side))
    first = found[sides[0]][0] if processes else None
    return {kind: {side: [told[kind] for told in found[side]] for side in sides} for kind in first or {}}

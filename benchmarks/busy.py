"""What a neighbour that computes costs a training step, by how PyTorch's threads wait: `python -m benchmarks.busy`

MiniSD's training step with every way of waiting, on a quiet machine and beside a busy process, in turn. See README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.pair import Settings as Model
from benchmarks.pair import build_side
from benchmarks.timing import compare
from helpers.base.paths import ROOT
from helpers.base.provenance import code_hash, versions

NAME = "busy"
CPU = torch.device("cpu")
# Read by the OpenMP runtime when torch loads it. OMP_WAIT_POLICY is OpenMP's own, for GNU's libgomp (PyTorch for Linux)
# and LLVM's libomp (for macOS); GOMP_SPINCOUNT is GNU's, KMP_BLOCKTIME (milliseconds) LLVM's and Intel's.
OLD, NEW = "default", "short spin"
WAITING: dict[str, dict[str, str]] = {
    OLD: {},
    NEW: {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
ASKED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
GOALS = {"busy_to_quiet": {"at_most": 2.5}, "new_to_old_when_quiet": {"at_most": 1.03}}
# A process that computes on one core, and one that does on as many as PyTorch takes, as another training run would
NEIGHBOURS = {
    "loop": "while True: pass",
    "torch": "import torch\nx = torch.randn(1024, 1024)\nwhile True: x = torch.tanh(x @ x)",
}


@dataclass(frozen=True)
class Settings:
    """model: "mini" (MiniSD) or "tiny" (to try the benchmark). rounds: blocks timed with each way of waiting, quiet and
    busy, of `steps` steps each. neighbour: a key of NEIGHBOURS. warmup: seconds that a neighbour gets to start."""

    model: str = "mini"
    rounds: int = 5
    steps: int = 5
    neighbour: str = "torch"
    warmup: float = 5.0

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.steps < 1:
            raise ValueError(f"rounds and steps must be at least 1, not {self.rounds} and {self.steps}")


# --- processes ---------------------------------------------------------------------------------------------------


def environment(waiting: str) -> dict[str, str]:
    """This process's environment, with nothing said of threads but what that way of waiting says."""
    return {name: value for name, value in os.environ.items() if name not in ASKED} | WAITING[waiting]


class Worker:
    """A training process of its own, as a runtime reads its variables once. It sleeps until it is asked for steps."""

    def __init__(self, waiting: str, settings: Settings) -> None:
        command = [sys.executable, "-m", f"benchmarks.{NAME}", "--worker", settings.model]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment(waiting), **pipes)
        self.seconds(1)  # imports, and the first step

    def seconds(self, steps: int) -> float:
        """Seconds of one step, the mean over so many."""
        self.process.stdin.write(f"{steps}\n")
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a training process ended with status {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def work(model: str) -> int:
    """What a `Worker` runs: for each number that it is sent so many steps, and the seconds of one as an answer."""
    side = build_side("ours", Model(model=model), CPU)
    for line in sys.stdin:
        steps = int(line)
        began = time.perf_counter()
        side.train(steps)
        print(json.dumps((time.perf_counter() - began) / steps), flush=True)
    return 0


@contextmanager
def neighbour(settings: Settings) -> Iterator[None]:
    """Within the block another process computes without a pause."""
    process = subprocess.Popen([sys.executable, "-c", NEIGHBOURS[settings.neighbour]], env=environment(OLD))
    try:
        time.sleep(settings.warmup)
        yield
    finally:
        process.kill()
        process.wait()


# --- the record --------------------------------------------------------------------------------------------------


def measure(settings: Settings) -> dict:
    """The whole benchmark: each round asks every worker when it is quiet, then every worker beside the neighbour."""
    quiet: dict[str, list[float]] = {name: [] for name in WAITING}
    busy: dict[str, list[float]] = {name: [] for name in WAITING}
    with ExitStack() as stack:
        workers = {name: Worker(name, settings) for name in WAITING}
        for worker in workers.values():
            stack.callback(worker.close)
        for number in range(settings.rounds):
            order = list(workers) if number % 2 == 0 else list(reversed(workers))
            for name in order:
                quiet[name].append(workers[name].seconds(settings.steps))
            with neighbour(settings):
                for name in order:
                    busy[name].append(workers[name].seconds(settings.steps))
    return {
        "settings": asdict(settings),
        "goals": GOALS,
        "waiting": WAITING,
        "seconds": {"quiet": quiet, "busy": busy},
        "busy_to_quiet": {
            name: compare({"busy": busy[name], "quiet": quiet[name]}, "busy", "quiet") for name in WAITING
        },
        "new_to_old_when_quiet": compare(quiet, NEW, OLD),
        "device": records.device_slug(CPU),
        "parallel": torch.__config__.parallel_info().split("Environment variables")[0].strip(),
        "versions": versions(),
        "code": {name: code_hash(name) for name in ("helpers.training.steps", "helpers.lora.layer")},
    }


def missed(record: dict) -> list[str]:
    """The goals that the new way of waiting does not meet."""
    found = {
        "busy_to_quiet": record["busy_to_quiet"][NEW]["ratio"],
        "new_to_old_when_quiet": record["new_to_old_when_quiet"]["ratio"],
    }
    return [name for name, goal in record["goals"].items() if not found[name] <= goal["at_most"]]


def table(record: dict) -> str:
    """A line for each way of waiting, and the goals."""
    lines = [f"{'':12}{'quiet, s':>10}{'busy, s':>10}   busy / quiet"]
    for name, found in record["busy_to_quiet"].items():
        spread = "{:.2f} to {:.2f}".format(*found["interval"])
        lines.append(f"{name:12}{found['quiet']:>10.3f}{found['busy']:>10.3f}   {found['ratio']:.2f} ({spread})")
    compared = record["new_to_old_when_quiet"]
    spread = "{:.3f} to {:.3f}".format(*compared["interval"])
    lines.append(f"quiet, {NEW} / {OLD}: {compared['ratio']:.3f} ({spread})")
    lines.append(f"goals not met: {', '.join(missed(record)) or 'none'}")
    return "\n".join(lines)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    default = Settings()
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=__doc__)
    parser.add_argument("--rounds", type=int, default=default.rounds, help="blocks timed with each way of waiting")
    parser.add_argument("--steps", type=int, default=default.steps, help="training steps in a block")
    parser.add_argument("--neighbour", choices=NEIGHBOURS, default=default.neighbour, help="what computes beside it")
    parser.add_argument("--model", choices=("mini", "tiny"), default=default.model, help="tiny: to try the benchmark")
    parser.add_argument("--results", type=Path, help="folder of the record; by default results/ here, none with tiny")
    parser.add_argument("--check", action="store_true", help="exit status 1 when a goal is missed")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    given = vars(arguments(argv))
    check, model, folder = given.pop("check"), given.pop("worker"), given.pop("results")
    if model:
        return work(model)
    settings = Settings(**given)
    record = measure(settings)
    if folder := folder or (None if settings.model == "tiny" else records.RESULTS):
        records.write_record(folder / f"{record['device']}.json", NAME, record)
    print(table(record))
    return 1 if check and missed(record) else 0


if __name__ == "__main__":
    sys.exit(main())

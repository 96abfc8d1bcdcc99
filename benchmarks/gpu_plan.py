"""Which points `benchmarks.gpu` measures, in which order, and which of them still fit into its minutes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace

import torch

from benchmarks.gpu_loops import ENCODED, HALF, Point, Settings
from benchmarks.gpu_model import SD, drawing_operations, operations, step_operations
from benchmarks.loops import DATASET
from helpers.base.device import has_bfloat16
from helpers.presets.configuration import Preset
from helpers.presets.variants import get_preset

RANK, BATCH = 16, 4
BASE, STOCK = f"rank {RANK}, batch {BATCH}", f"stock loop, batch {BATCH}"
AGAIN, ENCODING = f"{BASE}, again", "encoding"
LARGEST, COMPILED = "batch 16", f"compile, batch {BATCH}"
# What the course does not do and might: {point: (ways of benchmarks.gpu_ways, settings)}, each beside BASE
FASTER: dict[str, tuple[tuple[str, ...], dict]] = {
    "channels_last": ((), {"channels_last": True}),
    "cudnn.benchmark": (("cudnn_benchmark",), {}),
    "half-precision norms": (("half_norms",), {}),
    "LoRA without a round trip": (("lean_lora",), {}),
    "encoders off the GPU": (("encoders_off",), {}),
    "all of these": (("cudnn_benchmark", "half_norms", "lean_lora", "encoders_off"), {"channels_last": True}),
}
# Drawing so many pictures with an adapter in these ways, each beside the course's own within its point
DRAWING: dict[str, tuple[int, tuple[str, ...]]] = {
    "drawing 4 in autocast": (4, ("autocast",)),
    "drawing 4 merged": (4, ("merged",)),
    "drawing 16 by free memory": (16, ("free_memory",)),
}
FULL = "no variant"  # the rung of a GPU whose memory suffices for a batch of 8 at once
COMPILE_SECONDS = 90.0  # expected of the first torch.compile on a GPU
FIRST_SHARE = 0.05  # of the ceiling: the rate expected of a kind of point before there was one


def precision_of(device: torch.device) -> str:
    """The half precision that the device has: fp16 on a GPU without bfloat16 of its own."""
    return "bf16" if device.type == "cpu" or has_bfloat16(device) else "fp16"


def preset_with(settings: Settings, precision: str, **changed: object) -> Preset:
    """Stable Diffusion's preset in a precision, with other settings replaced. Raises ValueError for an unknown one."""
    numbers = {"num_inference_steps": settings.sampling_steps, "seed": settings.seed}
    return get_preset(f"{SD}@{precision}", **numbers, **changed)


def plan(settings: Settings, precision: str, rungs: dict[str, dict]) -> list[Point]:
    """All points, those first that matter most, and torch.compile, whose time nobody knows beforehand, last.

    rungs: {name: settings that differ from the preset's}, each measured in bf16 and, as NAME-fp16, in fp16.
    """

    def training(name: str, kind: str = "training", precision: str = precision, **changed) -> Point:
        return Point(name, kind, preset_with(settings, precision, **{"rank": RANK, "batch_size": BATCH} | changed))

    def rung(name: str, precision: str, changed: dict) -> Point:
        title = name if precision == "bf16" else f"{name}-{precision}"
        return Point(f"memory {title}", "rung", preset_with(settings, precision, **changed))

    other = next(name for name in HALF if name != precision)
    everyone = {FULL: {}} | rungs
    return [
        training(STOCK, "stock"),
        training(BASE),
        *(training(f"rank {rank}", rank=rank) for rank in (1, 64, 4)),
        *(training(f"batch {size}", batch_size=size) for size in (1, 8, 16)),
        training("checkpointing", gradient_checkpointing=True),
        training("checkpointing, batch 1", gradient_checkpointing=True, batch_size=1),
        training(AGAIN),
        Point(ENCODING, "encoding", preset_with(settings, precision)),
        *(rung(name, precision, changed) for name, changed in everyone.items()),
        *(Point(f"sampling, batch {n}", "sampling", preset_with(settings, precision), n) for n in (1, 4, 8)),
        *(replace(training(name, **changed), ways=ways) for name, (ways, changed) in FASTER.items()),
        *(Point(name, "drawing", preset_with(settings, precision), *drawn) for name, drawn in DRAWING.items()),
        training(other, precision=other),
        *(rung(name, other, changed) for name, changed in everyone.items()),
        training(COMPILED, "compile", compile=True),
        training(f"compile, {LARGEST}", "compile", compile=True, batch_size=16),
    ]


def impossible(point: Point, device: torch.device) -> str | None:
    """Why a point cannot be measured on such a device at all."""
    if device.type == "cpu" and point.precision == "fp16":
        return "fp16 needs a GPU"
    if device.type == "cpu" and point.kind == "compile":
        return "torch.compile is measured on a GPU only"
    if point.precision != "fp16" and precision_of(device) == "fp16":
        return "this GPU has no bfloat16 of its own"
    return None


# --- the minutes -------------------------------------------------------------------------------------------------


def work_of(point: Point, settings: Settings) -> int:
    """Operations of everything that the point executes, by which its time is foretold."""
    size, config = settings.model, point.preset.train
    if point.kind == "encoding":
        each = operations(size)
        return (settings.drawings + 1) * ENCODED * (each["encode"] + each["text"])
    if point.kind in ("sampling", "drawing"):
        return 2 * (settings.drawings + 1) * drawing_operations(size, point.batch, settings.sampling_steps)
    rounds = settings.rung_rounds if point.kind == "rung" else settings.rounds
    steps = settings.warmup + rounds * settings.steps
    work = steps * step_operations(size, config, point.kind == "stock")
    if point.kind == "rung":
        work += drawing_operations(size, len(point.preset.validation_prompts[DATASET]), settings.sampling_steps)
    return work


@dataclass
class Budget:
    """The minutes of a run: whether a point still fits, judged by the slowest of its kind so far.

    ceiling: operations a second of the matrix product, from which the first of each kind is guessed.
    """

    seconds: float
    ceiling: float
    began: float
    slowest: dict[str, float] = field(default_factory=dict)  # operations a second, by kind
    compiling: float = COMPILE_SECONDS

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def expected(self, kind: str, work: int) -> float:
        """Seconds that a point of so many operations may take. A compiled one steps like others, once it has begun."""
        compiling = self.compiling if kind == "compile" else 0.0
        rate = self.slowest.get("training" if kind == "compile" else kind, FIRST_SHARE * self.ceiling)
        return compiling + work / rate

    def note(self, kind: str, work: int, seconds: float, found: dict) -> None:
        """Learn from a point that took so long."""
        if kind == "compile":
            self.compiling = max(self.compiling, found["warmup_seconds"])
        else:
            self.slowest[kind] = min(self.slowest.get(kind, math.inf), work / seconds)

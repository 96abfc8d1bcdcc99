"""What training and sampling Stable Diffusion cost on a CUDA GPU: `python -m benchmarks.gpu`

Stable Diffusion 2.1-base with random weights, one factor at a time around rank 16, batch 4, bf16, no checkpointing;
the loop of stock scripts beside the course's; the memory of each variant of the presets; pictures. See README.md here.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.gpu_loops import HALF, KINDS, Bench, Meter, Models, Point, Settings, matmul_ceiling
from benchmarks.gpu_model import CHANGES, SD, lora_step_operations, operations
from benchmarks.gpu_plan import (
    AGAIN,
    BASE,
    COMPILED,
    ENCODING,
    FASTER,
    LARGEST,
    RANK,
    STOCK,
    Budget,
    impossible,
    plan,
    precision_of,
    preset_with,
    work_of,
)
from benchmarks.timing import compare, default_device
from helpers.base.provenance import code_hash, versions
from helpers.presets.configuration import ATTENTION, Preset
from helpers.presets.memory import rungs
from helpers.presets.variants import get_preset
from helpers.training.validation import validation_steps

NAME = "gpu"
GOALS = {
    "caching_vs_stock": {"at_least": 1.6},
    "compile_vs_stock": {"at_least": 2.0},
    "share_of_ceiling_at_batch_16": {"at_least": 0.30, "stretch": 0.45},
    "gb_with_checkpointing_at_batch_1": {"at_most": 8.0},
    "rank_64_vs_rank_1": {"at_most": 1.10},
}
CODE = {
    "helpers": (
        *("training.steps", "training.draws", "training.loop", "lora.layer", "lora.injection"),
        *("diffusion.sampling", "diffusion.components", "diffusion.schedule", "presets.sd_configs"),
    ),
    "benchmarks": ("gpu", "gpu_loops", "gpu_model", "gpu_plan", "gpu_ways", "loops"),
}
PACKAGES = ("peft", "accelerate")
# To try the benchmark itself: seconds on a CPU
TINY = Settings("tiny", rounds=2, steps=1, warmup=1, rung_rounds=1, drawings=2, sampling_steps=2, matrix=64)
# The homework's figures: how many pictures of each prompt. Figures 6 and 7 show the validations'.
FIGURES = {"fig03": 4, "fig04": 4, "fig05": 4, "fig08": 2, "fig09": 2}


# --- what is measured --------------------------------------------------------------------------------------------


def outcome(run: Callable[[], dict]) -> dict | str:
    """What a point measured, or in words why it could not: one that fails must not take the others with it."""
    try:
        return run()
    except Exception as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text:
            return "out of memory"
        return f"failed: {type(error).__name__}: {(text.strip() or 'no message').splitlines()[0]}"


def measure(
    settings: Settings, rungs: dict[str, dict], device: torch.device, keep: Callable[[dict], None] = lambda record: None
) -> dict:
    """The whole benchmark. keep: gets the record as it is after each point, so that a run that is killed leaves it."""
    began = time.monotonic()
    bench = Bench(settings, device, Meter(device))
    precision = precision_of(device)
    ceiling = matmul_ceiling(bench, HALF[precision])
    budget, models = Budget(60 * settings.minutes, ceiling, began), Models(settings.model, device)
    points = plan(settings, precision, rungs)
    found: dict[str, dict | str] = dict.fromkeys((point.name for point in points), "the run ended before")
    head = describe(settings, device, precision, ceiling)
    for point in points:
        found[point.name] = measure_point(point, models, bench, budget)
        record = head | summary(settings, ceiling, found) | {"minutes": (time.monotonic() - began) / 60}
        keep(record)
    return record


def measure_point(point: Point, models: Models, bench: Bench, budget: Budget) -> dict | str:
    """What was measured, or why nothing was."""
    work = work_of(point, bench.settings)
    if reason := impossible(point, bench.device):
        return reason
    if (expected := budget.expected(point.kind, work)) > budget.left:
        return f"no time: {expected:.0f} s expected, {max(0.0, budget.left):.0f} s left"
    began = time.monotonic()
    found = outcome(lambda: KINDS[point.kind](point, models.get(point), bench))
    if isinstance(found, dict):
        budget.note(point.kind, work, time.monotonic() - began, found)
        return settings_of(point) | found
    models.drop()  # whatever state it was left in
    return found


def settings_of(point: Point) -> dict:
    """What distinguishes the point from others."""
    config = point.preset.train
    names = ("rank", "batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "compile")
    ways = {"ways": list(point.ways)} if point.ways else {}
    return {"kind": point.kind, "precision": point.precision, **{name: getattr(config, name) for name in names}, **ways}


# --- what follows from it ----------------------------------------------------------------------------------------


def describe(settings: Settings, device: torch.device, precision: str, ceiling: float) -> dict:
    """The device, the software, and how many operations there are."""
    on_cuda = device.type == "cuda"
    steps = {"lora_step": False, "lora_step_with_checkpointing": True}
    return {
        "settings": asdict(settings),
        "goals": GOALS,
        "precision": precision,
        "ceiling_operations_per_second": ceiling,
        "operations_per_picture": {
            **operations(settings.model),
            **{name: lora_step_operations(settings.model, RANK, ATTENTION, again) for name, again in steps.items()},
        },
        "device": records.device_slug(device),
        "device_name": torch.cuda.get_device_name(device) if on_cuda else device.type,
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_cuda else None,
        "versions": {**versions(), "cuda": torch.version.cuda, **{name: version(name) for name in PACKAGES}},
        "code": {f"{place}.{name}": code_hash(f"{place}.{name}") for place in CODE for name in CODE[place]},
    }


def summary(settings: Settings, ceiling: float, found: dict[str, dict | str]) -> dict:
    """The points that were measured, the others with the reason, what the goals are about, and the homework."""
    points = {name: point for name, point in found.items() if isinstance(point, dict)}
    return {
        "points": points,
        "not_measured": {name: reason for name, reason in found.items() if isinstance(reason, str)},
        "measures": measures(points, ceiling),
        "homework": homework(preset_with(settings, "bf16"), points),
    }


def measures(points: dict[str, dict], ceiling: float) -> dict[str, dict]:
    """What the goals are about, as far as it was measured: {"value": number} and, of a ratio of times, its interval."""

    def times_as_fast(one: str, other: str) -> dict | None:
        """Pictures a second of one point to those of another."""
        if not {one, other} <= points.keys():
            return None
        rates = {name: [points[name]["batch_size"] / s for s in points[name]["blocks"]] for name in (one, other)}
        compared = compare(rates, one, other)
        return {"value": compared["ratio"], "interval": compared["interval"]}

    def ceiling_share(name: str) -> float | None:
        return points[name]["operations_per_second"] / ceiling if name in points else None

    found = {
        "caching_vs_stock": times_as_fast(BASE, STOCK),
        "compile_vs_stock": times_as_fast(COMPILED, STOCK),
        "rank_64_vs_rank_1": times_as_fast("rank 1", "rank 64"),  # = time of a step at rank 64 / at rank 1
        "drift": times_as_fast(AGAIN, BASE),
        **{f"{name} vs {BASE}": times_as_fast(name, BASE) for name in FASTER},
    }
    if (share := ceiling_share(LARGEST)) is not None:
        compiled = ceiling_share(f"compile, {LARGEST}")
        found["share_of_ceiling_at_batch_16"] = {"value": share, "with_compile": compiled}
    if peak := points.get("checkpointing, batch 1", {}).get("peak_allocated"):
        found["gb_with_checkpointing_at_batch_1"] = {"value": peak / 1e9}
    return {name: measure for name, measure in found.items() if measure}


def homework_pictures(preset: Preset) -> int:
    """Pictures of all validations of both runs, and of the homework's figures."""
    figures = sum(count * len(preset.figure_prompts[figure]) for figure, count in FIGURES.items())
    return figures + sum(
        len(validation_steps(preset.train, spec.train_rows)) * len(preset.validation_prompts[spec.name])
        for spec in preset.datasets
    )


def homework(preset: Preset, points: dict[str, dict]) -> dict[str, dict]:
    """Seconds of the whole homework on each rung that was measured: both caches, 2 x 1000 steps, all pictures."""
    if ENCODING not in points:
        return {}
    pictures, rows = homework_pictures(preset), sum(spec.train_rows for spec in preset.datasets)
    steps = preset.train.steps * len(preset.datasets)
    found = {}
    for name, point in points.items():
        if point["kind"] == "rung":
            each = {
                "caches": rows * points[ENCODING]["seconds_per_picture"],
                "training": steps * point["training"]["step_seconds"],
                "pictures": pictures * point["validation"]["seconds"] / point["validation"]["pictures"],
            }
            found[name] = {**each, "whole": sum(each.values())}
    return found


def missed(record: dict) -> list[str]:
    """The goals that what was measured does not meet. What was not measured is in `not_measured`."""

    def is_met(name: str) -> bool:
        goal, value = record["goals"][name], record["measures"][name]["value"]
        return goal.get("at_least", -math.inf) <= value <= goal.get("at_most", math.inf)

    return [name for name in record["goals"] if name in record["measures"] and not is_met(name)]


# --- the command -------------------------------------------------------------------------------------------------


def table(record: dict) -> str:
    """All points, a line each, those that were not measured with the reason; then the goals."""
    lines = [f"{record['device_name']}: ceiling {record['ceiling_operations_per_second'] / 1e12:.2f} TFLOP/s"]
    lines += [f"{name:28} {line(point, record)}" for name, point in record["points"].items()]
    lines += [f"{name:28} not measured: {reason}" for name, reason in record["not_measured"].items()]
    for name, goal in record["goals"].items():
        said = "; ".join(f"{bound.replace('_', ' ')} {number}" for bound, number in goal.items())
        value = f"{record['measures'][name]['value']:.3f}" if name in record["measures"] else "not measured"
        lines.append(f"{name.replace('_', ' '):34} {value}   goal {said}")
    return "\n".join(lines)


def line(point: dict, record: dict) -> str:
    """One point in words."""
    if point["kind"] == "encoding":
        return f"{1e3 * point['seconds_per_picture']:.1f} ms a picture"
    if point["kind"] == "sampling":
        return f"{point['ours']:.2f} pictures/s, stock {point['stock']:.2f}, ratio {point['ratio']:.3f}"
    if point["kind"] == "drawing":
        return f"{point['way']:.2f} pictures/s, as the course draws {point['course']:.2f}, ratio {point['ratio']:.3f}"
    if point["kind"] == "rung":
        peaks = ", ".join(f"{phase} {gigabytes(point[phase])}" for phase in ("training", "validation"))
        return f"{1e3 * point['training']['step_seconds']:.1f} ms a step, {peaks}"
    rate = point["operations_per_second"]
    share = 100 * rate / record["ceiling_operations_per_second"]
    seen = f"{1e3 * point['step_seconds']:.1f} ms a step, {point['pictures_per_second']:.2f} pictures/s"
    return f"{seen}, {rate / 1e12:.2f} TFLOP/s ({share:.1f}%), {gigabytes(point)}"


def gigabytes(peaks: dict) -> str:
    return f"{peaks['peak_allocated'] / 1e9:.2f} GB" if "peak_allocated" in peaks else "memory unknown"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=__doc__)
    parser.add_argument("--minutes", type=float, default=Settings().minutes, help="nothing new is begun after so many")
    parser.add_argument("--model", choices=tuple(CHANGES), default=SD, help="tiny: to try the benchmark")
    parser.add_argument("--results", type=Path, help="folder of the record; by default results/ here, none with tiny")
    parser.add_argument("--check", action="store_true", help="exit status 1 when a goal is missed")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Exit status 0, 1 when a point failed or (with --check) a goal was missed, 2 when there is no CUDA GPU."""
    given, device = arguments(argv), default_device()
    tiny = given.model == "tiny"
    if device.type != "cuda" and not tiny:
        print("benchmarks.gpu needs a CUDA GPU, and torch sees none; --model tiny tries it on a CPU", file=sys.stderr)
        return 2
    settings = replace(TINY if tiny else Settings(), minutes=given.minutes)
    folder = given.results or (None if tiny else records.RESULTS)

    def keep(record: dict) -> None:
        if folder:
            records.write_record(folder / f"{record['device']}.json", NAME, record)

    record = measure(settings, rungs(get_preset(SD)), device, keep)
    print(table(record))
    failed = any(reason.startswith("failed") for reason in record["not_measured"].values())
    return 1 if failed or (given.check and missed(record)) else 0


if __name__ == "__main__":
    sys.exit(main())

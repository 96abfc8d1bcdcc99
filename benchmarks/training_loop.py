"""What the course's training loop costs beside other loops, and as the data grows: `python -m benchmarks.training_loop`

Four ratios, each with a goal: a step against the bare minimum, pictures a second against a loop without cached latents,
a step on 100,000 pictures against one on 100, and the memory of a run with validations against one without. See
README.md here.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from benchmarks import records
from benchmarks.loops import CourseLoop, Settings, StockLoop, bare_loop, course_loop, doodles, stock_loop
from benchmarks.pair import BATCHES, load_model, random_cache
from benchmarks.timing import (
    Stopwatch,
    compare,
    default_device,
    in_new_process,
    peak_while,
    peaks_in_turn,
    time_in_turn,
)
from helpers.base.files import write_json_atomic
from helpers.base.provenance import code_hash, tensor_hash, versions
from helpers.data import caches
from helpers.data.caches import LatentCache, build_cache
from helpers.diffusion.components import Components
from helpers.training import draws
from helpers.training import loop as training
from helpers.training.validation import held_out_loss

NAME = "training_loop"
GOALS = {
    "step_time_vs_bare": {"at_most": 1.03},
    "train_images_per_s_vs_stock": {"at_least": 1.5},
    "cost_per_step_100_to_100000": {"at_most": 1.03},
    "validation_memory_vs_training": {"at_most": 1.1},
}
CODE = (  # modules of helpers
    *("training.loop", "training.steps", "training.draws", "training.progress", "training.validation"),
    *("data.caches", "diffusion.schedule", "diffusion.sampling", "lora.layer", "lora.injection"),
)
CAPTIONS = 16  # different ones in a cache of random latents
CHUNK = 10_000  # random latents that are in memory at once


# --- the three loops ---------------------------------------------------------------------------------------------


def compare_loops(settings: Settings, folder: Path, device: torch.device) -> dict:
    """The course's loop against the bare one and the stock one: times, their pieces, and what was learnt."""
    components = load_model(settings.model, device)
    pictures, held_out = (doodles(settings, split, components.resolution) for split in ("train", "held_out"))
    began = time.perf_counter()
    cache = build_cache(components, pictures, folder, "train")
    cache_seconds = time.perf_counter() - began
    held_out = build_cache(components, held_out, folder, "held_out")

    start = held_out_loss(components, held_out) if settings.loss_steps else None
    with course_loop(settings, cache, folder, components) as ours:
        bare, stock = bare_loop(settings, cache, device), stock_loop(settings, pictures, device)
        loops = {"ours": ours, "bare": bare, "stock": stock}
        seconds = time_in_turn(loops, settings.rounds, settings.steps, settings.warmup, device)
        pieces = {
            name: Stopwatch(device).medians(lambda loop=loop: loop.train(1), loop.pieces(), settings.piece_steps)
            for name, loop in {"ours": ours, "stock": stock}.items()
        }
        found = {
            "step_time_vs_bare": compare(seconds, "ours", "bare"),
            "train_images_per_s_vs_stock": against_stock(settings, seconds, pieces["stock"], cache_seconds),
        }
        where = {"bookkeeping" if piece == "rest" else piece: 1e3 * s for piece, s in pieces["ours"].items()}
        losses = losses_after(settings.loss_steps, ours, stock, held_out, start) if settings.loss_steps else None
    return {"measures": found, "where_a_step_goes_ms": where, "held_out_loss": losses}


def against_stock(settings: Settings, seconds: dict[str, list[float]], pieces: dict, cache_seconds: float) -> dict:
    """Pictures a second of both loops; what a stock step is made of, and when our cache has paid off."""
    rates = {name: [settings.batch_size / block for block in seconds[name]] for name in ("ours", "stock")}
    shares = {piece: spent / sum(pieces.values()) for piece, spent in pieces.items()}
    saved = statistics.median(seconds["stock"]) - statistics.median(seconds["ours"])
    return {
        **compare(rates, "ours", "stock"),
        "shares": shares,
        "ratio_bound": 1 / shares["unet"],  # of a loop that did nothing but what both must do
        "cache_seconds": cache_seconds,
        "steps_until_cache_pays": math.ceil(cache_seconds / saved) if saved > 0 else None,
    }


def losses_after(steps: int, ours: CourseLoop, stock: StockLoop, held_out: LatentCache, start: float) -> dict:
    """Held-out loss at the start and after the same number of steps of both loops; at least those already taken."""
    steps = max(steps, ours.step, stock.step)
    for loop in (ours, stock):
        loop.train(steps - loop.step)
    ends = {name: held_out_loss(loop.components, held_out) for name, loop in {"ours": ours, "stock": stock}.items()}
    difference = abs(ends["ours"] - ends["stock"]) / ends["stock"]
    return {"steps": steps, "start": start, **ends, "relative_difference": difference}


# --- the size of the data ----------------------------------------------------------------------------------------


@dataclass
class Drawing:
    """The draws of a loop's steps alone, without training."""

    course: CourseLoop
    step: int = 0

    def train(self, steps: int) -> None:
        loop = self.course.loop
        for _ in range(steps):
            draws.draw_step(loop.config, loop.cache, self.step, len(loop.components.noise_scheduler.alphas_cumprod))
            self.step += 1


def mapped_cache(components: Components, rows: int, folder: Path, seed: int) -> LatentCache:
    """Random latents of so many pictures, written as `helpers.data.caches` does and read through memory mapping."""
    small = random_cache(components, CAPTIONS, seed)
    generator = draws.generator_for(seed, "mapped cache", rows)
    latents = {name: caches.new_array(folder, name, (rows, *components.latent_shape)) for name in ("mean", "std")}
    for start in range(0, rows, CHUNK):
        chunk = latents["mean"][start : start + CHUNK]
        chunk[:] = torch.randn(chunk.shape, generator=generator).numpy()
        latents["std"][start : start + CHUNK] = 0.1
    index = torch.randint(CAPTIONS, (rows,), generator=generator)
    others = {name: getattr(small, name) for name in caches.ARRAYS if name not in latents} | {"caption_index": index}
    for name, tensor in others.items():
        np.save(folder / f"{name}.npy", tensor.numpy())
    content = tensor_hash({**{name: torch.from_numpy(array) for name, array in latents.items()}, **others})
    write_json_atomic(folder / "index.json", {"key": "random", "content": content, "captions": []})
    with patch.object(caches, "MAP_ABOVE", 0):
        return caches.read_cache(folder, "random")


def rows_that_fit(rows: tuple[int, ...], latent_bytes: int, free: int) -> list[int]:
    """The sizes, from small to large, whose latents (mean and std) fill no more than half of the free disk."""
    fitting, total = [], 0
    for count in sorted(rows):
        total += 2 * latent_bytes * count
        if total <= free / 2:
            fitting.append(count)
    return fitting


def compare_sizes(settings: Settings, folder: Path, device: torch.device) -> dict | None:
    """The cost of a whole step, and of its draw alone, with caches of different sizes; None if not even two fit."""
    components = load_model(settings.model, device)
    free = shutil.disk_usage(folder).free
    sizes = rows_that_fit(settings.rows, 4 * math.prod(components.latent_shape), free)
    if len(sizes) < 2:
        return None
    found = {rows: mapped_cache(components, rows, folder / str(rows), settings.seed) for rows in sizes}
    # Training draws the order of an epoch once. Here sizes take turns, and must not push out each other's
    orders = patch.object(draws, "epoch_order", lru_cache(2 * len(sizes))(draws.epoch_order.__wrapped__))
    with orders, course_loop(settings, found[sizes[0]], folder, components) as course:
        loops = {str(rows): replace(course, loop=replace(course.loop, cache=cache)) for rows, cache in found.items()}
        seconds = time_in_turn(loops, settings.size_rounds, settings.steps, settings.warmup, device)
        drawing = {rows: Drawing(loop) for rows, loop in loops.items()}
        drawn = time_in_turn(drawing, settings.size_rounds, 10 * settings.steps, settings.warmup, device)
    return {
        **compare(seconds, str(sizes[-1]), str(sizes[0])),
        "rows": sizes,
        "left_out_for_lack_of_disk": sorted(set(settings.rows) - set(sizes)),
        "step_seconds": {rows: statistics.median(blocks) for rows, blocks in seconds.items()},
        "draw_step_ms": {rows: 1e3 * statistics.median(blocks) for rows, blocks in drawn.items()},
    }


# --- memory ------------------------------------------------------------------------------------------------------


def train_briefly(settings: Settings, folder: Path, device: torch.device, validates: bool) -> None:
    """Some steps, a validation as in a run (pictures of all prompts, held-out loss) if asked for, and some more."""
    components = load_model(settings.model, device)
    cache = random_cache(components, BATCHES * settings.batch_size, settings.seed)
    held_out = random_cache(components, settings.held_out, settings.seed)
    with course_loop(settings, cache, folder, components, held_out) as course:
        course.train(settings.memory_steps)
        if validates:
            training.validate(course.loop, course.step, course.progress.tracker)
        course.train(settings.memory_steps)


def measure_peak(side: str, settings: Settings) -> dict[str, int] | None:
    """Train in this process, with ("validating") or without ("training") a validation; see `peak_while`."""
    device = default_device()
    with tempfile.TemporaryDirectory() as folder:
        return peak_while(lambda: train_briefly(settings, Path(folder), device, side == "validating"), device)


def compare_memory(settings: Settings) -> dict | None:
    """Peak memory of processes that validate and of others that do not; None where the system does not tell it."""
    sides = ("validating", "training")
    orders = {side: {"side": side, "settings": asdict(settings)} for side in sides}
    found = peaks_in_turn(sides, settings.processes, lambda side: in_new_process(NAME, orders[side]))
    if not found:
        return None
    growth = {"without_imports": compare(found["growth"], *sides)} if "growth" in found else {}
    return {**compare(found["peak"], *sides), **growth}


# --- the record --------------------------------------------------------------------------------------------------


def measure(settings: Settings) -> dict:
    """The whole benchmark."""
    device = default_device()
    # First, while this process is small itself: it must not crowd those whose memory is measured
    memory = compare_memory(settings)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        loops = compare_loops(settings, Path(folder) / "loops", device)
        sizes = compare_sizes(settings, Path(folder), device)
    others = {"cost_per_step_100_to_100000": sizes, "validation_memory_vs_training": memory}
    measures = loops.pop("measures") | {name: found for name, found in others.items() if found}
    return {
        "settings": asdict(settings) | {"rows": list(settings.rows)},
        "goals": GOALS,
        "measures": measures,
        **{name: found for name, found in loops.items() if found},
        "device": records.device_slug(device),
        "threads": torch.get_num_threads(),
        "versions": {**versions(), **{name: version(name) for name in ("peft", "accelerate", "datasets")}},
        "code": {f"helpers.{name}": code_hash(f"helpers.{name}") for name in CODE},
    }


def missed(record: dict) -> list[str]:
    """The measures whose ratio is not what its goal says."""

    def is_met(name: str) -> bool:
        goal, ratio = record["goals"][name], record["measures"][name]["ratio"]
        return goal.get("at_least", -math.inf) <= ratio <= goal.get("at_most", math.inf)

    return [name for name in record["measures"] if not is_met(name)]


# --- the command -------------------------------------------------------------------------------------------------

ROWS = {  # measure: what the table calls it, unit, units in one of the record's, digits
    "step_time_vs_bare": ("a step / a bare step", "ms", 1e3, 1),
    "train_images_per_s_vs_stock": ("pictures a second / stock loop's", "/s", 1, 1),
    "cost_per_step_100_to_100000": ("a step on most / fewest pictures", "ms", 1e3, 1),
    "validation_memory_vs_training": ("peak with / without validation", "MB", 1e-6, 0),
}


def table(record: dict) -> str:
    """The four measures for reading: both sides, their ratio with its interval, and the goal."""
    lines = []
    for name, measured in record["measures"].items():
        title, unit, factor, digits = ROWS[name]
        sides = list(measured)[:2]
        amounts = "".join(f"{f'{measured[side] * factor:.{digits}f} {unit}':>11}" for side in sides)
        spread = "{:.3f} to {:.3f}".format(*measured["interval"])
        [(bound, goal)] = record["goals"][name].items()
        lines.append(
            f"{title:34}{amounts}   {measured['ratio']:.3f} ({spread})   goal {bound.replace('_', ' ')} {goal}"
        )
    left_out = [ROWS[name][0] for name in GOALS if name not in record["measures"]]
    return "\n".join([*lines, *(f"{title}: not measured" for title in left_out), *details(record)])


def details(record: dict) -> list[str]:
    """What the ratios are made of, a line each."""

    def listed(numbers: dict[str, float], unit: str, factor: float = 1, digits: int = 1) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {n * factor:.{digits}f} {unit}" for name, n in numbers.items())

    stock = record["measures"]["train_images_per_s_vs_stock"]
    pays = stock["steps_until_cache_pays"]
    bound = f"the U-Net's part alone would be {stock['ratio_bound']:.2f} times as fast"
    lines = [
        f"where a step goes: {listed(record['where_a_step_goes_ms'], 'ms')}",
        f"a stock step: {listed(stock['shares'], '%', 100)}; {bound}",
        f"the cache took {stock['cache_seconds']:.1f} s, paid off " + (f"after {pays} steps" if pays else "never"),
    ]
    if sizes := record["measures"].get("cost_per_step_100_to_100000"):
        lines.append(f"a draw from pictures: {listed(sizes['draw_step_ms'], 'ms', digits=2)}")
    if losses := record.get("held_out_loss"):
        values = ", ".join(f"{name} {losses[name]:.4f}" for name in ("start", "ours", "stock"))
        lines.append(f"held-out loss after {losses['steps']} steps: {values}")
    return lines


def verdict(record: dict) -> str:
    """One line: every ratio, and whether the goals are met."""
    ratios = ", ".join(f"{ROWS[name][0]} {measured['ratio']:.3f}" for name, measured in record["measures"].items())
    failed = [ROWS[name][0] for name in missed(record)]
    return f"{ratios}; goals " + (f"not met by: {', '.join(failed)}" if failed else "met")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    default = Settings()
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=__doc__)
    parser.add_argument("--rounds", type=int, default=default.rounds, help="blocks timed for each loop")
    parser.add_argument("--size-rounds", type=int, default=default.size_rounds, help="blocks timed for each size")
    parser.add_argument("--steps", type=int, default=default.steps, help="training steps in a block")
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--rank", type=int, default=default.rank)
    parser.add_argument("--pictures", type=int, default=default.pictures, help="of the drawn doodles")
    parser.add_argument("--picture-size", type=int, default=default.picture_size, help="pixels; 0: the model's")
    parser.add_argument("--rows", type=int, nargs="+", default=default.rows, help="sizes whose step costs are compared")
    parser.add_argument("--loss-steps", type=int, default=default.loss_steps, help="then compare losses; 0: do not")
    parser.add_argument("--processes", type=int, default=default.processes, help="for each peak memory; 0: none")
    parser.add_argument("--model", choices=("mini", "tiny"), default=default.model, help="tiny: to try the benchmark")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder that the record is put into")
    parser.add_argument("--check", action="store_true", help="exit status 1 when a goal is missed")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def worker(order: str) -> int:
    """What `in_new_process` starts: one line of JSON on the standard output."""
    asked = json.loads(order)
    settings = Settings(**{**asked["settings"], "rows": tuple(asked["settings"]["rows"])})
    print(json.dumps(measure_peak(asked["side"], settings)))
    return 0


def main(argv: list[str] | None = None) -> int:
    given = vars(arguments(argv))
    check, order, results = given.pop("check"), given.pop("worker"), given.pop("results")
    if order:
        return worker(order)
    record = measure(Settings(**{**given, "rows": tuple(given["rows"])}))
    records.write_record(results / f"{record['device']}.json", NAME, record)
    print(table(record), verdict(record), sep="\n")
    return 1 if check and missed(record) else 0


if __name__ == "__main__":
    sys.exit(main())

"""What the hand-built LoRA costs beside PEFT's, in time and in memory: `python -m benchmarks.lora_vs_peft`.

Both adapt MiniSD's U-Net, compute the same to the last bit (this is checked first), and go through the course's own
training step. The result is a ratio, ours to PEFT's, of each cost; the goal is at most 1.03. See README.md here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version

import torch
from torch import Tensor, nn

from benchmarks import records
from benchmarks.pair import SIDES, TARGETS, Settings, build_side, check_equal
from benchmarks.timing import compare, default_device, in_new_process, peak_while, peaks_in_turn, time_in_turn
from helpers.base.provenance import code_hash, versions

CODE = tuple(f"helpers.lora.{name}" for name in ("layer", "injection", "merging"))
NAME = "lora_vs_peft"
LIMIT = 1.03  # the goal for each ratio


# --- memory ------------------------------------------------------------------------------------------------------


def storage_of(tensor: Tensor) -> tuple[int, torch.UntypedStorage]:
    """The memory that a tensor lies in, and its address."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage


def saved_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the backward pass while `run()` goes forward.

    Each storage counts once, however many operations keep it; weights do not count, since they are there anyway.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Holding the storage keeps its address from being given to another one
        address, storage = storage_of(tensor)
        kept[address] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    weights = {storage_of(tensor)[0] for tensor in [*model.parameters(), *model.buffers()]}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights)


def measure_peak(side: str, settings: Settings) -> dict[str, int] | None:
    """Train a few steps in this process: {"peak": bytes, "growth": bytes of it that came after the imports}."""
    device = default_device()
    return peak_while(lambda: build_side(side, settings, device).train(settings.memory_steps), device)


def peak_in_new_process(side: str, settings: Settings) -> dict[str, int] | None:
    """`measure_peak` in a process of its own, which has done nothing else."""
    return in_new_process(NAME, {"side": side, "settings": asdict(settings)})


def peaks(settings: Settings) -> dict[str, dict[str, list[int]]]:
    """{"peak" and, on a CPU, "growth": {side: bytes in each process}}, sides alternating; empty if nothing tells."""
    return peaks_in_turn(SIDES, settings.processes, lambda side: peak_in_new_process(side, settings))


# --- the record --------------------------------------------------------------------------------------------------


def measure(settings: Settings) -> dict:
    """The whole benchmark. Raises DifferentModels when the two sides do not compute the same."""
    device = default_device()
    # First, while this process is small itself: it must not crowd those whose memory is measured
    memory = peaks(settings)
    sides = {name: build_side(name, settings, device) for name in SIDES}
    difference = check_equal(sides["ours"], sides["peft"])
    saved = {name: saved_bytes(side.unet, lambda side=side: side.train(1)) for name, side in sides.items()}
    seconds = time_in_turn(sides, settings.pairs, settings.steps, settings.warmup, device)
    costs = {
        "step_seconds": compare(seconds, *SIDES),
        "saved_bytes": {**saved, "ratio": saved["ours"] / saved["peft"]},
    }
    costs |= {f"{kind}_bytes": compare(found, *SIDES) for kind, found in memory.items()}
    return {
        "settings": asdict(settings),
        "limit": LIMIT,
        "costs": costs,
        "largest_difference": difference,
        "trained_parameters": sum(grad.numel() for grad in sides["ours"].gradients().values()),
        "device": records.device_slug(device),
        "threads": torch.get_num_threads(),
        "versions": {**versions(), "peft": version("peft")},
        "code": {name: code_hash(name) for name in CODE},
    }


def above_limit(record: dict) -> list[str]:
    """The costs whose ratio is not at most the limit."""
    return [name for name, cost in record["costs"].items() if not cost["ratio"] <= record["limit"]]


# --- the command -------------------------------------------------------------------------------------------------

ROWS = {  # cost: what the table calls it, unit, units in one of the record's
    "step_seconds": ("time of a step", "ms", 1e3),
    "saved_bytes": ("kept for the backward pass", "MB", 1e-6),
    "peak_bytes": ("peak of a process", "MB", 1e-6),
    "growth_bytes": ("peak without the imports", "MB", 1e-6),
}


def table(record: dict) -> str:
    """The record's costs for reading: both sides, their ratio, and its interval where it has one."""
    lines = [f"{'':28}{'ours':>12}{'PEFT':>12}   ours / PEFT"]
    for name, cost in record["costs"].items():
        title, unit, factor = ROWS[name]
        amounts = "".join(f"{f'{cost[side] * factor:.1f} {unit}':>12}" for side in SIDES)
        spread = "{:.3f} to {:.3f}".format(*cost["interval"]) if "interval" in cost else "exact"
        lines.append(f"{title:28}{amounts}   {cost['ratio']:.3f} ({spread})")
    if "peak_bytes" not in record["costs"]:
        lines.append("peak of a process: not measured (no processes asked for, or this system does not tell it)")
    return "\n".join(lines)


def verdict(record: dict) -> str:
    """One line: every ratio, and whether the goal is met."""
    ratios = ", ".join(f"{ROWS[name][0]} {cost['ratio']:.3f}" for name, cost in record["costs"].items())
    above = [ROWS[name][0] for name in above_limit(record)]
    outcome = f"not met by: {', '.join(above)}" if above else "met"
    return f"ours / PEFT: {ratios}; goal at most {record['limit']}: {outcome}"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    default = Settings()
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=__doc__)
    parser.add_argument("--pairs", type=int, default=default.pairs, help="blocks timed for each side")
    parser.add_argument("--steps", type=int, default=default.steps, help="training steps in a block")
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--rank", type=int, default=default.rank)
    parser.add_argument("--targets", choices=TARGETS, default=default.targets, help="which layers are adapted")
    parser.add_argument("--processes", type=int, default=default.processes, help="for each side's peak memory; 0: none")
    parser.add_argument("--model", choices=("mini", "tiny"), default=default.model, help="tiny: to try the benchmark")
    parser.add_argument("--check", action="store_true", help=f"exit status 1 when a ratio is above {LIMIT}")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def worker(order: str) -> int:
    """What `peak_in_new_process` starts: one line of JSON on the standard output."""
    asked = json.loads(order)
    print(json.dumps(measure_peak(asked["side"], Settings(**asked["settings"]))))
    return 0


def main(argv: list[str] | None = None) -> int:
    given = vars(arguments(argv))
    check, order = given.pop("check"), given.pop("worker")
    if order:
        return worker(order)
    record = measure(Settings(**given))
    records.write_record(records.RESULTS / f"{record['device']}.json", NAME, record)
    print(table(record), verdict(record), sep="\n")
    return 1 if check and above_limit(record) else 0


if __name__ == "__main__":
    sys.exit(main())

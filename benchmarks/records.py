"""Where benchmarks put what they measured: one file for each device, one entry in it for each benchmark."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path

import torch

from helpers.base.files import write_json_atomic

RESULTS = Path(__file__).parent / "results"


def device_slug(device: torch.device) -> str:
    """The device in lower-case words and dashes: "cpu-x86_64-2-threads", "nvidia-h100". Names no machine."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} {platform.machine()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-")


def read_results(path: Path) -> dict[str, dict]:
    """{benchmark: its record}, empty when there is no such file. Raises ValueError for a file that is not ours."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    if not isinstance(results, dict):
        raise ValueError(f"{path.name} should hold one record for each benchmark, and does not")
    return results


def write_record(path: Path, benchmark: str, record: dict) -> None:
    """Put one benchmark's record into the file, beside those of other benchmarks; its own older one is replaced."""
    write_json_atomic(path, dict(sorted({**read_results(path), benchmark: record}.items())))

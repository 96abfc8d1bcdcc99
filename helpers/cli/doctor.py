"""`course doctor`: what this machine is and has, which preset suits it, and what that will take."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from helpers.base import hub, paths
from helpers.base.paths import ROOT
from helpers.presets.catalogue import CLIP, CLIP_GB, PRESETS
from helpers.presets.configuration import Preset
from helpers.presets.variants import get_preset

GPU_PRESET = "sd21-base"  # what a GPU with enough memory runs by default
RUNS_GB = 1.0  # what runs and caches of latents take, besides what is downloaded
OK, LACKS, WRONG = "ok", "--", "!!"  # fine; only Stable Diffusion needs it; the course cannot run


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and OK, LACKS or WRONG."""

    what: str
    found: str
    state: str = OK


@dataclass(frozen=True)
class Machine:
    """What a recommendation depends on. gpu_memory in GiB; free_gb in 10^9 bytes, where downloads go."""

    gpu_memory: float = 0.0
    gpu_problem: str | None = None
    bfloat16: bool = False
    free_gb: float = 0.0
    network: bool = False
    token: bool = False
    here: frozenset[str] = field(default_factory=frozenset)  # presets, datasets and "clip" that need no download


def look() -> Machine:
    """This machine. Takes a few seconds where there is no network."""
    import torch

    from helpers.base.device import has_bfloat16
    from helpers.presets import machine

    return Machine(
        machine.gpu_memory(),
        machine.gpu_problem(),
        has_bfloat16(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        hub.free_gb(hub.cache_folder()),
        has_network(),
        has_token(),
        here(),
    )


def has_network() -> bool:
    """Whether the hub answers, within three seconds."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=3)
    except Exception:  # whatever is in the way: there is no use of the hub now
        return False
    return True


def has_token() -> bool:
    """Whether one has logged in to the hub. None of the presets needs it."""
    from huggingface_hub import get_token

    return bool(get_token())


def here() -> frozenset[str]:
    """Presets whose model, and hub datasets that, need no download any more; "clip" if the judge is here."""
    from helpers.diffusion.components import EITHER, HUB_FILES, NEEDED, UNET
    from helpers.evaluation.encoders import CLIP_FILES, CLIP_NEEDED

    def found(
        repositories: tuple, kind: str = "model", needed: Sequence[str] = (), patterns: Sequence[str] | None = None
    ) -> bool:
        try:
            own = hub.find_local(repositories, needed)
            return bool(own or hub.find_cached(repositories, kind, patterns, needed))
        except hub.HubError:
            return False

    names = {name for name, preset in PRESETS.items() if preset.repositories
             and found(preset.repositories, patterns=[*HUB_FILES, UNET], needed=[*NEEDED, EITHER])}  # fmt: skip
    for spec in PRESETS[GPU_PRESET].datasets:
        if found(((spec.source.partition(":")[2], spec.revision),), "dataset"):
            names.add(spec.name)
    return frozenset(names | ({"clip"} if found(CLIP, "model", CLIP_NEEDED, CLIP_FILES) else set()))


# --- what it says ------------------------------------------------------------------------------------------------
def tell_findings(given: argparse.Namespace) -> int:
    """`course doctor`: what was found, and 1 when the course cannot run."""
    findings, advised = examine()
    for finding in findings:
        print(f"{finding.state}  {finding.what:<14}{finding.found}")
    print(advised)
    return 1 if any(finding.state == WRONG for finding in findings) else 0


def examine() -> tuple[list[Finding], str]:
    """Everything worth knowing about this machine, a line each, and the advice."""
    machine = look()
    return [*software(), *hardware(machine), *for_stable_diffusion(machine)], advice(machine)


def software() -> list[Finding]:
    """What is installed: Python, the libraries, MiniSD's weights, the notebooks."""
    from helpers.base.provenance import versions
    from helpers.course import notebooks
    from helpers.diffusion.components import PARTS

    found = versions()
    weights = ROOT / get_preset("mini").model
    present = all((weights / part).is_dir() for part in PARTS)
    count = len(notebooks.committed())
    rows = [
        ("Python", f"{platform.python_version()} (3.11 or newer)", sys.version_info >= (3, 11)),
        ("torch", f"{found['torch']} (2.6 or newer)", at_least(found["torch"], (2, 6))),
        ("diffusers", found["diffusers"], found["diffusers"] != "not installed"),
        ("transformers", found["transformers"], found["transformers"] != "not installed"),
        ("MiniSD", "weights found" if present else f"no weights in {paths.short(weights)}", present),
        ("notebooks", str(count), count > 0),
    ]
    return [Finding(what, text, OK if fine else WRONG) for what, text, fine in rows]


def hardware(machine: Machine) -> list[Finding]:
    """What the machine has: cores, memory, disk, and a GPU with what is wrong with it."""
    import psutil

    from helpers.base.provenance import versions

    memory, free = psutil.virtual_memory().total / 2**30, shutil.disk_usage(ROOT).free / 1e9
    precision = "bfloat16" if machine.bfloat16 else "no bfloat16, so float16"
    gpu = f", {machine.gpu_memory:.1f} GiB, {precision}" if machine.gpu_memory else ""
    rows = [
        Finding("device", versions()["device"] + gpu),
        Finding("processors", str(os.cpu_count())),
        Finding("memory", f"{memory:.0f} GiB (4 or more)", OK if memory >= 3.5 else WRONG),
        Finding("free disk", f"{free:.0f} GB (2 or more)", OK if free >= 2 else WRONG),
    ]
    return rows + ([Finding("GPU", machine.gpu_problem, LACKS)] if machine.gpu_problem else [])


def for_stable_diffusion(machine: Machine) -> list[Finding]:
    """What the presets of Stable Diffusion need besides."""
    names = [name for name, preset in PRESETS.items() if preset.revision]
    models = [name for name in names if name in machine.here]
    data = [spec.name for spec in PRESETS[GPU_PRESET].datasets if spec.name in machine.here]
    answer = "the hub answers" if machine.network else "the hub cannot be reached"
    return [
        Finding("network", answer, state(machine.network)),
        Finding("hub token", "there is one" if machine.token else "none, and none is needed"),
        Finding("hub disk", f"{machine.free_gb:.0f} GB free in {hub.cache_folder()}"),
        Finding("hub models", f"here already: {', '.join(models) or 'none'} (of {', '.join(names)})", state(models)),
        Finding("hub datasets", f"here already: {', '.join(data) or 'none'}", state(data)),
    ]


def state(fine: object) -> str:
    """How a finding reads: fine, or lacking something."""
    return OK if fine else LACKS


def at_least(version: str, wanted: tuple[int, int]) -> bool:
    """Whether a version such as "2.13.0+cpu" is the wanted (major, minor) or a later one."""
    numbers = version.split("+")[0].split(".")[:2]
    return all(n.isdigit() for n in numbers) and tuple(map(int, numbers)) >= wanted


# --- advice ------------------------------------------------------------------------------------------------------
def recommended(gpu_memory: float) -> str:
    """The preset for a GPU of so many GiB: Stable Diffusion 2.1-base in the variant that fits it, else MiniSD."""
    from helpers.presets.machine import rung_for

    return rung_for(GPU_PRESET, gpu_memory) or "mini"


def to_download(preset: Preset, here: frozenset[str]) -> float:
    """10^9 bytes that a preset of Stable Diffusion still has to fetch."""
    base = preset.name.split("@")[0]
    model = 0.0 if base in here else preset.download_gb
    return model + sum(s.download_gb for s in preset.datasets if s.name not in here) + CLIP_GB * ("clip" not in here)


def advice(machine: Machine) -> str:
    """Which preset suits a machine, and what it will take."""
    mini = "`course run` (MiniSD) works here, without network and GPU; `course run --preset smoke` is a short trial."
    name = recommended(machine.gpu_memory)
    if name == "mini":
        return f"{mini} Stable Diffusion needs a GPU with 8 GB of memory or more."
    preset = get_preset(name)
    fetch = to_download(preset, machine.here)
    if fetch and not machine.network:
        return f"{mini} The GPU could run `--preset {name}`, but without network {fetch:.1f} GB cannot be fetched."
    needed = fetch + RUNS_GB + sum(spec.download_gb for spec in preset.datasets)  # pictures are unpacked once more
    if needed > machine.free_gb:
        return (
            f"{mini} The GPU could run `--preset {name}`, which needs {needed:.1f} GB of disk, and "
            f"{machine.free_gb:.1f} GB are free: make room, or let HF_HOME name a folder on another disk."
        )
    download = f"{fetch:.1f} GB to download" if fetch else "nothing to download"
    return (
        f"`course run --preset {name}` suits this machine: {preset.title} on {machine.gpu_memory:.0f} GiB; {download}, "
        f"{needed:.1f} GB of disk. `--preset {name}@trial` shows in minutes whether all works, "
        f"and `python -m benchmarks.gpu` how long the whole will take. {mini}"
    )

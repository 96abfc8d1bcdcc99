"""What this machine's GPU, or its CPU, can do, and one sentence for what is wrong with it."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil
import torch

from helpers.base.device import default_device
from helpers.presets.configuration import Preset
from helpers.presets.memory import MEMORY, training_gib
from helpers.presets.variants import get_preset

HIDDEN = "torch sees no NVIDIA GPU, though its driver is here: is CUDA_VISIBLE_DEVICES set to hide it?"

APPLE = (
    "on an Apple GPU Stable Diffusion computes in float32, from the memory that the whole machine shares; nobody has "
    "measured yet how long it takes"
)
FALLBACK = "what PyTorch cannot compute on an Apple GPU yet, the CPU does with PYTORCH_ENABLE_MPS_FALLBACK=1"


def has_nvidia_gpu() -> bool:
    """Whether NVIDIA's driver is installed, which is asked without torch: a torch without CUDA sees no GPU."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def gpu_memory() -> float:
    """GiB of memory of the CUDA GPU that torch uses; 0 without one."""
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0


def gpu_problem() -> str | None:
    """Why torch cannot use the NVIDIA GPU of this machine, and what to do; None when it can, or there is none."""
    if torch.cuda.is_available() or not has_nvidia_gpu():
        return None
    if torch.version.cuda is None:
        return (
            f"this machine has an NVIDIA GPU, but its torch {torch.__version__} was built without CUDA and cannot use "
            "it: uninstall torch, and install it with CUDA as pytorch.org/get-started says"
        )
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        if "No CUDA GPUs" in str(error):
            return HIDDEN
        if "driver" in str(error).lower():
            return (
                f"the NVIDIA driver of this machine is too old, or not running, for torch {torch.__version__} with "
                f"CUDA {torch.version.cuda}: update the driver, or install a torch that was built for an older CUDA"
            )
        return f"torch cannot use the NVIDIA GPU of this machine: {str(error).strip().splitlines()[0]}"
    return HIDDEN


def notes_without_gpu(preset: Preset) -> list[str]:
    """What to know before Stable Diffusion runs without an NVIDIA GPU, where it takes much patience; [] with one."""
    device = default_device()
    if not preset.on_hub or preset.trial or device == "cuda":
        return []
    short = [note] if (note := short_of_memory(preset)) else []
    if device == "mps":
        return [APPLE, FALLBACK, *short]
    waits = f"without a GPU, {preset.title} takes minutes for a picture and days to train"
    return [waits, gpu_problem() or "`course doctor` says what suits this machine", *short]


def short_of_memory(preset: Preset) -> str | None:
    """What to take where main memory does not suffice to train a preset of Stable Diffusion; None where it does."""
    needed, there = training_gib(preset, on_gpu=False), psutil.virtual_memory().total / 2**30
    if needed <= there:
        return None
    base = preset.name.split("@")[0]
    advice = f"take --preset {base}@8gb@256px" if preset.resolution > 256 else "take MiniSD, the preset 'mini'"
    return (
        f"training it takes about {needed:.0f} GiB, and this machine has {there:.0f}: {advice}, or its kernel may die"
    )


# --- memory ------------------------------------------------------------------------------------------------------
def rung_for(preset_name: str, gpu_gib: float) -> str | None:
    """The preset in the variant for a GPU of so much memory: itself where it fits as it is, None for too little."""
    if gpu_gib >= training_gib(get_preset(preset_name)):
        return preset_name
    variants = [f"{preset_name}@{variant}" for variant, least in MEMORY.items() if gpu_gib >= least]
    return next((name for name in variants if training_gib(get_preset(name)) <= gpu_gib), None)


def next_lower(preset_name: str) -> str | None:
    """The preset's next variant that takes less memory than this one, or None when it is at the least already."""
    base, *variants = preset_name.split("@")
    preset = get_preset(preset_name)
    if not preset.on_hub:
        return None
    others = [variant for variant in variants if variant not in MEMORY]
    now = list(MEMORY).index(next(iter(set(variants) & MEMORY.keys()))) + 1 if set(variants) & MEMORY.keys() else 0
    names = ["@".join([base, variant, *others]) for variant in list(MEMORY)[now:]]
    return next((name for name in names if training_gib(get_preset(name)) < training_gib(preset)), None)


def smaller(preset_name: str) -> str | None:
    """The preset at the next smaller picture size, or None when it is small already, or MiniSD."""
    preset = get_preset(preset_name)
    size = next((size for size in (512, 256, 128) if size < preset.resolution), None)
    if not preset.on_hub or size is None:
        return None
    others = [part for part in preset_name.split("@") if not part.endswith("px")]
    return "@".join([*others, f"{size}px"])


def out_of_memory(preset_name: str) -> str:
    """What to do when the memory of the GPU, or of a machine that computes without one, did not suffice."""
    others = "close other programs (those on an NVIDIA GPU `nvidia-smi` lists)"
    if lower := next_lower(preset_name):
        others = f"take --preset {lower}, which trains on smaller parts of a batch; or {others}"
    elif small := smaller(preset_name):
        others = f"take --preset {small}, for smaller pictures; or {others}"
    return f"the memory does not suffice: {others}; or take MiniSD, the preset 'mini'"

"""Where the course computes, and in which precision."""

from __future__ import annotations

import torch


def default_device() -> str:
    """The first of "cuda", "mps" and "cpu" that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU computes in bfloat16 by itself (NVIDIA: from Ampere on; a T4 only imitates it, slowly)."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is half precision on a CUDA GPU, of the kind that it has, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if has_bfloat16(device) else torch.float16

"""What might make a GPU faster, or its memory last longer, and is not what the course does: to be measured beside it.

Each way is a block within which the model, or PyTorch, works in that way. What it changes is said beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import lora
from helpers.diffusion.components import Components
from helpers.diffusion.sampling import initial_latents, sample
from helpers.lora.layer import LoRALayer

SHARE_OF_FREE = 0.8  # of the free memory: the allocator needs room to move


# --- training ----------------------------------------------------------------------------------------------------


@contextmanager
def cudnn_benchmark(model: Components, dtype: torch.dtype) -> Iterator[None]:
    """cuDNN tries its convolutions at the first call of each shape and takes the fastest. Rounding may differ."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def group_norm_in_half(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """As nn.GroupNorm, in the precision of its input; autocast would compute and return float32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.group_norm(x, norm.num_groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def layer_norm_in_half(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """As nn.LayerNorm, likewise."""
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


@contextmanager
def half_norms(model: Components, dtype: torch.dtype) -> Iterator[None]:
    """Norms of half-precision activations stay in half precision. Their sums are float32 inside of the kernels."""
    with (
        patch.object(nn.GroupNorm, "forward", group_norm_in_half),
        patch.object(nn.LayerNorm, "forward", layer_norm_in_half),
    ):
        yield


def lean_forward(layer: LoRALayer, x: Tensor) -> Tensor:
    """As LoRALayer.forward, without turning x to float32 first: autocast would turn it back. The bits are the same."""
    result = layer.base(x)
    if layer.original_weight is not None:
        return result
    return (result + layer.lora_B(layer.lora_A(layer.lora_dropout(x))) * layer.scaling).to(result.dtype)


@contextmanager
def lean_lora(model: Components, dtype: torch.dtype) -> Iterator[None]:
    """LoRA layers without their float32 round trip. Only for what runs in autocast, as training does."""
    with patch.object(LoRALayer, "forward", lean_forward):
        yield


@contextmanager
def encoders_off(model: Components, dtype: torch.dtype) -> Iterator[None]:
    """VAE and text encoder wait on the CPU: training reads their cached outputs. Changes no number."""
    parts, device = (model.vae, model.text_encoder), model.device
    for part in parts:
        nn.Module.to(part, "cpu")
    try:
        yield
    finally:
        for part in parts:
            nn.Module.to(part, device)


# --- drawing with an adapter -------------------------------------------------------------------------------------


@contextmanager
def autocast(model: Components, dtype: torch.dtype) -> Iterator[None]:
    """A and B, which are float32, are applied in half precision. Changes rounding."""
    with torch.autocast(model.device.type, dtype):
        yield


@contextmanager
def merged(model: Components, dtype: torch.dtype) -> Iterator[None]:
    """The adapter is added to the weights first and taken out at the end, both counted. Changes rounding."""
    lora.merge(model.unet)
    try:
        yield
    finally:
        lora.unmerge(model.unet)


def fitting(growth: int, free: int, wanted: int) -> int:
    """How many pictures can be denoised at once: each takes `growth` bytes, and so many are free."""
    return max(1, min(wanted, int(SHARE_OF_FREE * free) // max(1, growth)))


def pictures_at_once(model: Components, wanted: int) -> int:
    """`fitting`, by drawing one picture in one step and asking the GPU; all that are wanted where there is none."""
    if model.device.type != "cuda":
        return wanted
    before = torch.cuda.memory_allocated(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    sample(model, ["a drawing"], initial_latents(model, [0]), num_inference_steps=1)
    growth = torch.cuda.max_memory_allocated(model.device) - before
    unused = torch.cuda.memory_reserved(model.device) - before
    return fitting(growth, torch.cuda.mem_get_info(model.device)[0] + unused, wanted)


# --- all of them -------------------------------------------------------------------------------------------------

Way = Callable[[Components, torch.dtype], AbstractContextManager]
WAYS: dict[str, Way] = {
    way.__name__: way for way in (cudnn_benchmark, half_norms, lean_lora, encoders_off, autocast, merged)
}
FREE_MEMORY = "free_memory"  # no block: as many pictures at once as `pictures_at_once` says


@contextmanager
def within(ways: tuple[str, ...], model: Components, dtype: torch.dtype) -> Iterator[None]:
    """All of the ways at once. Raises KeyError for an unknown one."""
    with ExitStack() as stack:
        for way in ways:
            if way != FREE_MEMORY:
                stack.enter_context(WAYS[way](model, dtype))
        yield

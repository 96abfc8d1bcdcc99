"""Bytes that autograd keeps of a training step for its backward pass, counted without memory and without a GPU.

Tensors of the "meta" device know shape and dtype, and no numbers, so that Stable Diffusion's step at its own size takes
seconds. `LikeCuda` chooses dtypes as CUDA's autocast does, and takes attention for one fused kernel, which keeps its
inputs, its output and one float32 a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from helpers import lora
from helpers.presets.configuration import Preset
from helpers.presets.sd_configs import CONFIGS, build_part

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRODUCTS = (F.linear, F.conv2d)  # in half precision
NORMS = (F.group_norm, F.layer_norm)  # in float32


class FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps; nothing is computed."""

    @staticmethod
    def forward(ctx, query, key, value):
        """query, key, value [B, heads, L, d]."""
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


class LikeCuda(TorchFunctionMode):
    """Within the block the operations of a U-Net have the dtypes that they have on a GPU in that precision."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        self.half = HALF.get(precision)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        dtype = self.half if function in PRODUCTS or function is F.scaled_dot_product_attention else torch.float32
        if self.half and function in (*PRODUCTS, *NORMS, F.scaled_dot_product_attention):
            args = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in args]
            kwargs = {name: x.to(dtype) if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
        if function is F.scaled_dot_product_attention:
            return FusedAttention.apply(*args[:3])
        return function(*args, **kwargs)


def kept_bytes(model: str, preset: Preset, precision: str, pictures: int = 1) -> int:
    """Bytes that one step keeps for some pictures, besides the weights. model: a key of `CONFIGS`."""
    unet = build_part(model, "unet")
    torch.nn.Module.to(unet, HALF.get(precision, torch.float32))
    lora.inject(unet, preset.train.targets, preset.train.rank, preset.train.alpha)
    unet.train()
    if preset.train.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    weights = {t.untyped_storage()._cdata for t in (*unet.parameters(), *unet.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no later one gets its number
        return tensor

    side, width = preset.resolution // 8, CONFIGS[model]["unet"]["cross_attention_dim"]
    like = {"dtype": unet.dtype, "device": "meta"}
    noisy, states = torch.empty(pictures, 4, side, side, **like), torch.empty(pictures, 77, width, **like)
    timesteps = torch.zeros(pictures, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), LikeCuda(precision):
        output = unet(noisy, timesteps, states).sample
        loss = (output.float() - 1.0).square().mean()
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())

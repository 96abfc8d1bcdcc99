"""An injected adapter weighed, added to the weights, taken out of them, or removed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from helpers.lora.injection import lora_layers, replace_module


@contextmanager
def scaled(model: nn.Module, s: float) -> Iterator[None]:
    """Within the block the adapter counts s times: 0 is the base model, 1 as trained, negative the other way.

    Only the adapter's part is multiplied: DoRA's magnitude stays as it was trained, so 0 is not quite its base model.
    Blocks may be nested. Raises ValueError for a model without LoRA layers or with merged ones.
    """
    layers = list(lora_layers(model).values())
    if not layers or any(layer.original_weight is not None for layer in layers):
        raise ValueError("scaled needs a model with LoRA layers that are not merged")
    before = [layer.scaling for layer in layers]
    try:
        for layer in layers:
            layer.scaling = layer.scaling * s
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = scaling


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add each adapter to its base's weight, so that a forward pass costs no more than the base's.

    The result is rounded to the weight's dtype. The original weight is kept for `unmerge`. Merged layers are skipped.
    """
    for layer in lora_layers(model).values():
        if layer.original_weight is None:
            weight = layer.base.weight
            # W' = W + Delta W, computed in float32
            merged = layer.merged_weight().to(weight.dtype)
            layer.original_weight, weight.data = weight.data, merged


def unmerge(model: nn.Module) -> None:
    """Put back the weights from before `merge`, bit for bit."""
    for layer in lora_layers(model).values():
        if layer.original_weight is not None:
            layer.base.weight.data, layer.original_weight = layer.original_weight, None  # type: ignore[assignment]


def remove(model: nn.Module) -> None:
    """Take the adapter out: the very same modules come back, with their original weights. They stay frozen."""
    unmerge(model)
    for name, layer in lora_layers(model).items():
        replace_module(model, name, layer.base)

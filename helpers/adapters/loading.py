"""Putting an adapter file into a model, once it is known to fit."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping

from torch import nn

from helpers import lora
from helpers.adapters import layouts
from helpers.adapters.configuration import COMPONENTS, Adapter, AdapterError
from helpers.adapters.reading import adapter_file, missing, read_adapter
from helpers.adapters.writing import short_targets
from helpers.lora.lowrank import LoRAWeights, attach, check_fit


def load_adapter(
    path: str | os.PathLike,
    unet: nn.Module | None = None,
    text_encoder: nn.Module | None = None,
    expect: Mapping[str, object] | None = None,
) -> dict:
    """Put the adapter in a file or folder into a U-Net, a text encoder or both; A and B are float32 and trainable.

    expect: entries that the file's metadata must not contradict, such as {"prediction_type": "v_prediction"}.
    Returns {"rank", "alpha", "use_rslora", "dropout", "targets", "metadata", "layout", "notes"}; rank and alpha are the
    most common ones where layers differ, notes what a reader of the file should know. Everything is checked before a
    model is touched. Raises AdapterError, and leaves the models and the random state as they were, for a file that is
    missing, damaged, or does not fit: missing, unexpected or wrongly shaped keys are named.
    """
    path = adapter_file(path)
    adapter = read_matching(path, expect or {})
    put_into(adapter, unet, text_encoder, str(path))
    component = "unet" if adapter.of("unet") else "text_encoder"
    model = unet if component == "unet" else text_encoder
    return {
        "rank": statistics.mode(w.rank for w in adapter.layers.values()),
        "alpha": statistics.mode(w.alpha for w in adapter.layers.values()),
        "use_rslora": any(w.use_rslora for w in adapter.layers.values()),
        "dropout": adapter.dropout,
        "targets": adapter.targets.get(component)
        or (short_targets(model, lora.lora_layers(model)) if model is not None else []),
        "metadata": adapter.metadata,
        "layout": adapter.layout,
        "notes": adapter.notes,
    }


def read_matching(path: str | os.PathLike, expect: Mapping[str, object]) -> Adapter:
    """The adapter in a file or folder. Raises AdapterError where its metadata contradicts what is expected."""
    adapter = read_adapter(path)
    check_origin(adapter, expect, path)
    return adapter


def check_origin(adapter: Adapter, expect: Mapping[str, object], path: str | os.PathLike) -> None:
    """Raise AdapterError where the adapter's metadata contradicts what a model has."""
    for key, wanted in expect.items():
        if adapter.metadata.get(key, wanted) != wanted:
            raise AdapterError(
                f"{path}: the adapter was trained with {key} {adapter.metadata[key]!r}, this model has {wanted!r}. "
                "Load the base model that it was made for"
            )


def put_into(
    adapter: Adapter, unet: nn.Module | None = None, text_encoder: nn.Module | None = None, what: str = "the adapter"
) -> None:
    """Freeze the models and add the adapter's layers to them.

    Raises AdapterError (`what` begins its message), and changes nothing, for layers that a model does not have or has
    in another shape, for layers that the adapter's targets name and it does not have, and for an adapted model.
    """
    parts = {}
    for component, model in zip(COMPONENTS, (unet, text_encoder), strict=True):
        layers = adapter.of(component)
        if layers and model is None:
            raise AdapterError(f"{what} has layers of the {component}: give load_adapter its {component} too")
        if model is not None and lora.lora_layers(model):
            raise AdapterError(f"{what}: the {component} already has LoRA layers; remove({component}) takes them out")
        if model is not None:
            parts[component] = (model, with_prefix(component, model, layers))
            check_model(adapter, component, *parts[component], what)
    for model, layers in parts.values():
        if layers:
            attach(model, layers, adapter.dropout)


def with_prefix(component: str, model: nn.Module, layers: dict[str, LoRAWeights]) -> dict[str, LoRAWeights]:
    """The layers under the names that they have in this model: before transformers 5, inside its `text_model`."""
    nested = component == "text_encoder" and any(n.startswith(layouts.TEXT_PREFIX) for n, _ in model.named_modules())
    return {layouts.TEXT_PREFIX + name: w for name, w in layers.items()} if nested else layers


def check_model(adapter: Adapter, component: str, model: nn.Module, layers: dict[str, LoRAWeights], what: str) -> None:
    """Raise AdapterError unless every layer fits the model, and every module that the targets select has a layer."""
    modules = dict(model.named_modules())
    for name, weights in layers.items():
        layer = layouts.layer_of(component, name)
        keys = {part: adapter.key(layer, part) for part in weights.tensors()}
        try:
            check_fit(weights, modules.get(name), keys)
        except ValueError as error:
            raise AdapterError(f"{what}: {error}. Is the adapter for this base model?") from error
    targets = adapter.targets.get(component, [])
    if not layers or not targets:
        return
    for name, module in modules.items():
        if isinstance(module, tuple(lora.KINDS)) and lora.selects(targets, name) and name not in layers:
            layer = layouts.layer_of(component, name)
            raise missing(what, adapter, layer, "lora_A.weight", ": the header's targets select that layer")

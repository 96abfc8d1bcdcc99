"""Adapter files: a trained LoRA as other software reads it.

We write one safetensors file in the layout of diffusers and PEFT (`pytorch_lora_weights.safetensors`) or of kohya's
trainers, and read those, PEFT's own folders and files of older versions of diffusers; `helpers.layouts` has the names.

Alpha is not in the tensors of a diffusers file: its header says it, under "lora_adapter_metadata" (JSON; the component
and the fields of PEFT's LoraConfig: "unet.lora_alpha"). In a kohya file each layer has an "alpha" tensor. Where neither
says it, alpha = rank, as diffusers assumes. Our files have one more entry in the header, "provenance" (JSON): base
model, dataset, seed, step, versions, or whatever the caller has to say about the adapter's origin.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers import layouts, lora
from helpers.adapter_config import COMPONENTS, CONFIG_KEY, Adapter, AdapterError, lora_config
from helpers.adapter_reading import PROVENANCE_KEY, WEIGHTS_NAME, adapter_file, missing, read_adapter
from helpers.lowrank import LoRAWeights, attach, check_fit, weights_of
from helpers.provenance import atomic_path

__all__ = ["Adapter", "AdapterError", "adapter_file", "adapter_of", "load_adapter", "put_into", "read_adapter",
           "save_adapter", "check_origin", "write_adapter"]  # fmt: skip


# ---- saving ----


def save_adapter(
    path: str | os.PathLike,
    unet: nn.Module | None = None,
    metadata: dict | None = None,
    text_encoder: nn.Module | None = None,
    layout: str = "diffusers",
) -> Path:
    """Write the LoRA layers of a U-Net, a text encoder or both to a file, or into a folder; returns the file's path.

    `metadata` is a dict that JSON can hold; `load_adapter` gives it back. The adapter is saved as trained, whatever
    `scaled` or `merge` are doing to it. The file is complete or not there. Raises AdapterError for models without LoRA
    layers, and for DoRA in kohya's layout.
    """
    return write_adapter(path, adapter_of(unet, text_encoder, metadata), layout)


def adapter_of(
    unet: nn.Module | None = None, text_encoder: nn.Module | None = None, metadata: dict | None = None
) -> Adapter:
    """A copy of the adapter in a U-Net, a text encoder or both. Raises AdapterError where there is none."""
    layers, targets, dropout = {}, {}, 0.0  # type: dict[str, LoRAWeights], dict[str, str | list[str]], float
    for component, model in zip(COMPONENTS, (unet, text_encoder), strict=True):
        found = lora.lora_layers(model) if model is not None else {}
        if found:
            targets[component] = short_targets(model, found)  # type: ignore[arg-type]  # a model, as layers were found
            layers |= {
                layouts.layer_of(component, name): w
                for name, w in weights_of(model).items()  # type: ignore[arg-type]
            }
            dropout = max(dropout, *(getattr(layer.lora_dropout, "p", 0.0) for layer in found.values()))
    if not layers:
        raise AdapterError("there are no LoRA layers to save; inject(unet, ...) adds them")
    return Adapter(layers, targets, metadata or {}, dropout=dropout)


def write_adapter(path: str | os.PathLike, adapter: Adapter, layout: str = "diffusers") -> Path:
    """Write an adapter to a file, or into a folder, in the layout "diffusers" or "kohya"; returns the file's path.

    kohya's layout knows alpha / rank alone, so a rank-stabilised adapter gets the alpha that means the same there.
    """
    if layout not in layouts.WRITABLE:
        raise AdapterError(f"adapters are written in the layouts {' and '.join(layouts.WRITABLE)}, not {layout!r}")
    if not adapter.layers:
        raise AdapterError("the adapter has no layers to write")
    header = {"format": "pt", PROVENANCE_KEY: json.dumps(adapter.metadata, sort_keys=True)}
    layers, tensors = uniform(adapter.layers), {}
    for layer, weights in layers.items():
        for part, tensor in weights.tensors().items():
            key = layouts.key_of(layout, layer, part)
            if part != "lora_magnitude_vector" and layouts.READERS[layout](key) != (layer, part):
                raise AdapterError(f"{layer}: {layout}'s layout has no name for this layer that could be read again")
            tensors[key] = tensor.detach().cpu().clone().contiguous()
    if layout == "kohya":
        tensors |= kohya_alphas(layers)
        first = next(iter(layers.values()))
        header |= {"ss_network_module": "networks.lora", "ss_network_dim": str(first.rank)}
        header |= {"ss_network_alpha": f"{kohya_alpha(first):g}"}
    else:
        header[CONFIG_KEY] = json.dumps(config_of(replace(adapter, layers=layers)), indent=2, sort_keys=True)
    path = Path(path) if Path(path).suffix == ".safetensors" else Path(path) / WEIGHTS_NAME
    with atomic_path(path) as unfinished:
        save_file(tensors, unfinished, metadata=header)
    return path


def config_of(adapter: Adapter) -> dict:
    """The configuration of both components, as diffusers stores it."""
    config: dict = {}
    for component in COMPONENTS:
        if layers := adapter.of(component):
            targets = adapter.targets.get(component) or sorted(layers)
            config |= lora_config(component, layers, targets, adapter.dropout)
    return config


def uniform(layers: dict[str, LoRAWeights]) -> dict[str, LoRAWeights]:
    """The same layers as a configuration can describe them: all DoRA or none, all rank-stabilised or none."""
    if len({weights.magnitude is None for weights in layers.values()}) > 1:
        raise AdapterError("some layers are DoRA and some are not: write them to two files")
    if len({weights.use_rslora for weights in layers.values()}) == 1:
        return layers
    return {name: replace(w, alpha=kohya_alpha(w), use_rslora=False) for name, w in layers.items()}


def kohya_alphas(layers: dict[str, LoRAWeights]) -> dict[str, Tensor]:
    """Each layer's alpha as the float32 tensor that kohya's layout has for it."""
    alphas = {}
    for layer, weights in layers.items():
        if weights.magnitude is not None:
            raise AdapterError(f"{layer} is a DoRA layer: kohya's layout is for plain LoRA here; use diffusers'")
        key = layouts.key_of("kohya", layer, "alpha")
        alphas[key] = torch.tensor(kohya_alpha(weights), dtype=torch.float32)
        if not alphas[key].isfinite():
            raise AdapterError(f"{key!r}: the alpha {weights.alpha:g} does not fit a float32, as kohya's layout has it")
    return alphas


def kohya_alpha(weights: LoRAWeights) -> float:
    """The alpha that counts as alpha / rank."""
    # alpha' / r = alpha / sqrt(r)
    return float(weights.alpha * (math.sqrt(weights.rank) if weights.use_rslora else 1))


def short_targets(model: nn.Module, names: Iterable[str]) -> list[str] | str:
    """The shortest name endings that match the named modules and no others, sorted: ["to_k", "to_out.0", "to_q"].

    An ending begins with a word, not with an index. If endings cannot tell a module from the others, the result is a
    regular expression that lists the names.
    """
    names = set(names)
    others = {name for name, _ in model.named_modules() if not any(name.startswith(n + ".") for n in names)} - names
    targets = set()
    for name in names:
        parts = name.split(".")
        endings = [".".join(parts[i:]) for i in reversed(range(len(parts))) if not parts[i].isdigit()]
        targets.add(next((end for end in endings if not any(lora.selects([end], n) for n in others)), name))
    if any(lora.selects(sorted(targets), name) for name in others):
        return "|".join(re.escape(name) for name in sorted(names))
    return sorted(targets)


# ---- into a model ----


def load_adapter(
    path: str | os.PathLike,
    unet: nn.Module | None = None,
    text_encoder: nn.Module | None = None,
    expect: Mapping[str, object] | None = None,
) -> dict:
    """Put the adapter in a file or folder into a U-Net, a text encoder or both; A and B are float32 and trainable.

    expect: entries that the file's metadata must not contradict, such as {"prediction_type": "v_prediction"}.
    Returns {"rank", "alpha", "use_rslora", "dropout", "targets", "metadata", "layout"}; rank and alpha are the most
    common ones where layers differ. Everything is checked before a model is touched. Raises AdapterError, and leaves
    the models and the random state as they were, for a file that is missing, damaged, or does not fit: missing,
    unexpected or wrongly shaped keys are named.
    """
    path = adapter_file(path)
    adapter = read_adapter(path)
    check_origin(adapter, expect or {}, path)
    put_into(adapter, unet, text_encoder, str(path))
    component = "unet" if adapter.of("unet") else "text_encoder"
    model = unet if component == "unet" else text_encoder
    return {
        "rank": statistics.mode(w.rank for w in adapter.layers.values()),
        "alpha": statistics.mode(w.alpha for w in adapter.layers.values()),
        "use_rslora": any(w.use_rslora for w in adapter.layers.values()),
        "dropout": adapter.dropout,
        "targets": adapter.targets.get(component) or short_targets(model, lora.lora_layers(model)),  # type: ignore[arg-type]
        "metadata": adapter.metadata,
        "layout": adapter.layout,
    }


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

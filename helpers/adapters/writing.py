"""Adapter files: a trained LoRA as other software reads it.

We write one safetensors file in the layout of diffusers and PEFT (`pytorch_lora_weights.safetensors`) or of kohya's
trainers, and read those, PEFT's own folders and files of older versions of diffusers; the names are in
`helpers.adapters.layouts`.

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
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers import lora
from helpers.adapters import layouts
from helpers.adapters.configuration import COMPONENTS, CONFIG_KEY, Adapter, AdapterError, lora_config
from helpers.adapters.reading import PROVENANCE_KEY, WEIGHTS_NAME
from helpers.base.files import atomic_path
from helpers.lora.lowrank import LoRAWeights, weights_of


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
    layers, and for DoRA by input in diffusers' layout.
    """
    return write_adapter(path, adapter_of(unet, text_encoder, metadata), layout)


def adapter_of(
    unet: nn.Module | None = None, text_encoder: nn.Module | None = None, metadata: dict | None = None
) -> Adapter:
    """A copy of the adapter in a U-Net, a text encoder or both. Raises AdapterError where there is none."""
    layers, targets, dropout = {}, {}, 0.0  # type: dict[str, LoRAWeights], dict[str, str | list[str]], float
    for component, model in zip(COMPONENTS, (unet, text_encoder), strict=True):
        if model is not None and (found := lora.lora_layers(model)):
            targets[component] = short_targets(model, found)
            layers |= {layouts.layer_of(component, name): w for name, w in weights_of(model).items()}
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
            if layouts.READERS[layout](key) != (layer, part):
                raise AdapterError(f"{layer}: {layout}'s layout has no name for this layer that could be read again")
            if part == "lora_magnitude_vector":
                tensor = stored_magnitude(layer, weights, layout)
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
        key = layouts.key_of("kohya", layer, "alpha")
        alphas[key] = torch.tensor(kohya_alpha(weights), dtype=torch.float32)
        if not alphas[key].isfinite():
            raise AdapterError(f"{key!r}: the alpha {weights.alpha:g} does not fit a float32, as kohya's layout has it")
    return alphas


def stored_magnitude(layer: str, weights: LoRAWeights, layout: str) -> Tensor:
    """DoRA's magnitude in the shape that a layout has for it; kohya's is a column by output, a row by input."""
    assert weights.magnitude is not None
    if layout == "kohya":
        ones = [1] * (weights.A.ndim - 2)
        return weights.magnitude.reshape([1, -1, *ones] if weights.by_input else [-1, 1, *ones])
    if weights.by_input:
        raise AdapterError(f"{layer}: DoRA by input is not what PEFT has; write it in kohya's layout")
    return weights.magnitude


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

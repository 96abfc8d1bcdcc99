"""Reading adapter files: every tensor, name and number is checked before anything is done with it.

A file may come from anyone, cut short, altered or made for another model. Whatever is wrong with it ends in an
AdapterError that names the file, the key as the file has it, and what to do.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from helpers.adapters import layouts
from helpers.adapters.configuration import Adapter, AdapterError, layer_alpha, read_configs, read_json
from helpers.lora.lowrank import LoRAWeights

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
PEFT_NAME = "adapter_model.safetensors"
PROVENANCE_KEY = "provenance"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def adapter_file(path: str | os.PathLike) -> Path:
    """The file that a path means: itself if it ends in .safetensors, else the adapter file inside that folder.

    Raises AdapterError for a file of another kind.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return path
    if path.is_file():
        raise AdapterError(
            f"{path}: not a .safetensors file. Pickled weights (.bin, .pt, .ckpt) can run code when they are loaded, "
            "so they are not read here; ask the author for a .safetensors file"
        )
    return path / (PEFT_NAME if (path / PEFT_NAME).exists() and not (path / WEIGHTS_NAME).exists() else WEIGHTS_NAME)


def read_adapter(path: str | os.PathLike) -> Adapter:
    """The adapter in a file or folder, in whichever layout, checked as far as that goes without a model.

    Raises AdapterError for a file that is missing, damaged or no adapter; keys are named as the file has them.
    """
    path = adapter_file(path)
    tensors, header = read_file(path)
    layout = layouts.layout_of(list(tensors))
    found, keys = sort_tensors(path, tensors)
    adapter = Adapter({}, layout=layout, keys=keys)
    config = read_configs(path, header, layout)
    ranks = {layer: check_parts(path, parts, adapter, layer) for layer, parts in found.items()}
    layers, targets = {}, {}
    for layer, parts in found.items():
        component, _, name = layer.partition(".")
        own = config[component]
        if own["use_dora"] and "lora_magnitude_vector" not in parts:
            raise missing(path, adapter, layer, "lora_magnitude_vector", ": the header says that this is DoRA")
        alpha = stored_alpha(parts["alpha"]) if "alpha" in parts else layer_alpha(own, name, ranks[layer])
        A, B = parts["lora_A.weight"].float(), parts["lora_B.weight"].float()
        magnitude = parts["lora_magnitude_vector"].float() if "lora_magnitude_vector" in parts else None
        layers[layer] = LoRAWeights(A, B, alpha, own["use_rslora"], magnitude)
        if own["target_modules"] and own["complete"]:
            targets[component] = without_text_model(own["target_modules"])
    dropout = max(own["lora_dropout"] for own in config.values())
    metadata = read_json(path, header, PROVENANCE_KEY)
    return replace(adapter, layers=layers, targets=targets, metadata=metadata, dropout=dropout)


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header's text entries of a safetensors file."""
    if not path.is_file():
        raise AdapterError(f"{path}: there is no such adapter file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            header = file.metadata() or {}
    except Exception as error:  # a damaged file can fail in many ways
        raise AdapterError(f"{path}: not a readable safetensors file ({error}); save or download it again") from error
    if not tensors:
        raise AdapterError(f"{path}: the file holds no tensors; save or download it again")
    return tensors, header


def sort_tensors(
    path: Path, tensors: dict[str, Tensor]
) -> tuple[dict[str, dict[str, Tensor]], dict[layouts.Place, str]]:
    """{layer: {part: tensor}} and the key of each, once every key is one of its layout's and every value finite."""
    layout = layouts.layout_by_key(list(tensors))
    found: dict[str, dict[str, Tensor]] = {}
    keys: dict[layouts.Place, str] = {}
    for key, value in tensors.items():
        place = layouts.READERS[layout[key]](key)
        if place is None:
            raise AdapterError(f"{path}: unexpected key {key!r}, which is no {layout[key]} LoRA key. {foreign(key)}")
        numbers = FLOATS if place[1] != "alpha" else (*FLOATS, torch.int32, torch.int64)
        if value.dtype not in numbers or not torch.isfinite(value.float()).all():
            raise AdapterError(
                f"{path}: {key!r} holds values that are not finite floating-point numbers: the training diverged or "
                "the file is damaged; take an earlier checkpoint, or download it again"
            )
        layer, part = place
        if part in found.setdefault(layer, {}):
            twice = f"{key!r} names the same tensor as {keys[place]!r}"
            raise AdapterError(f"{path}: {twice}; save or download it again")
        found[layer][part], keys[place] = value, key
    return found, keys


def foreign(key: str) -> str:
    """A hint at what an unknown key comes from."""
    if re.match(
        r"lora_te[12]_|lora_unet_(input|middle|output)_block|text_encoder_2\.|transformer\.|lora_transformer_", key
    ):
        return "It belongs to an adapter for Stable Diffusion XL or later; this course reads those for versions 1 and 2"
    if re.search(r"hada_|lokr_|dora_scale|\.diff", key):
        return "It belongs to another kind of adapter (LyCORIS) than LoRA"
    return "Is this an adapter for Stable Diffusion 1 or 2?"


def missing(path: str | os.PathLike, adapter: Adapter, layer: str, part: str, why: str = "") -> AdapterError:
    """The error for a tensor that is not there."""
    key = adapter.key(layer, part)
    return AdapterError(f"{path}: missing key {key!r}{why}; the file is incomplete: save or download it again")


def check_parts(path: Path, parts: dict[str, Tensor], adapter: Adapter, layer: str) -> int:
    """The rank of one layer, once A and B are there and fit one another."""
    for part in ("lora_A.weight", "lora_B.weight"):
        if part not in parts:
            raise missing(path, adapter, layer, part)
    A, B = parts["lora_A.weight"], parts["lora_B.weight"]
    a, b = (adapter.key(layer, part) for part in ("lora_A.weight", "lora_B.weight"))
    fault = None
    for key, tensor in ((a, A), (b, B)):
        if tensor.ndim not in (2, 4) or not tensor.numel():
            fault = f"{key!r} has shape {list(tensor.shape)}, and needs 2 or 4 dimensions, none 0"
    if fault is None and B.shape[1] != A.shape[0]:
        fault = f"{a!r} has rank {A.shape[0]} and {b!r} rank {B.shape[1]}: they do not multiply"
    if "alpha" in parts and parts["alpha"].numel() != 1:
        fault = f"{adapter.key(layer, 'alpha')!r} is not one number"
    if fault:
        raise AdapterError(f"{path}: {fault}; save or download it again")
    return A.shape[0]


def without_text_model(targets: list[str] | str) -> list[str] | str:
    """The targets without the "text_model." of transformers before version 5; ends of names select in both."""
    return targets if isinstance(targets, str) else [name.removeprefix(layouts.TEXT_PREFIX) for name in targets]


def stored_alpha(tensor: Tensor) -> float:
    """The number that a float32 alpha stands for: 0.1, and not the 0.10000000149 next to it."""
    return float(str(np.float32(tensor.float().item())))

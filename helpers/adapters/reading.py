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
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, *FLOAT8)
EMBEDDING = "bundle_emb."  # how the keys of a textual inversion begin that came in an adapter's file


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
    everything, header = read_file(path)
    tensors = {key: tensor for key, tensor in everything.items() if not key.startswith(EMBEDDING)}
    if not tensors:
        raise AdapterError(f"{path}: it holds embeddings (textual inversion) and no LoRA. {foreign('emb_params')}")
    layout = layouts.layout_of(list(tensors))
    found, keys = sort_tensors(path, tensors)
    adapter = Adapter({}, layout=layout, keys=keys, notes=notes_on(everything))
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
        if "lora_mid.weight" in parts:
            A = fold_middle(A, parts["lora_mid.weight"].float())
        magnitude, by_input = magnitude_of(parts, layout in ("kohya", "ldm"))
        layers[layer] = LoRAWeights(A, B, alpha, own["use_rslora"], magnitude, by_input)
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


def notes_on(tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """What a reader of the file should know: how coarse its numbers are, and what of it is left out."""
    notes = []
    coarse = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.dtype in FLOAT8})
    if coarse:
        notes.append(f"its numbers are stored as {' and '.join(coarse)}: one or two digits are left of each")
    embeddings = sorted({key.split(".")[1] for key in tensors if key.startswith(EMBEDDING)})
    if embeddings:
        named = ", ".join(map(repr, embeddings))
        notes.append(f"it brings embeddings (textual inversion), which are left out: {named}. The LoRA is read without")
    return tuple(notes)


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
        if value.dtype not in numbers:
            kind = str(value.dtype).removeprefix("torch.")
            raise AdapterError(
                f"{path}: {key!r} is stored as {kind}, and the numbers of a LoRA are floating-point: if it was made "
                "smaller (quantised), ask the author for the file before that, or download it again"
            )
        if not torch.isfinite(value.float()).all():
            raise AdapterError(
                f"{path}: {key!r} holds values that are not finite: the training diverged or the file is damaged; "
                "take an earlier checkpoint, or download it again"
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
    if key.startswith(("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")):
        return "It belongs to a whole model, not to an adapter: `course adapter extract` cuts one out of a difference"
    if key in ("emb_params", "clip_l", "clip_g", "*") or key.startswith("string_to_param"):
        return "It belongs to an embedding (textual inversion), which this course does not use"
    if re.search(r"hada_|lokr_|oft_|boft_|glora|\.[ab][12]\.weight|\.diff(_b)?$|[wb]_norm", key):
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
    middle, scale = parts.get("lora_mid.weight"), parts.get("lora_magnitude_vector")
    if fault is None and middle is not None and not fits_between(middle, A, B):
        fault = f"{adapter.key(layer, 'lora_mid.weight')!r} has shape {list(middle.shape)} and does not fit {a!r}"
    if fault is None and scale is not None and adapter.layout in ("kohya", "ldm") and not is_scale(scale, A, B):
        fault = f"{adapter.key(layer, 'lora_magnitude_vector')!r} has shape {list(scale.shape)}, no row and no column"
    if fault:
        raise AdapterError(f"{path}: {fault}; save or download it again")
    return A.shape[0]


# ---- what kohya's layout has and others lack ----
def fits_between(middle: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether a convolution in three parts multiplies: A and B 1x1, and between them rank to rank."""
    rank = A.shape[0]
    return A.ndim == B.ndim == middle.ndim == 4 and A.shape[2:] == (1, 1) and middle.shape[:2] == (rank, rank)


def fold_middle(A: Tensor, middle: Tensor) -> Tensor:
    """The A of two parts for one of three: [r, in, 1, 1] and [r, r, k, k] -> [r, in, k, k]. (LyCORIS: "Tucker".)"""
    # A'[i] = sum_j middle[i, j] A[j]: one convolution after another, the first of which looks at one pixel
    return torch.einsum("ijkl,jn->inkl", middle, A.flatten(1))


def is_scale(scale: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether a dora_scale is one number for each output, [out, 1 …], or for each input, [1, in …]."""
    outputs, inputs = B.shape[0], A.shape[1]
    shape = list(scale.shape)
    return shape in ([outputs], [outputs, *[1] * (A.ndim - 1)], [1, inputs, *[1] * (A.ndim - 2)])


def magnitude_of(parts: dict[str, Tensor], is_kohyas: bool) -> tuple[Tensor | None, bool]:
    """DoRA's magnitude in PEFT's shape, or None, and whether it is by input.

    kohya's layout keeps [out, 1 …] for a magnitude by output; where a layer has as many inputs, the shape still tells.
    """
    scale = parts.get("lora_magnitude_vector")
    if scale is None or not is_kohyas:
        return None if scale is None else scale.float(), False
    by_input = scale.ndim > 1 and scale.shape[0] == 1 and scale.shape[1] == parts["lora_A.weight"].shape[1]
    by_input = by_input and scale.shape[0] != parts["lora_B.weight"].shape[0]
    dimensions = parts["lora_A.weight"].ndim
    return scale.float().reshape([-1] if dimensions == 2 else [1, -1, 1, 1]), by_input


def without_text_model(targets: list[str] | str) -> list[str] | str:
    """The targets without the "text_model." of transformers before version 5; ends of names select in both."""
    return targets if isinstance(targets, str) else [name.removeprefix(layouts.TEXT_PREFIX) for name in targets]


def stored_alpha(tensor: Tensor) -> float:
    """The number that a float32 alpha stands for: 0.1, and not the 0.10000000149 next to it."""
    return float(str(np.float32(tensor.float().item())))

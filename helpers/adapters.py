"""Adapter files: a trained LoRA as other software reads it.

The layout is that of diffusers and PEFT: one safetensors file, pytorch_lora_weights.safetensors, with the tensors
`unet.<module>.lora_A.weight` [rank, in, ...] and `unet.<module>.lora_B.weight` [out, rank, ...]. Its header carries
the adapter's configuration under "lora_adapter_metadata" (JSON; keys "unet." + the fields of PEFT's LoraConfig), as
diffusers writes it, so that alpha survives the trip; and under "provenance" (JSON) whatever the caller wants to say
about the adapter's origin. A file without a configuration has alpha = rank, as diffusers assumes.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.lora import (
    LoRALayer,
    freeze_all_but_lora,
    load_lora_state_dict,
    lora_layers,
    lora_state_dict,
    wrap,
)

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
CONFIG_KEY = "lora_adapter_metadata"
PROVENANCE_KEY = "provenance"
PREFIX = "unet."
KEY = re.compile(r"unet\.(?P<name>.+)\.(?P<part>lora_[AB])\.weight")


class AdapterError(ValueError):
    """An adapter file that cannot be used; the message names the file, the key and what to do."""


def adapter_file(path: str | os.PathLike) -> Path:
    """The file that a path means: itself if it ends in .safetensors, else the adapter file inside that folder."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / WEIGHTS_NAME


# ---- saving ----


def save_adapter(path: str | os.PathLike, unet: nn.Module, metadata: dict | None = None) -> Path:
    """Write the U-Net's LoRA layers to a file, or into a folder, and return the file's path.

    `metadata` is anything that JSON can hold; `load_adapter` gives it back. The adapter is saved as trained, whatever
    `scaled` or `merge` are doing to it. The file is complete or not there: it is written under another name first.
    Raises AdapterError for a U-Net without LoRA layers.
    """
    layers = lora_layers(unet)
    if not layers:
        raise AdapterError("the U-Net has no LoRA layers to save; inject(unet, ...) adds them")
    tensors = {PREFIX + key: value.cpu().contiguous() for key, value in lora_state_dict(unet).items()}
    config = {PREFIX + key: value for key, value in lora_config(unet, layers).items()}
    header = {
        "format": "pt",
        CONFIG_KEY: json.dumps(config, indent=2, sort_keys=True),
        PROVENANCE_KEY: json.dumps(metadata or {}, sort_keys=True),
    }
    path = adapter_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, unfinished, metadata=header)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def lora_config(unet: nn.Module, layers: dict[str, LoRALayer]) -> dict:
    """The fields of PEFT's LoraConfig that rebuild these layers; ranks and alphas that differ become patterns."""
    first = next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        "r": first.rank,
        "lora_alpha": first.alpha,
        "rank_pattern": {f"^{name}": layer.rank for name, layer in layers.items() if layer.rank != first.rank},
        "alpha_pattern": {f"^{name}": layer.alpha for name, layer in layers.items() if layer.alpha != first.alpha},
        "use_rslora": first.use_rslora,
        "lora_dropout": getattr(first.lora_dropout, "p", 0.0),
        "target_modules": short_targets(unet, layers),
        "init_lora_weights": True,
        "bias": "none",
    }


def short_targets(unet: nn.Module, names: Iterable[str]) -> list[str] | str:
    """The shortest name endings that match the named modules and no others, sorted: ["to_k", "to_out.0", "to_q"].

    An ending begins with a word, not with an index. If endings cannot tell a module from the others, the result is a
    regular expression that lists the names.
    """
    names = set(names)
    others = {name for name, _ in unet.named_modules() if not any(name.startswith(n + ".") for n in names)} - names
    targets = set()
    for name in names:
        parts = name.split(".")
        endings = [".".join(parts[i:]) for i in reversed(range(len(parts))) if not parts[i].isdigit()]
        targets.add(next((ending for ending in endings if not matching(others, [ending])), name))
    if matching(others, list(targets)):
        return "|".join(re.escape(name) for name in sorted(names))
    return sorted(targets)


def matching(names: Iterable[str], targets: list[str] | str) -> list[str]:
    """The names that a LoraConfig's target_modules selects: a list of name endings, or one regular expression."""
    if isinstance(targets, str):
        return [name for name in names if re.fullmatch(targets, name)]
    endings = tuple("." + target for target in targets)
    return [name for name in names if name in targets or name.endswith(endings)]


# ---- loading ----


def load_adapter(path: str | os.PathLike, unet: nn.Module) -> dict:
    """Add the adapter in a file or folder to a U-Net; the base is frozen, A and B are float32 and trainable.

    Returns {"rank", "alpha", "use_rslora", "dropout", "targets", "metadata"}; rank and alpha are the most common ones
    where layers differ. The file is checked whole before the U-Net is touched. Raises AdapterError, and leaves the
    U-Net and the random state as they were, for a file that is missing, damaged, or does not fit: missing, unexpected
    or wrongly shaped keys are named.
    """
    path = adapter_file(path)
    if lora_layers(unet):
        raise AdapterError(f"{path}: the U-Net already has LoRA layers; remove(unet) takes them out")
    tensors, header = read_file(path)
    config = read_config(path, header)
    ranks = check_tensors(path, tensors, unet)
    check_complete(path, config, ranks, unet)
    alphas = {name: layer_alpha(path, config, name, rank) for name, rank in ranks.items()}

    with torch.random.fork_rng(devices=[]):  # wrapping draws an initial A that is overwritten
        for name, rank in ranks.items():
            wrap(unet, name, rank, alphas[name], config["lora_dropout"], config["use_rslora"])
    load_lora_state_dict(unet, {key.removeprefix(PREFIX): value for key, value in tensors.items()})
    freeze_all_but_lora(unet)
    return {
        "rank": statistics.mode(ranks.values()),
        "alpha": statistics.mode(alphas.values()),
        "use_rslora": config["use_rslora"],
        "dropout": config["lora_dropout"],
        "targets": config["target_modules"] or short_targets(unet, ranks),
        "metadata": read_json(path, header, PROVENANCE_KEY),
    }


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header's text entries of a safetensors file."""
    if not path.is_file():
        raise AdapterError(f"{path}: there is no such adapter file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except Exception as error:  # a damaged file can fail in many ways
        raise AdapterError(f"{path}: not a readable safetensors file ({error}); save or download it again") from error


def read_json(path: Path, header: dict[str, str], key: str) -> dict:
    """The JSON object in one entry of the header; empty if the entry is absent."""
    try:
        value = json.loads(header.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: the header's {key!r} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: the header's {key!r} is not a JSON object")
    return value


def read_config(path: Path, header: dict[str, str]) -> dict:
    """The fields of the U-Net's LoraConfig that matter here, checked; None or empty where the file does not say."""
    stored = read_json(path, header, CONFIG_KEY)
    stored = {key.removeprefix(PREFIX): value for key, value in stored.items() if key.startswith(PREFIX)}
    if stored.get("use_dora"):
        raise AdapterError(f"{path}: this is a DoRA adapter; only plain LoRA is supported")
    config = {
        "lora_alpha": stored.get("lora_alpha"),
        "alpha_pattern": stored.get("alpha_pattern") or {},
        "use_rslora": stored.get("use_rslora") or False,
        "lora_dropout": stored.get("lora_dropout") or 0.0,
        "target_modules": stored.get("target_modules") or [],
    }
    valid = {
        "lora_alpha": config["lora_alpha"] is None or is_number(config["lora_alpha"]),
        "alpha_pattern": is_pattern(config["alpha_pattern"]),
        "use_rslora": isinstance(config["use_rslora"], bool),
        "lora_dropout": is_number(config["lora_dropout"]) and 0 <= config["lora_dropout"] < 1,
        "target_modules": is_targets(config["target_modules"]),
    }
    for key, fine in valid.items():
        if not fine:
            raise AdapterError(f"{path}: the header's {PREFIX + key!r} makes no sense: {config[key]!r}")
    # the options with which PEFT leaves out some of the modules that target_modules selects
    selective = ("exclude_modules", "layers_to_transform", "layers_pattern")
    config["complete"] = not any(stored.get(key) for key in selective)
    return config


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_pattern(value: object) -> bool:
    """Whether a JSON value maps regular expressions to numbers."""
    return isinstance(value, dict) and all(is_regex(key) and is_number(value[key]) for key in value)


def is_targets(value: object) -> bool:
    """Whether a JSON value is a regular expression or a list of names."""
    return is_regex(value) if isinstance(value, str) else is_names(value)


def is_names(value: object) -> bool:
    """Whether a JSON value is a list of strings."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_regex(text: str) -> bool:
    """Whether the text compiles as a regular expression."""
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def check_tensors(path: Path, tensors: dict[str, Tensor], unet: nn.Module) -> dict[str, int]:
    """The rank of each module in the file, once every key, shape and value has been found to fit the U-Net."""
    modules = dict(unet.named_modules())
    ranks = {}
    for key, value in tensors.items():
        match = KEY.fullmatch(key)
        module = modules.get(match["name"]) if match else None
        if not isinstance(module, nn.Linear | nn.Conv2d) or getattr(module, "groups", 1) != 1:
            raise AdapterError(
                f"{path}: unexpected key {key!r}; the U-Net has no such layer. Is the adapter for this base model?"
            )
        if not value.dtype.is_floating_point or not torch.isfinite(value.float()).all():
            raise AdapterError(f"{path}: {key!r} holds values that are not finite floating-point numbers")
        if match["part"] == "lora_A":
            ranks[match["name"]] = value.shape[0] if value.ndim else 0
    if not tensors:
        raise AdapterError(f"{path}: the file holds no tensors")
    for name in {KEY.fullmatch(key)["name"] for key in tensors}:
        # A is [rank, in, ...] and B is [out, rank, 1 ...] beside a weight [out, in, ...]
        shape, rank = modules[name].weight.shape, max(ranks.get(name, 1), 1)
        check_shape(path, tensors, f"{PREFIX}{name}.lora_A.weight", [rank, *shape[1:]])
        check_shape(path, tensors, f"{PREFIX}{name}.lora_B.weight", [shape[0], rank] + [1] * (len(shape) - 2))
    return {name: ranks[name] for name in modules if name in ranks}


def check_shape(path: Path, tensors: dict[str, Tensor], key: str, shape: list[int]) -> None:
    """Raise AdapterError unless the key is there with that shape."""
    if key not in tensors:
        raise AdapterError(f"{path}: missing key {key!r}")
    if list(tensors[key].shape) != shape:
        raise AdapterError(
            f"{path}: {key!r} has shape {list(tensors[key].shape)}, this U-Net needs {shape}. "
            "Is the adapter for this base model?"
        )


def check_complete(path: Path, config: dict, names: Iterable[str], unet: nn.Module) -> None:
    """Raise AdapterError if the header's targets select a layer of the U-Net that the file says nothing about."""
    if not config["complete"]:
        return
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for name in matching(layers, config["target_modules"]):
        if name not in names:
            key = f"{PREFIX}{name}.lora_A.weight"
            raise AdapterError(f"{path}: missing key {key!r}: the header's targets select that layer")


def layer_alpha(path: Path, config: dict, name: str, rank: int) -> float:
    """One layer's alpha: from the first pattern that matches its name, else the common one, else its rank."""
    for pattern, alpha in config["alpha_pattern"].items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return alpha
    return rank if config["lora_alpha"] is None else config["lora_alpha"]

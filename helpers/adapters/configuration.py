"""What an adapter file holds, and its configuration: the fields of PEFT's LoraConfig, as diffusers and PEFT store them.

A file may come from anyone, so every field is checked before it is used.
"""

from __future__ import annotations

import json
import re
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from helpers import lora
from helpers.adapters import layouts
from helpers.lora.lowrank import LoRAWeights

CONFIG_KEY = "lora_adapter_metadata"
MAX_REPEATS = 3  # of a pattern in a file
PEFT_CONFIG = "adapter_config.json"
COMPONENTS = ("unet", "text_encoder")


class AdapterError(ValueError):
    """An adapter file that cannot be used; the message names the file, the key and what to do."""


@dataclass(frozen=True)
class Adapter:
    """What an adapter file holds.

    layers: {"unet.<module>" or "text_encoder.<module>": LoRAWeights}. targets: for each component the targets that the
    file names. metadata: its provenance. layout: how its tensors are named, see `helpers.adapters.layouts`. dropout: of
    training. keys: the file's own names of its tensors, {(layer, part): key}, for messages. notes: what a reader of the
    file should know, in sentences.
    """

    layers: dict[str, LoRAWeights]
    targets: dict[str, list[str] | str] = field(default_factory=dict)
    metadata: dict = field(default_factory=dict)
    layout: str = "diffusers"
    dropout: float = 0.0
    keys: dict[layouts.Place, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, component: str) -> dict[str, LoRAWeights]:
        """The layers of "unet" or "text_encoder", by the names of the modules they adapt."""
        prefix = component + "."
        return {name.removeprefix(prefix): w for name, w in self.layers.items() if name.startswith(prefix)}

    def key(self, layer: str, part: str) -> str:
        """What the file calls a tensor, or would: an old file's names are guessed from that of the other factor."""
        if (layer, part) in self.keys:
            return self.keys[layer, part]
        sides = dict(zip(layouts.OLD_PARTS.values(), ((".up.", ".down."), (".down.", ".up.")), strict=True))
        other = next((p for p in sides if p != part and (layer, p) in self.keys), None)
        if self.layout == "old" and part in sides and other:
            return self.keys[layer, other].replace(*sides[part])
        return layouts.key_of(self.layout, layer, part)


def lora_config(component: str, layers: Mapping[str, LoRAWeights], targets: list[str] | str, dropout: float) -> dict:
    """The fields that rebuild one component's layers; ranks and alphas that differ become patterns."""
    first = next(iter(layers.values()))
    start = "^" if component == "unet" else ""  # a text encoder's names may have "text_model." before them
    fields = {
        "peft_type": "LORA",
        "r": first.rank,
        "lora_alpha": first.alpha,
        "rank_pattern": {start + n: w.rank for n, w in layers.items() if w.rank != first.rank},
        "alpha_pattern": {start + n: w.alpha for n, w in layers.items() if w.alpha != first.alpha},
        "use_rslora": first.use_rslora,
        "use_dora": first.magnitude is not None,
        "lora_dropout": dropout,
        "target_modules": targets,
        "init_lora_weights": True,
        "bias": "none",
    }
    return {f"{component}.{key}": value for key, value in fields.items()}


def read_json(path: Path, header: Mapping[str, str], key: str) -> dict:
    """The JSON object in one entry of the header; empty if the entry is absent."""
    return json_object(f"{path}: the header's {key!r}", header.get(key, "{}"))


def json_object(what: str, text: str) -> dict:
    """The JSON object that a text is; `what` begins the message of the AdapterError for another text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{what} is not JSON ({error}); save or download it again") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{what} is not a JSON object; save or download it again")
    return value


def read_configs(path: Path, header: Mapping[str, str], layout: str) -> dict[str, dict]:
    """For each component the fields of its LoraConfig that matter here, from the header or from PEFT's own file."""
    stored: dict = {}
    if layout == "peft" and (path.parent / PEFT_CONFIG).is_file():
        file = path.parent / PEFT_CONFIG
        own = json_object(f"{file}: its text", file.read_text(encoding="utf-8", errors="replace"))
        return {component: check_config(f"{file}: its field", own, "") for component in COMPONENTS}
    if layout in ("diffusers", "peft", "old"):
        stored = read_json(path, header, CONFIG_KEY)
    return {component: check_config(f"{path}: the header's", stored, component + ".") for component in COMPONENTS}


def check_config(what: str, stored: dict, prefix: str) -> dict:
    """One component's fields, checked; None or empty where the file does not say. `what` begins a message."""
    stored = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    config = {
        "lora_alpha": stored.get("lora_alpha"),
        "alpha_pattern": stored.get("alpha_pattern") or {},
        "use_rslora": stored.get("use_rslora") or False,
        "use_dora": stored.get("use_dora") or False,
        "lora_dropout": stored.get("lora_dropout") or 0.0,
        "target_modules": stored.get("target_modules") or [],
    }
    valid = {
        "lora_alpha": config["lora_alpha"] is None or is_number(config["lora_alpha"]),
        "alpha_pattern": is_pattern(config["alpha_pattern"]),
        "use_rslora": isinstance(config["use_rslora"], bool),
        "use_dora": isinstance(config["use_dora"], bool),
        "lora_dropout": is_number(config["lora_dropout"]) and 0 <= config["lora_dropout"] < 1,
        "target_modules": is_targets(config["target_modules"]),
    }
    for key, fine in valid.items():
        if not fine:
            said = f"{what} {prefix + key!r} makes no sense: {reprlib.repr(config[key])}"
            raise AdapterError(f"{said}; save or download it again")
    # the options with which PEFT leaves out some of the modules that target_modules selects
    selective = ("exclude_modules", "layers_to_transform", "layers_pattern")
    config["complete"] = not any(stored.get(key) for key in selective)
    return config


def is_number(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < sys.float_info.max


def is_pattern(value: object) -> bool:
    """Whether a JSON value maps regular expressions to numbers. `lora.by_pattern` puts them into a group."""
    if not isinstance(value, dict) or not all(is_number(number) for number in value.values()):
        return False
    return all(is_regex(key) and is_regex(f"a({key})") for key in value)


def is_targets(value: object) -> bool:
    """Whether a JSON value is a regular expression or a list of names."""
    return is_regex(value) if isinstance(value, str) else is_names(value)


def is_names(value: object) -> bool:
    """Whether a JSON value is a list of strings."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_regex(text: str) -> bool:
    """Whether the text compiles as a regular expression, and one that matches fast whatever the name.

    A repeated group, or many repeats, can take for ever on a name that does not match; no module's name needs them.
    """
    if re.search(r"\)[*+{]", text) or len(re.findall(r"[*+{]", text)) > MAX_REPEATS:
        return False
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def layer_alpha(config: dict, name: str, rank: int) -> float:
    """One layer's alpha: from the first pattern that matches its name, else the common one, else its rank."""
    common = rank if config["lora_alpha"] is None else config["lora_alpha"]
    return lora.by_pattern(config["alpha_pattern"], name, common)

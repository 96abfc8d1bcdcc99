"""What adapter files call their tensors: diffusers and PEFT, kohya's trainers, and older versions of diffusers.

Here a layer is "unet.<module>" or "text_encoder.<module>", with the module's name in the model, and its tensors are
"lora_A.weight", "lora_B.weight", "lora_magnitude_vector" (DoRA) and, in kohya's files alone, "alpha":

    diffusers   unet.mid_block.attentions.0.proj_in.lora_A.weight
    peft        base_model.model.mid_block.attentions.0.proj_in.lora_A.weight
    kohya       lora_unet_mid_block_attentions_0_proj_in.lora_down.weight
    old         unet.mid_block.attentions.0.proj_in.lora.down.weight, mid_block.….attn1.processor.to_q_lora.down.weight

The text encoder's modules were inside a `text_model` before transformers 5. Its layers are named without that word
here, read with and without it, and written with it, which every version of diffusers understands.
"""

from __future__ import annotations

import re
from collections.abc import Callable

LAYOUTS = ("diffusers", "kohya", "peft", "old")
WRITABLE = ("diffusers", "kohya")
PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
TEXT_PREFIX = "text_model."

# The words that module names of Stable Diffusion 1 and 2 are made of: kohya joins them with "_", which some contain.
WORDS = """
    down_blocks mid_block up_blocks resnets attentions transformer_blocks downsamplers upsamplers
    conv_in conv_out conv1 conv2 conv_shortcut conv time_embedding linear_1 linear_2 time_emb_proj
    attn1 attn2 to_q to_k to_v to_out ff net proj proj_in proj_out
    text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2
""".split()
WORD = re.compile(rf"({'|'.join(sorted(WORDS, key=len, reverse=True))}|\d+)(?:_|$)")

KOHYA_PARTS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "alpha": "alpha"}
KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
# Before PEFT, diffusers kept an attention layer's LoRA in its processor, under names of its own.
OLD_ATTENTION = {
    "unet": {"to_q_lora": "to_q", "to_k_lora": "to_k", "to_v_lora": "to_v", "to_out_lora": "to_out.0"},
    "text_encoder": {"to_q_lora": "q_proj", "to_k_lora": "k_proj", "to_v_lora": "v_proj", "to_out_lora": "out_proj"},
}
OLD_PARTS = {"down": "lora_A.weight", "up": "lora_B.weight"}

Place = tuple[str, str]  # a layer, and which of its tensors


def dotted(name: str) -> str | None:
    """ "mid_block.attentions.0.proj_in" for kohya's "mid_block_attentions_0_proj_in"; None for words not known."""
    words, at = [], 0
    while at < len(name):
        match = WORD.match(name, at)
        if match is None:
            return None
        words.append(match[1])
        at = match.end()
    return ".".join(words)


def layer_of(component: str | None, name: str) -> str:
    """The layer's name here; without a component, the module's name tells whose it is."""
    if component is None:
        component = "text_encoder" if name.startswith((TEXT_PREFIX, "encoder.layers.")) else "unet"
    return f"{component}.{name.removeprefix(TEXT_PREFIX) if component == 'text_encoder' else name}"


def place_in_diffusers(key: str) -> Place | None:
    """(layer, part) of a key in diffusers' layout; None for a key of another layout."""
    parts = "|".join(map(re.escape, PARTS))
    match = re.fullmatch(rf"(unet|text_encoder)\.(.+)\.({parts})", key)
    return match and (layer_of(match[1], match[2]), match[3])


def place_in_peft(key: str) -> Place | None:
    """(layer, part) of a key in PEFT's own layout; None for a key of another layout."""
    parts = "|".join(map(re.escape, PARTS))
    match = re.fullmatch(rf"base_model\.model\.(.+)\.({parts})", key)
    return match and (layer_of(None, match[1]), match[2])


def place_in_kohya(key: str) -> Place | None:
    """(layer, part) of a key as kohya's trainers write it; None for a key of another layout."""
    match = re.fullmatch(r"lora_(unet|te)_(\w+)\.(lora_down\.weight|lora_up\.weight|alpha)", key)
    if match is None or not (name := dotted(match[2])):
        return None
    part = next(ours for ours, theirs in KOHYA_PARTS.items() if theirs == match[3])
    return layer_of("unet" if match[1] == "unet" else "text_encoder", name), part


def place_in_old(key: str) -> Place | None:
    """(layer, part) of a key as diffusers wrote it before PEFT; None for a key of another layout."""
    kinds = "lora|lora_linear_layer|to_[a-z]+_lora"
    match = re.fullmatch(rf"(?:(unet|text_encoder)\.)?(.+)\.({kinds})\.(down|up)\.weight", key)
    if match is None:
        return None
    layer = layer_of(match[1], match[2].removesuffix(".processor"))
    if match[3].startswith("to_"):
        leaf = OLD_ATTENTION[layer.partition(".")[0]].get(match[3])
        if leaf is None:
            return None
        layer += "." + leaf
    return layer, OLD_PARTS[match[4]]


READERS: dict[str, Callable[[str], Place | None]] = {
    "diffusers": place_in_diffusers,
    "kohya": place_in_kohya,
    "peft": place_in_peft,
    "old": place_in_old,
}


def layout_of(keys: list[str]) -> str:
    """The layout in which the most of a file's keys can be read."""
    return max(LAYOUTS, key=lambda layout: sum(READERS[layout](key) is not None for key in keys))


def layout_by_key(keys: list[str]) -> dict[str, str]:
    """Each key's layout: some diffusers scripts name the U-Net's tensors in one, the text encoder's in another."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        component = key.partition(".")[0]
        groups.setdefault(component if component in OLD_ATTENTION else "", []).append(key)
    return {key: layout for group in groups.values() for layout in [layout_of(group)] for key in group}


def key_of(layout: str, layer: str, part: str) -> str:
    """What a layout calls one tensor of a layer. (Of the old layout, which had several, it gives the newest.)"""
    component, _, name = layer.partition(".")
    if layout == "kohya":
        return f"{KOHYA_PREFIXES[component]}{name.replace('.', '_')}.{KOHYA_PARTS.get(part, part)}"
    if component == "text_encoder":
        name = TEXT_PREFIX + name
    if layout == "peft":
        return f"base_model.model.{name}.{part}"
    if layout == "old":
        side = next((old for old, new in OLD_PARTS.items() if new == part), part)
        return f"{component}.{name}.{'lora' if component == 'unet' else 'lora_linear_layer'}.{side}.weight"
    return f"{component}.{name}.{part}"

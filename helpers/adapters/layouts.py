"""What adapter files call their tensors: diffusers and PEFT, kohya's trainers and those like them, older diffusers.

Here a layer is "unet.<module>" or "text_encoder.<module>", with the module's name in the model, and its tensors are
"lora_A.weight", "lora_B.weight", "lora_magnitude_vector" (DoRA) and, in kohya's files and those like them, "alpha" and
"lora_mid.weight" (a convolution in three parts):

    diffusers   unet.mid_block.attentions.0.proj_in.lora_A.weight
    peft        base_model.model.mid_block.attentions.0.proj_in.lora_A.weight
    kohya       lora_unet_mid_block_attentions_0_proj_in.lora_down.weight
    ldm         diffusion_model.middle_block.1.proj_in.lora_down.weight (ComfyUI), unet.middle_block.1.… (OneTrainer)
    old         unet.mid_block.attentions.0.proj_in.lora.down.weight, mid_block.….attn1.processor.to_q_lora.down.weight

"ldm" has the names of the first Latent Diffusion code, whose U-Net is one list of blocks.

The text encoder's modules were inside a `text_model` before transformers 5. Its layers are named without that word
here, read with and without it, and written with it, which every version of diffusers understands.
"""

from __future__ import annotations

import re
from collections.abc import Callable

LAYOUTS = ("diffusers", "kohya", "peft", "ldm", "old")
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

KOHYA_PARTS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_mid.weight": "lora_mid.weight",
    "lora_magnitude_vector": "dora_scale",
    "alpha": "alpha",
}
PART_OF_KOHYA = {theirs: ours for ours, theirs in KOHYA_PARTS.items()}
KOHYA_PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
# Before PEFT, diffusers kept an attention layer's LoRA in its processor, under names of its own.
OLD_ATTENTION = {
    "unet": {"to_q_lora": "to_q", "to_k_lora": "to_k", "to_v_lora": "to_v", "to_out_lora": "to_out.0"},
    "text_encoder": {"to_q_lora": "q_proj", "to_k_lora": "k_proj", "to_v_lora": "v_proj", "to_out_lora": "out_proj"},
}
LDM_UNET, LDM_TEXT = "diffusion_model|unet", r"clip_[lh]|text_encoders\.clip_[lh]\.transformer"
LDM_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OLD_PARTS = {"down": "lora_A.weight", "up": "lora_B.weight"}


def ldm_modules() -> dict[str, str]:
    """{name in the first Latent Diffusion code: name in diffusers} of the U-Net's blocks and single layers.

    Both U-Nets are the same. In the old one each of four levels is two residual blocks (three on the way up), with
    attention, then a change of size, all in one list.
    """
    names = {"input_blocks.0.0": "conv_in", "out.2": "conv_out"}
    names |= {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    names |= {"middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0"}
    names["middle_block.2"] = "mid_block.resnets.1"
    for level in range(4):
        for index, kind in enumerate(("resnets", "attentions")):
            down = {f"input_blocks.{3 * level + n + 1}.{index}": f"down_blocks.{level}.{kind}.{n}" for n in range(2)}
            up = {f"output_blocks.{3 * level + n}.{index}": f"up_blocks.{level}.{kind}.{n}" for n in range(3)}
            names |= down | up
        names[f"input_blocks.{3 * level + 3}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        # behind the attention, which the first level lacks; OneTrainer counts it there too
        for index in (1, 2) if level else (2, 1):
            names[f"output_blocks.{3 * level + 2}.{index}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return names


LDM_MODULES = ldm_modules()
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


def without_adapter_name(key: str) -> str:
    """A key of PEFT's without the "default" that the model's own state dict has in it."""
    return key.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector").replace(".default.", ".")


def place_in_diffusers(key: str) -> Place | None:
    """(layer, part) of a key in diffusers' layout; None for a key of another layout."""
    parts = "|".join(map(re.escape, PARTS))
    match = re.fullmatch(rf"(unet|text_encoder)\.(.+)\.({parts})", without_adapter_name(key))
    return match and (layer_of(match[1], match[2]), match[3])


def place_in_peft(key: str) -> Place | None:
    """(layer, part) of a key in PEFT's own layout; None for a key of another layout."""
    parts = "|".join(map(re.escape, PARTS))
    match = re.fullmatch(rf"base_model\.model\.(.+)\.({parts})", without_adapter_name(key))
    return match and (layer_of(None, match[1]), match[2])


def place_in_kohya(key: str) -> Place | None:
    """(layer, part) of a key as kohya's trainers write it; None for a key of another layout."""
    match = re.fullmatch(rf"lora_(unet|te)_(\w+)\.({'|'.join(map(re.escape, PART_OF_KOHYA))})", key)
    if match is None or not (name := dotted(match[2])):
        return None
    return layer_of("unet" if match[1] == "unet" else "text_encoder", name), PART_OF_KOHYA[match[3]]


def place_in_ldm(key: str) -> Place | None:
    """(layer, part) of a key as ComfyUI's and OneTrainer's newer files have it; None for a key of another layout."""
    parts = "|".join(map(re.escape, PART_OF_KOHYA))
    match = re.fullmatch(rf"({LDM_UNET}|{LDM_TEXT})\.(.+)\.({parts})", key)
    if match is None:
        return None
    if "clip" in match[1]:
        return layer_of("text_encoder", match[2]), PART_OF_KOHYA[match[3]]
    name = from_ldm(match[2])
    return None if name is None else (f"unet.{name}", PART_OF_KOHYA[match[3]])


def from_ldm(name: str) -> str | None:
    """ "mid_block.attentions.0.proj_in" for "middle_block.1.proj_in"; None for a module that the old U-Net lacks."""
    if name in LDM_MODULES:
        return LDM_MODULES[name]
    block = re.match(r"(?:(?:input|output)_blocks\.\d+|middle_block)\.\d", name)
    if block is None or block[0] not in LDM_MODULES:
        return None
    rest = name.removeprefix(block[0] + ".")
    return f"{LDM_MODULES[block[0]]}.{LDM_RESNET.get(rest, rest)}"


def to_ldm(name: str) -> str:
    """ "middle_block.1.proj_in" for "mid_block.attentions.0.proj_in"; a name of no known module stays as it is."""
    old = {new: old for old, new in LDM_MODULES.items()}
    if name in old:
        return old[name]
    block = re.match(r"(?:down_blocks\.\d|mid_block|up_blocks\.\d)\.(resnets|attentions)\.\d", name)
    if block is None or block[0] not in old:
        return name
    rest = name.removeprefix(block[0] + ".")
    inside = {new: old for old, new in LDM_RESNET.items()} if block[1] == "resnets" else {}
    return f"{old[block[0]]}.{inside.get(rest, rest)}"


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
    "ldm": place_in_ldm,
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
    if layout == "ldm":  # OneTrainer's names
        whole = f"unet.{to_ldm(name)}" if component == "unet" else f"clip_l.{name}"
        return f"{whole}.{KOHYA_PARTS.get(part, part)}"
    if layout == "peft":
        return f"base_model.model.{name}.{part}"
    if layout == "old":
        side = next((old for old, new in OLD_PARTS.items() if new == part), part)
        return f"{component}.{name}.{'lora' if component == 'unet' else 'lora_linear_layer'}.{side}.weight"
    return f"{component}.{name}.{part}"

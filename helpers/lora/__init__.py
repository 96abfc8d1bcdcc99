"""LoRA by hand: the layer, putting it into a model, merging it, DoRA, and adapters as values to compute with.

Needs PyTorch alone. Begin with layer.py: twenty lines of it are the whole idea.
"""

from helpers.lora.injection import (
    by_pattern,
    find_targets,
    freeze_all_but_lora,
    inject,
    lora_layers,
    lora_parameters,
    lora_state_dict,
    matches,
    replace_module,
    selects,
    wrap,
)
from helpers.lora.layer import (
    KINDS,
    LoRAConv2d,
    LoRALayer,
    LoRALinear,
    check_settings,
    delta_weight,
    low_rank_update,
    scaling_of,
)
from helpers.lora.lowrank import LoRAWeights, attach, best_of_rank, compose, extract, weights_of
from helpers.lora.merging import merge, remove, scaled, unmerge

__all__ = [
    "KINDS",
    "LoRAConv2d",
    "LoRALayer",
    "LoRALinear",
    "LoRAWeights",
    "attach",
    "best_of_rank",
    "by_pattern",
    "check_settings",
    "compose",
    "delta_weight",
    "extract",
    "find_targets",
    "freeze_all_but_lora",
    "inject",
    "low_rank_update",
    "lora_layers",
    "lora_parameters",
    "lora_state_dict",
    "matches",
    "merge",
    "remove",
    "replace_module",
    "scaled",
    "scaling_of",
    "selects",
    "unmerge",
    "weights_of",
    "wrap",
]

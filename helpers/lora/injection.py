"""Putting LoRA layers into a model: which modules, and what of it trains."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from helpers.lora.layer import KINDS, LoRALayer, check_settings


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression matches a whole name. Raises ValueError for one that does not compile."""
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error


def selects(targets: str | Sequence[str], name: str) -> bool:
    """Whether targets select the module of this name.

    A list holds names or ends of names: "to_q" is every module called to_q. A string is one regular expression,
    which has to match a whole name. Both as PEFT's `target_modules`.
    """
    if isinstance(targets, str):
        return matches(targets, name)
    return any(name == target or name.endswith("." + target) for target in targets)


def find_targets(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of the modules that targets select (see `selects`), in the model's order.

    Raises ValueError for a target that matches nothing, or matches a module that LoRA is not made for here:
    neither Linear nor Conv2d, or a convolution in groups.
    """
    asked = {targets: targets} if isinstance(targets, str) else {target: [target] for target in targets}
    found = [(name, module) for name, module in model.named_modules() if selects(targets, name)]
    if not asked:
        raise ValueError("targets is a list of at least one name, or a regular expression")
    for target, one in asked.items():
        if not any(selects(one, name) for name, _ in found):
            hint = f" (one string is a pattern for whole names; [{target!r}] is for ends)" if one is target else ""
            raise ValueError(f"target {target!r} matches no module of the {type(model).__name__}{hint}")
    for name, module in found:
        if not isinstance(module, tuple(KINDS)) or getattr(module, "groups", 1) != 1:
            raise ValueError(f"the targets select {name!r}: {type(module).__name__} is no Linear or ungrouped Conv2d")
    return [name for name, _ in found]


def by_pattern(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """The value of the first pattern that is the name or an end of it (a regular expression), else the default."""
    for pattern, value in (patterns or {}).items():
        if matches(rf"(.*\.)?({pattern})", name):
            return value
    return default


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the model has the module of this dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def wrap(model: nn.Module, name: str, rank: int, alpha: float, *, kinds: Mapping = KINDS, **settings) -> LoRALayer:
    """Replace the named Linear or Conv2d by its LoRA layer, and return that layer. settings: as for `LoRALayer`."""
    base = model.get_submodule(name)
    kind = next(layer for module, layer in kinds.items() if isinstance(base, module))
    layer = kind(base, rank, alpha, **settings)
    replace_module(model, name, layer)
    return layer


def inject(
    model: nn.Module,
    targets: str | Sequence[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    use_rslora: bool = False,
    init: str = "kaiming",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    kinds: Mapping = KINDS,
) -> list[str]:
    """Freeze the model, wrap every module that a target names, and return the names of the wrapped modules.

    Targets are names, ends of names or one regular expression (see `selects`). rank_pattern and alpha_pattern give
    some of the modules another rank or alpha: {"attn2.to_q": 4}. All as in PEFT. kinds: `dora.KINDS` for DoRA.
    Draws A from the global generator, layer after layer. Raises ValueError, and changes nothing, if the model already
    has LoRA layers, if a target matches nothing (it is named), or if a module's kind or a setting does not fit.
    """
    if lora_layers(model):
        raise ValueError("the model already has LoRA layers; remove(model) takes them out")
    names = find_targets(model, targets)
    for pattern in [*(rank_pattern or {}), *(alpha_pattern or {})]:
        if not any(by_pattern({pattern: 1}, name, 0) for name in names):
            raise ValueError(f"the pattern {pattern!r} matches none of the targets")
    ranks = {name: by_pattern(rank_pattern, name, rank) for name in names}
    alphas = {name: by_pattern(alpha_pattern, name, alpha) for name in names}
    settings = {"dropout": dropout, "use_rslora": use_rslora, "init": init}
    for name in names:
        check_settings(ranks[name], alphas[name], dropout, init)  # type: ignore[arg-type]  # ranks are whole numbers
    for name in names:
        wrap(model, name, ranks[name], alphas[name], kinds=kinds, **settings)  # type: ignore[arg-type]
    freeze_all_but_lora(model)
    return names


def freeze_all_but_lora(model: nn.Module) -> None:
    """Let gradients reach A and B of each layer (and DoRA's magnitude), and nothing else."""
    model.requires_grad_(False)
    for parameter in lora_parameters(model):
        parameter.requires_grad_(True)


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The model's LoRA layers by the name of the module each one wraps, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer should train: A and B of each layer (and DoRA's magnitude), in the model's order."""
    return [p for layer in lora_layers(model).values() for p in layer.parameters_by_name().values()]


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors, "<module>.lora_A.weight" and "<module>.lora_B.weight"; they share the model's memory."""
    return {
        f"{name}.{part}": parameter.detach()
        for name, layer in lora_layers(model).items()
        for part, parameter in layer.parameters_by_name().items()
    }

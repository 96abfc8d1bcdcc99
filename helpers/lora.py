"""LoRA by hand: a frozen layer beside a trainable product of two thin matrices.

    y = base(x) + B(A(dropout(x))) * scaling,    scaling = alpha / rank    (rsLoRA: alpha / sqrt(rank))

A maps to `rank` numbers, B maps back; B starts at zero, so an injected model computes what it computed before.
A and B are float32 whatever the base's dtype. The initialisation draws from PyTorch's global generator in the
same order as the PEFT library, so that both start from the same bits under the same seed. Needs PyTorch alone.

- Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685, section 4.1
- Kalajdzievski 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, arXiv 2312.03732
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def check_settings(rank: int, alpha: float, dropout: float, init: str) -> None:
    """Raise ValueError for a rank that is no whole number from 1 on, an alpha, dropout or init that makes no sense."""
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be at least 1 and whole, not {rank!r}")
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, not {alpha!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), not {dropout}")
    if init not in ("kaiming", "gaussian"):
        raise ValueError(f"init is 'kaiming' or 'gaussian', not {init!r}")


def scaling_of(rank: int, alpha: float, use_rslora: bool = False) -> float:
    """The factor in front of B A."""
    # alpha / r (Hu et al.); alpha / sqrt(r) keeps gradients alive at high rank (Kalajdzievski)
    return alpha / (math.sqrt(rank) if use_rslora else rank)


class LoRALayer(nn.Module):
    """What LoRALinear and LoRAConv2d share.

    init: how A starts, "kaiming" (as nn.Linear does) or "gaussian" (standard deviation 1 / rank); B starts at zero.
    Raises ValueError for a rank below 1, a dropout outside [0, 1) or an unknown init.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, dropout=0.0, use_rslora=False, init="kaiming"):
        super().__init__()
        check_settings(rank, alpha, dropout, init)
        self.rank, self.alpha, self.use_rslora = rank, alpha, use_rslora
        self.scaling = scaling_of(rank, alpha, use_rslora)
        self.base = base.requires_grad_(False)
        self.lora_dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.lora_A, self.lora_B = self.build(base, rank)  # type: ignore[operator]  # each kind of layer has its own
        # A is random; B = 0, so that B(A(x)) = 0 before the first step
        if init == "gaussian":
            nn.init.normal_(self.lora_A.weight, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        self.register_buffer("original_weight", None, persistent=False)  # kept here while merged
        self.to(base.weight.device).train(base.training)  # type: ignore[arg-type]  # a base has a weight

    def forward(self, x: Tensor) -> Tensor:
        """base(x) plus the adapter's part, in the shape and dtype of base(x)."""
        result = self.base(x)
        if self.original_weight is not None:  # merged: the adapter is in the base's weight
            return result
        # y = W x + B A dropout(x) * scaling, the second term and the sum in A's dtype, float32
        update = self.lora_B(self.lora_A(self.lora_dropout(x.to(self.lora_A.weight.dtype))))
        return (result + update * self.scaling).to(result.dtype)

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """What trains, by its name in an adapter file."""
        return {"lora_A.weight": self.lora_A.weight, "lora_B.weight": self.lora_B.weight}

    def merged_weight(self) -> Tensor:
        """The one weight that does what base and adapter do together, float32."""
        return self.base.weight.float() + delta_weight(self)  # type: ignore[operator]

    @property
    def weight(self) -> Tensor:
        """The base's weight, for model code that asks a layer for its weight's dtype or device."""
        return self.base.weight  # type: ignore[return-value]


class LoRALinear(LoRALayer):
    """A frozen nn.Linear [..., in] -> [..., out] with an adapter of the given rank.

    A is [rank, in], B is [out, rank]: rank * (in + out) trainable numbers beside in * out frozen ones.
    """

    @staticmethod
    def build(base: nn.Linear, rank: int) -> tuple[nn.Linear, nn.Linear]:
        """A and B, on the CPU and float32, A drawn first."""
        lora_A = nn.Linear(base.in_features, rank, bias=False, device="cpu", dtype=torch.float32)
        lora_B = nn.Linear(rank, base.out_features, bias=False, device="cpu", dtype=torch.float32)
        return lora_A, lora_B


class LoRAConv2d(LoRALayer):
    """A frozen nn.Conv2d [B, in, h, w] -> [B, out, h', w'] with an adapter of the given rank.

    A is a convolution like the base's, but to `rank` channels; B is a 1x1 convolution back to `out` channels.
    Grouped convolutions raise ValueError: Stable Diffusion has none.
    """

    @staticmethod
    def build(base: nn.Conv2d, rank: int) -> tuple[nn.Conv2d, nn.Conv2d]:
        """A and B, on the CPU and float32, A drawn first."""
        if base.groups != 1:
            raise ValueError(f"LoRA on a convolution with {base.groups} groups is not supported")
        where = {"bias": False, "device": "cpu", "dtype": torch.float32}
        geometry = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation}
        lora_A = nn.Conv2d(
            base.in_channels, rank, base.kernel_size,  # type: ignore[arg-type]
            padding_mode=base.padding_mode, **geometry, **where  # type: ignore[arg-type]
        )
        lora_B = nn.Conv2d(rank, base.out_channels, 1, **where)  # type: ignore[arg-type]
        return lora_A, lora_B


KINDS = {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d}  # which layer wraps which module


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


def load_lora_state_dict(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Copy the tensors of `lora_state_dict` into the model's LoRA layers.

    Raises ValueError, and copies nothing, for a missing key, an unexpected key or a wrong shape; it names the key.
    """
    own = lora_state_dict(model)
    for key, value in own.items():
        if key not in state_dict:
            raise ValueError(f"missing key {key!r}")
        if state_dict[key].shape != value.shape:
            raise ValueError(f"{key!r} has shape {list(state_dict[key].shape)}, the model needs {list(value.shape)}")
    for key in state_dict:
        if key not in own:
            raise ValueError(f"unexpected key {key!r}")
    for key, value in own.items():
        value.copy_(state_dict[key])


@contextmanager
def scaled(model: nn.Module, s: float) -> Iterator[None]:
    """Within the block the adapter counts s times: 0 is the base model, 1 as trained, negative the other way.

    Only the adapter's part is multiplied: DoRA's magnitude stays as it was trained, so 0 is not quite its base model.
    Blocks may be nested. Raises ValueError for a model without LoRA layers
    or with merged ones.
    """
    layers = list(lora_layers(model).values())
    if not layers or any(layer.original_weight is not None for layer in layers):
        raise ValueError("scaled needs a model with LoRA layers that are not merged")
    before = [layer.scaling for layer in layers]
    try:
        for layer in layers:
            layer.scaling = layer.scaling * s
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = scaling


def delta_weight(layer: LoRALayer) -> Tensor:
    """The change of the base's weight that the adapter amounts to, float32, in the weight's shape."""
    # Delta W = B A * scaling, with each kernel of A flattened to one row
    product = layer.lora_B.weight.float().flatten(1) @ layer.lora_A.weight.float().flatten(1)
    return product.view(layer.base.weight.shape) * layer.scaling


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add each adapter to its base's weight, so that a forward pass costs no more than the base's.

    The result is rounded to the weight's dtype. The original weight is kept for `unmerge`. Merged layers are skipped.
    """
    for layer in lora_layers(model).values():
        if layer.original_weight is None:
            weight = layer.base.weight
            # W' = W + Delta W, computed in float32
            merged = layer.merged_weight().to(weight.dtype)
            layer.original_weight, weight.data = weight.data, merged


def unmerge(model: nn.Module) -> None:
    """Put back the weights from before `merge`, bit for bit."""
    for layer in lora_layers(model).values():
        if layer.original_weight is not None:
            layer.base.weight.data, layer.original_weight = layer.original_weight, None  # type: ignore[assignment]


def remove(model: nn.Module) -> None:
    """Take the adapter out: the very same modules come back, with their original weights. They stay frozen."""
    unmerge(model)
    for name, layer in lora_layers(model).items():
        replace_module(model, name, layer.base)

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

    def __init__(
        self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, dropout=0.0, use_rslora=False, init="kaiming"
    ):
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
        self.to(base.weight.device).train(base.training)

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
        return self.base.weight.float() + delta_weight(self)

    @property
    def weight(self) -> Tensor:
        """The base's weight, for model code that asks a layer for its weight's dtype or device."""
        return self.base.weight


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
        )  # fmt: skip
        lora_B = nn.Conv2d(rank, base.out_channels, 1, **where)  # type: ignore[arg-type]
        return lora_A, lora_B


KINDS = {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d}  # which layer wraps which module


def low_rank_update(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """B A times its factor, float32 [out, in, ...], from A [rank, in, ...] and B [out, rank, ...]."""
    # Delta W = B A * scaling, with each kernel of A flattened to one row
    product = B.float().flatten(1) @ A.float().flatten(1)
    return product.view(len(B), *A.shape[1:]) * scaling


def delta_weight(layer: LoRALayer) -> Tensor:
    """The change of the base's weight that the adapter amounts to, float32, in the weight's shape."""
    return low_rank_update(layer.lora_A.weight, layer.lora_B.weight, layer.scaling)

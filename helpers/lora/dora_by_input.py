"""DoRA with a length for each input instead of each output, as OneTrainer and older LyCORIS train it.

    W' = m * V / ||V||,    V = W + B A * scaling,    ||V||: the norm of each input's column

The course trains DoRA by output, as the paper and PEFT do; this is for files that people bring. Such a file says which
it is by the shape of its `dora_scale`: [out, 1] by output, [1, in] by input.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from helpers.lora.dora import DoRAConv2d, DoRALayer, DoRALinear, row_norms


def column_norms(weight: Tensor) -> Tensor:
    """The norm of each input's column, above 0: [out, in] -> [in], and [out, in, k, k] -> [1, in, 1, 1]."""
    return row_norms(weight.transpose(0, 1))


class DoRAByInput(DoRALayer):
    """What the two layers below change of DoRA: the magnitude has the shape of `column_norms`."""

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, dropout: float = 0.0, **settings) -> None:
        super().__init__(base, rank, alpha, dropout, **settings)
        self.magnitude = nn.Parameter(column_norms(base.weight.detach().float()))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with W' in place of W, in the shape and dtype of base(x)."""
        if self.original_weight is not None:  # merged: the adapter is in the base's weight
            return self.base(x)
        with torch.no_grad():
            norms = column_norms(self.direction())
        # V diag(m / ||V||) x: what scales a column of V may scale the input instead
        scaled = x.to(self.lora_A.weight.dtype) * (self.magnitude / norms)
        result = self.base(scaled.to(x.dtype))
        return (result + self.lora_B(self.lora_A(scaled)) * self.scaling).to(result.dtype)

    def merged_weight(self) -> Tensor:
        """m * V / ||V||, float32 in the weight's shape."""
        V = self.direction()
        ratio = self.magnitude / column_norms(V)
        return V * ratio.view(1, -1, *[1] * (V.ndim - 2))


class DoRALinearByInput(DoRAByInput, DoRALinear):
    """A frozen nn.Linear [..., in] -> [..., out] with a DoRA adapter by input."""


class DoRAConv2dByInput(DoRAByInput, DoRAConv2d):
    """A frozen nn.Conv2d [B, in, h, w] -> [B, out, h', w'] with a DoRA adapter by input."""


KINDS = {nn.Linear: DoRALinearByInput, nn.Conv2d: DoRAConv2dByInput}

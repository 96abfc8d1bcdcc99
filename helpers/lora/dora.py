"""DoRA: LoRA for a weight's direction, and one more trained number a row for its length.

    W' = m * V / ||V||,    V = W + B A * scaling,    ||V||: the norm of each output's row (or kernel)

The magnitude m starts as ||W||, so an injected model computes what it computed before. Gradients take the norm as a
constant, which saves memory. To use it: `lora.inject(model, targets, rank, alpha, kinds=dora.KINDS)`.

- Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353, equation 5 and section 4.3
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from helpers.lora.layer import LoRAConv2d, LoRALayer, LoRALinear


def row_norms(weight: Tensor) -> Tensor:
    """The norm of each output's row, above 0: [out, in] -> [out], and [out, in, k, k] -> [1, out, 1, 1]."""
    norms = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)))
    norms = norms.clamp_min(torch.finfo(norms.dtype).tiny)  # a row of zeros has a direction too: 0 / tiny
    return norms if weight.ndim == 2 else norms.view(1, -1, 1, 1)


class DoRALayer(LoRALayer):
    """What DoRALinear and DoRAConv2d add to LoRA: the magnitude, float32, in the shape of `row_norms`.

    `scaled` scales B A and leaves the magnitude as it was trained. Raises ValueError for dropout, which is left out.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float, dropout: float = 0.0, **settings) -> None:
        if dropout:
            raise ValueError(f"DoRA is written without dropout here: dropout must be 0, not {dropout}")
        super().__init__(base, rank, alpha, **settings)
        # m = ||W||
        self.magnitude = nn.Parameter(row_norms(base.weight.detach().float()))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with W' in place of W, in the shape and dtype of base(x)."""
        result = self.base(x)
        if self.original_weight is not None:  # merged: the adapter is in the base's weight
            return result
        update = self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype)))
        # m / ||V||, the norm a constant to the gradient (section 4.3)
        with torch.no_grad():
            norms = row_norms(self.direction())
        ratio = self.magnitude / norms
        # y = W x + bias + (m / ||V|| - 1) W x + m / ||V|| * B A x * scaling
        change = (ratio - 1) * (result - self.bias_of_output()) + ratio * update * self.scaling
        return (result + change).to(result.dtype)

    def bias_of_output(self) -> Tensor | float:
        """The base's bias in a shape that can be taken from its output; 0 where it has none."""
        bias = self.base.bias
        return 0.0 if bias is None else bias.view(self.magnitude.shape)

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """What trains, by its name in an adapter file."""
        return super().parameters_by_name() | {"lora_magnitude_vector": self.magnitude}

    def direction(self) -> Tensor:
        """V = W + B A * scaling, float32 in the weight's shape."""
        return super().merged_weight()

    def merged_weight(self) -> Tensor:
        """m * V / ||V||, float32 in the weight's shape."""
        V = self.direction()
        ratio = self.magnitude / row_norms(V)
        return V * ratio.view(-1, *[1] * (V.ndim - 1))


class DoRALinear(DoRALayer, LoRALinear):
    """A frozen nn.Linear [..., in] -> [..., out] with a DoRA adapter."""

    def direction(self) -> Tensor:
        """V as above; B A is what comes out for the identity, as PEFT computes it: the same sums, so the same bits."""
        A = self.lora_A.weight
        identity = torch.eye(A.shape[1], device=A.device, dtype=A.dtype)
        return self.base.weight.float() + self.scaling * self.lora_B(self.lora_A(identity)).T


class DoRAConv2d(DoRALayer, LoRAConv2d):
    """A frozen nn.Conv2d [B, in, h, w] -> [B, out, h', w'] with a DoRA adapter."""


KINDS = {nn.Linear: DoRALinear, nn.Conv2d: DoRAConv2d}

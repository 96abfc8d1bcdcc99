"""An adapter as a value: low-rank updates apart from any model, and what can be computed with them.

An adapter is a dict {layer name: LoRAWeights}. It is taken from a model (`weights_of`), put into one (`attach`), summed
with others (`compose`), or cut out of the difference of two models (`extract`). None of it needs a file or a library
beyond PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from helpers import lora
from helpers.lora import dora, dora_by_input
from helpers.lora.layer import LoRALayer


@dataclass(frozen=True)
class LoRAWeights:
    """One layer's low-rank update: A [rank, in, ...] and B [out, rank, ...], float32; B A counts `scaling` times.

    magnitude: DoRA's, [out] or [1, out, 1, 1], or None for plain LoRA. by_input: it is one of `dora_by_input`, [in] or
    [1, in, 1, 1].
    """

    A: Tensor
    B: Tensor
    alpha: float
    use_rslora: bool = False
    magnitude: Tensor | None = None
    by_input: bool = False

    @property
    def rank(self) -> int:
        """The inner size of B A."""
        return self.A.shape[0]

    @property
    def scaling(self) -> float:
        """The factor in front of B A."""
        return lora.scaling_of(self.rank, self.alpha, self.use_rslora)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in an adapter file."""
        named = {"lora_A.weight": self.A, "lora_B.weight": self.B, "lora_magnitude_vector": self.magnitude}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def delta(self) -> Tensor:
        """The update itself, [out, in, ...]: what is added to the weight. (A DoRA magnitude is left out.)"""
        return lora.low_rank_update(self.A, self.B, self.scaling)

    def norm(self) -> float:
        """The Frobenius norm of the update B A * scaling, without building it. (A DoRA magnitude is left out.)"""
        # ||B A||^2 = tr(A^T B^T B A) = tr((B^T B) (A A^T)): two matrices of rank x rank
        A, B = (matrix.flatten(1).cpu().double() for matrix in (self.A, self.B))
        return abs(self.scaling) * math.sqrt(max(torch.sum((B.T @ B) * (A @ A.T)).item(), 0.0))


def weights_of(model: nn.Module) -> dict[str, LoRAWeights]:
    """A copy of the adapter in a model, on the CPU: as trained, whatever `scaled` or `merge` are doing to it."""
    found = {}
    for name, layer in lora.lora_layers(model).items():
        tensors = {part: p.detach().float().cpu().clone() for part, p in layer.parameters_by_name().items()}
        A, B = tensors["lora_A.weight"], tensors["lora_B.weight"]
        by_input = isinstance(layer, dora_by_input.DoRAByInput)
        found[name] = LoRAWeights(A, B, layer.alpha, layer.use_rslora, tensors.get("lora_magnitude_vector"), by_input)
    return found


def attach(model: nn.Module, adapter: Mapping[str, LoRAWeights], dropout: float = 0.0) -> None:
    """Freeze the model and put the adapter into it, trainable. DoRA layers get no dropout.

    Raises ValueError, and changes nothing, for a model that has LoRA layers already, and for a layer that the model
    does not have or whose shape is another.
    """
    if lora.lora_layers(model):
        raise ValueError("the model already has LoRA layers; remove(model) takes them out")
    modules = dict(model.named_modules())
    for name, weights in adapter.items():
        check_fit(weights, modules.get(name), {part: f"{name}.{part}" for part in weights.tensors()})
    with torch.random.fork_rng(devices=[]):  # wrapping draws an initial A that is overwritten
        for name, weights in adapter.items():
            layer = wrap_like(model, name, weights, dropout)
            for part, parameter in layer.parameters_by_name().items():
                parameter.data.copy_(weights.tensors()[part])
    lora.freeze_all_but_lora(model)


def wrap_like(model: nn.Module, name: str, weights: LoRAWeights, dropout: float) -> LoRALayer:
    """Wrap one module in a layer of the adapter's rank, alpha and kind."""
    rank, alpha, use_rslora = weights.rank, weights.alpha, weights.use_rslora
    if weights.magnitude is not None:
        kinds = dora_by_input.KINDS if weights.by_input else dora.KINDS
        return lora.wrap(model, name, rank, alpha, kinds=kinds, use_rslora=use_rslora)
    return lora.wrap(model, name, rank, alpha, dropout=dropout, use_rslora=use_rslora)


def shapes_for(weight: Tensor, rank: int, by_input: bool = False) -> dict[str, list[int]]:
    """The shapes, by name, that an adapter's tensors have beside a weight [out, in] or [out, in, k, k]."""
    ones = [1] * (weight.ndim - 2)
    size = weight.shape[1 if by_input else 0]
    magnitude = [size] if not ones else [1, size, *ones]
    return {
        "lora_A.weight": [rank, *weight.shape[1:]],
        "lora_B.weight": [weight.shape[0], rank, *ones],
        "lora_magnitude_vector": magnitude,
    }


def check_fit(weights: LoRAWeights, module: nn.Module | None, keys: Mapping[str, str]) -> None:
    """Raise ValueError, naming one of the keys, unless LoRA can adapt the module and the weights have its shapes."""
    if not isinstance(module, nn.Linear | nn.Conv2d) or getattr(module, "groups", 1) != 1:
        raise ValueError(f"unexpected key {keys['lora_A.weight']!r}; the model has no such linear or convolution layer")
    shapes = shapes_for(module.weight, weights.rank, weights.by_input)
    for part, tensor in weights.tensors().items():
        if list(tensor.shape) != shapes[part]:
            raise ValueError(f"{keys[part]!r} has shape {list(tensor.shape)}, this model needs {shapes[part]}")


def compose(adapters: Sequence[tuple[Mapping[str, LoRAWeights], float]]) -> dict[str, LoRAWeights]:
    """The weighted sum of several adapters as one adapter, exact: their ranks add up.

    Raises ValueError for DoRA, whose magnitudes do not add, and for adapters of differently shaped layers.
    """
    composed = {}
    for name in dict.fromkeys(name for adapter, _ in adapters for name in adapter):
        parts = [(adapter[name], weight) for adapter, weight in adapters if name in adapter]
        if any(part.magnitude is not None for part, _ in parts):
            raise ValueError(f"{name!r} is a DoRA layer: its magnitude can be neither weighted nor added")
        if len({(part.A.shape[1:], part.B.shape[:1]) for part, _ in parts}) > 1:
            raise ValueError(f"{name!r} has another shape in each adapter: they are for different base models")
        # [s1 f1 B1, s2 f2 B2] [A1; A2] = s1 f1 B1 A1 + s2 f2 B2 A2, with f = alpha / r
        A = torch.cat([part.A for part, _ in parts])
        B = torch.cat([part.B * (part.scaling * weight) for part, weight in parts], dim=1)
        composed[name] = LoRAWeights(A, B, alpha=len(A))
    return composed


@torch.no_grad()
def extract(
    base: nn.Module, tuned: nn.Module, rank: int, targets: str | Sequence[str]
) -> tuple[dict[str, LoRAWeights], dict[str, float]]:
    """The best adapter of a rank for the difference of two models, and what each layer's leaves out.

    The second value is ||Delta W - B A||_F / ||Delta W||_F of each layer, 0 … 1 (0 where the models agree). Layers
    narrower than the rank get less. Eckart and Young 1936: cutting the singular values off is the best there is.
    Raises ValueError for a rank below 1, for targets that select nothing, and for models of different structure.
    """
    adapter, errors, before, after = {}, {}, dict(base.named_parameters()), dict(tuned.named_parameters())
    for name in lora.find_targets(base, targets):
        old, new = before[f"{name}.weight"], after.get(f"{name}.weight")
        if new is None or new.shape != old.shape:
            raise ValueError(f"the models differ in structure: {name!r} is not the same layer in both")
        adapter[name], errors[name] = best_of_rank(new.float() - old.float(), rank)
    return adapter, errors


def best_of_rank(delta: Tensor, rank: int) -> tuple[LoRAWeights, float]:
    """The closest B A to an update [out, in, ...], on the CPU, and the relative error it leaves."""
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    U, sigma, Vh = torch.linalg.svd(delta.flatten(1).cpu().double(), full_matrices=False)
    r = min(rank, len(sigma))
    # B = U sqrt(Sigma), A = sqrt(Sigma) V^T: the two factors share the size of the update
    root = sigma[:r].sqrt()
    A = (root[:, None] * Vh[:r]).float().reshape(r, *delta.shape[1:])
    B = (U[:, :r] * root).float().reshape(len(delta), r, *[1] * (delta.ndim - 2))
    # the squared error is the sum of the squared singular values that were cut off
    error = (sigma[r:].square().sum() / sigma.square().sum().clamp_min(1e-300)).sqrt().item()
    return LoRAWeights(A.contiguous(), B.contiguous(), alpha=r), error

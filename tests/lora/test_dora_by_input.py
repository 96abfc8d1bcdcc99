"""DoRA by input, on each kind of layer, against the formula written out column by column."""

import pytest
import torch
from torch import nn

from helpers import lora
from helpers.lora import dora_by_input
from helpers.lora.lowrank import attach, weights_of

LAYERS = {
    "linear": lambda: nn.Linear(5, 7),
    "linear without bias": lambda: nn.Linear(5, 7, bias=False),
    "convolution": lambda: nn.Conv2d(5, 7, 3, padding=1, stride=2),
    "1x1 convolution": lambda: nn.Conv2d(5, 7, 1),
}


def model_of(kind):
    torch.manual_seed(0)
    return nn.ModuleDict({"layer": LAYERS[kind]()})


def filled(kind):
    """A model whose adapter says something, and an input for its layer."""
    model = model_of(kind)
    base = model["layer"]
    lora.inject(model, ["layer"], 3, 6.0, kinds=dora_by_input.KINDS)
    layer = model["layer"]
    x = torch.randn(2, 5) if isinstance(base, nn.Linear) else torch.randn(2, 5, 9, 9)
    assert torch.allclose(layer(x), base(x), atol=1e-6), "an injected model computes what it computed before"
    layer.lora_B.weight.data.normal_(0, 0.3)
    layer.magnitude.data *= 1 + 0.3 * torch.rand(layer.magnitude.shape)
    return model, x


def explicit_weight(layer):
    """m V / ||V|| written out, in float64; both factors of B A are matrices here."""
    A, B = layer.lora_A.weight.detach().double().flatten(1), layer.lora_B.weight.detach().double().flatten(1)
    W = layer.base.weight.detach().double()
    V = W + (B @ A).view(W.shape) * 2.0  # alpha / rank
    for column in range(W.shape[1]):
        V[:, column] *= layer.magnitude.detach().double().flatten()[column] / V[:, column].norm()
    return V.float()


@pytest.mark.parametrize("kind", LAYERS)
def test_the_output_is_that_of_the_formula(kind):
    model, x = filled(kind)
    layer = model["layer"]
    with torch.no_grad():
        ours, merged = layer(x), layer.merged_weight()
        assert torch.allclose(merged, explicit_weight(layer), atol=1e-6)
        layer.base.weight.copy_(explicit_weight(layer))
        assert torch.allclose(ours, layer.base(x), atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_merging_changes_nothing_and_can_be_undone(kind):
    model, x = filled(kind)
    before, weight = model["layer"](x), model["layer"].base.weight.clone()
    lora.merge(model)
    assert torch.allclose(model["layer"](x), before, atol=1e-5)
    lora.unmerge(model)
    assert torch.equal(model["layer"].base.weight, weight)


@pytest.mark.parametrize("kind", LAYERS)
def test_it_goes_into_another_model(kind):
    model, x = filled(kind)
    other = model_of(kind)
    adapter = weights_of(model)
    assert adapter["layer"].by_input
    attach(other, adapter)
    assert torch.equal(other["layer"](x), model["layer"](x))
    assert {id(p) for p in other.parameters() if p.requires_grad} == {id(p) for p in lora.lora_parameters(other)}

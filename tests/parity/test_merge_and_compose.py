"""Merging, removing and adding up adapters, against arithmetic on the weights."""

from copy import deepcopy

import pytest
import torch
from parity_tools import (
    ALPHA,
    STRUCTURES,
    TARGETS,
    TINY,
    assert_matters,
    difference,
    fill,
    fill_size,
    output,
    pair,
    unet_of,
)
from peft import set_peft_model_state_dict

from helpers import lora
from helpers.lora import lowrank


def adapted(structure, seed=0, rank=4):
    """A U-Net with a filled adapter that depends on the seed."""
    unet = unet_of(structure)
    torch.manual_seed(seed)
    lora.inject(unet, TARGETS, rank, ALPHA)
    fill(unet, fill_size(structure))
    return unet


def base_weights(model):
    return {name: layer.base.weight.detach().clone() for name, layer in lora.lora_layers(model).items()}


def filled_pair(structure):
    """The same filled adapter in our model and in PEFT's."""
    ours, theirs = pair(lambda: unet_of(structure))
    fill(ours)
    assert not set_peft_model_state_dict(theirs, lora.lora_state_dict(ours)).unexpected_keys
    return ours, theirs


@pytest.mark.parametrize("structure", STRUCTURES)
def test_merge_and_unmerge(parity, structure):
    unet = adapted(structure)
    assert_matters(output(unet), output(unet_of(structure)))
    before, weights = output(unet), base_weights(unet)
    lora.merge(unet)
    assert_matters(base_weights(unet), weights, 1e-4)
    parity("the merged output equals the unmerged one", difference(output(unet), before), 1e-5, model=structure)
    lora.unmerge(unet)
    what = "unmerge brings every weight and the output back"
    parity(what, difference(base_weights(unet), weights), model=structure)
    parity(what, difference(output(unet), before), model=structure)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_remove(parity, structure):
    base, unet = unet_of(structure), adapted(structure)
    lora.merge(unet)
    lora.remove(unet)
    what = "remove leaves the base's weights and output, even after merge"
    parity(what, difference(unet.state_dict(), base.state_dict()), model=structure)
    parity(what, difference(output(unet), output(base)), model=structure)


@pytest.mark.parametrize("structure", TINY)
def test_merge_as_peft_does(parity, structure):
    ours, theirs = filled_pair(structure)
    own = {name: lora.delta_weight(layer).detach() for name, layer in lora.lora_layers(ours).items()}
    peft = {name: theirs.get_submodule(name).get_delta_weight("default").detach() for name in own}
    parity("B A times its factor equals PEFT's get_delta_weight", difference(own, peft), 1e-6, model=structure)
    lora.merge(ours)
    theirs.fuse_lora()
    parity("the merged output equals PEFT's", difference(output(ours), output(theirs)), 1e-5, model=structure)


def sum_by_hand(structure, parts):
    """The base model with W + sum of weight * B A * alpha / r, built from the tensors alone."""
    unet = unet_of(structure)
    for adapter, weight in parts:
        for name, layer in lora.lora_layers(adapter).items():
            A, B = layer.lora_A.weight.detach().double(), layer.lora_B.weight.detach().double()
            update = torch.einsum("or,r...->o...", B.flatten(1), A) * ALPHA / len(A)
            module = unet.get_submodule(name)
            module.weight.data.copy_(module.weight.double() + weight * update)
    return unet


@pytest.mark.parametrize("structure", STRUCTURES)
def test_compose(parity, structure):
    a, b = adapted(structure, 1), adapted(structure, 2, rank=3)
    lowranks = [(lowrank.weights_of(model), weight) for model, weight in ((a, 0.7), (b, -0.4))]
    unet = unet_of(structure)
    lowrank.attach(unet, lowrank.compose(lowranks))
    expected = sum_by_hand(structure, [(a, 0.7), (b, -0.4)])
    assert_matters(output(unet), output(a), 1e-3)
    what = "0.7 of one adapter (r 4) minus 0.4 of another (r 3), composed:"
    found = difference(output(unet), output(expected))
    parity(f"{what} output equals that of the summed weights", found, 1e-5, model=structure)
    merged = {name: layer.merged_weight().detach() for name, layer in lora.lora_layers(unet).items()}
    summed = {name: deepcopy(expected.get_submodule(name).weight).detach() for name in merged}
    parity(f"{what} weights equal the summed ones", difference(merged, summed), 1e-6, model=structure)

"""DoRA against PEFT.

PEFT multiplies B A for the norm in another way (B(A(identity))), so only the start is exact.
"""

from functools import partial

import pytest
import torch
from parity_tools import (
    TARGETS,
    TINY,
    assert_matters,
    difference,
    fill,
    gradients,
    kinds_of_layers,
    output,
    pair,
    train,
    unet_of,
)
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from helpers import lora
from helpers.lora import dora

SETTINGS = {"where": "DoRA", "r": 4, "alpha": 6}


def dora_pair(structure):
    return pair(partial(unet_of, structure), TARGETS, kinds=dora.KINDS)


def of_magnitudes(state):
    return {key: value for key, value in state.items() if "magnitude" in key}


def of_A_and_B(state):
    return {key: value for key, value in state.items() if "magnitude" not in key}


def peft_state(model):
    """PEFT's tensors under our names, in our order: A, B, magnitude."""
    state = get_peft_model_state_dict(model)
    layers = dict.fromkeys(key.rsplit(".lora_", 1)[0] for key in state)
    parts = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    return {f"{layer}.{part}": state[f"{layer}.{part}"] for layer in layers for part in parts}


def same_weights(structure):
    """A pair whose adapters hold the same numbers, away from the start."""
    ours, theirs = dora_pair(structure)
    fill(ours)
    result = set_peft_model_state_dict(theirs, lora.lora_state_dict(ours))
    assert not result.unexpected_keys
    assert_matters(output(ours), output(unet_of(structure)))
    return ours, theirs


@pytest.mark.parametrize("structure", TINY)
def test_start(parity, structure):
    ours, theirs = dora_pair(structure)
    own, peft = lora.lora_state_dict(ours), peft_state(theirs)
    fact = partial(parity, model=structure, **SETTINGS)
    what = f"initial magnitude of layers {kinds_of_layers(ours)} equals PEFT's"
    fact(what, difference(of_magnitudes(own), of_magnitudes(peft)))
    fact("initial A and B equal PEFT's", difference(of_A_and_B(own), of_A_and_B(peft)))


@pytest.mark.parametrize("structure", TINY)
def test_output_and_gradients(parity, structure):
    ours, theirs = same_weights(structure)
    fact = partial(parity, model=structure, **SETTINGS)
    fact("the output with equal weights", difference(output(ours), output(theirs)))
    own, peft = gradients(ours), gradients(theirs)
    own = {name.replace(".magnitude", ".lora_magnitude_vector.weight"): value for name, value in own.items()}
    assert sum("magnitude" in name for name in own) == len(lora.lora_layers(ours))
    fact("the gradients of A, B and the magnitude", difference(own, {name: peft[name] for name in own}))


@pytest.mark.parametrize("structure", TINY)
def test_twenty_steps_of_adamw(parity, structure):
    ours, theirs = dora_pair(structure)
    before = output(ours)
    own, peft = train(ours, 20), train(theirs, 20)
    fact = partial(parity, model=structure, **SETTINGS)
    fact("the losses of 20 AdamW steps", difference(own, peft))
    fact("A, B and magnitude after them", difference(lora.lora_state_dict(ours), peft_state(theirs)))
    assert_matters(output(ours), before)
    fact("the output after them", difference(output(ours), output(theirs)))


@pytest.mark.parametrize("structure", TINY)
def test_merge(parity, structure):
    ours, theirs = same_weights(structure)
    before, base = output(ours), {name: layer.base.weight.clone() for name, layer in lora.lora_layers(ours).items()}
    theirs.fuse_lora()
    lora.merge(ours)
    fact = partial(parity, model=structure, **SETTINGS)
    fact("the merged output equals the unmerged one", difference(output(ours), before), 1e-5)
    fact("the merged output equals PEFT's merged one", difference(output(ours), output(theirs)), 1e-5)
    lora.unmerge(ours)
    restored = {name: layer.base.weight for name, layer in lora.lora_layers(ours).items()}
    fact("unmerge brings every weight back", difference(restored, base))
    assert torch.equal(output(ours), before)

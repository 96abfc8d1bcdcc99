"""LoRA against PEFT.

Both sides start from the same base weights and the same seed, and every comparison is exact.
"""

from functools import partial

import pytest
import torch
from parity_tools import (
    ALPHA,
    TARGETS,
    TEXT_TARGETS,
    TINY,
    assert_matters,
    difference,
    gradients,
    kinds_of_layers,
    output,
    pair,
    peft_config,
    text_encoder_of,
    train,
    trainable,
    unet_of,
)
from peft import get_peft_model, get_peft_model_state_dict
from torch import nn

from helpers import lora

ATTENTION_REGEX = r"(down|up)_blocks.*\.attn[12]\.to_[qkv]"
# structure, rank, rsLoRA, dropout: every value on both structures
RUNS = [
    ("SD 1.5", 1, False, 0.3),
    ("SD 1.5", 4, True, 0.0),
    ("SD 1.5", 16, True, 0.3),
    ("SD 2.1", 1, True, 0.0),
    ("SD 2.1", 4, False, 0.3),
    ("SD 2.1", 16, False, 0.0),
]
PATTERNS = {
    "rank_pattern": {"attn2.to_q": 2, "conv_shortcut": 3},
    "alpha_pattern": {r"attn[12]\.to_v": 9},
}
VARIANTS = {
    "gaussian start": {"init": "gaussian"},
    "rank and alpha patterns": PATTERNS,
    "targets as a regular expression": {"targets": ATTENTION_REGEX},
}


def compare_start(fact, ours, theirs, what="initial A, B and factor before B A"):
    """What the two sides are before the first step."""
    own, peft = lora.lora_state_dict(ours), get_peft_model_state_dict(theirs)
    assert max(value.abs().max() for key, value in own.items() if "lora_A" in key) > 0
    fact(f"{what} equal PEFT's", difference(own, peft))
    own = {name: torch.tensor(layer.scaling) for name, layer in lora.lora_layers(ours).items()}
    peft = {name: torch.tensor(theirs.get_submodule(name).scaling["default"]) for name in own}
    fact(f"{what} equal PEFT's", difference(own, peft))
    assert list(trainable(ours)) == list(trainable(theirs))


def compare_training(fact, ours, theirs, steps):
    """What training, then a gradient and a forward pass make of them."""
    before, start = output(ours), {key: value.clone() for key, value in lora.lora_state_dict(ours).items()}
    what = f"losses, A and B over {steps} AdamW steps with clipped gradients"
    fact(what, difference(train(ours, steps), train(theirs, steps)))
    own, peft = lora.lora_state_dict(ours), get_peft_model_state_dict(theirs)
    assert min((own[key] - start[key]).abs().max() for key in own) > 0, "every A and B must have moved"
    fact(what, difference(own, peft))
    own, peft = gradients(ours), gradients(theirs)
    assert min(value.abs().max() for value in own.values()) > 0
    fact("the gradients of A and B afterwards", difference(own, peft))
    assert_matters(output(ours), before)
    fact("the output afterwards", difference(output(ours), output(theirs)))


def in_words(rank, rslora, dropout):
    """The properties of a case, for the printed line."""
    return {"r": rank, "alpha": f"{ALPHA:g}", "rsLoRA": "on" if rslora else "off", "dropout": f"{dropout:g}"}


@pytest.mark.parametrize("structure, rank, rslora, dropout", RUNS)
def test_start_training_gradients_and_output(parity, structure, rank, rslora, dropout):
    ours, theirs = pair(partial(unet_of, structure), rank=rank, use_rslora=rslora, dropout=dropout)
    fact = partial(parity, model=structure, **in_words(rank, rslora, dropout))
    compare_start(fact, ours, theirs, f"initial A, B and factor of layers {kinds_of_layers(ours)}")
    compare_training(fact, ours, theirs, steps=20)


def test_minisd(parity):
    ours, theirs = pair(partial(unet_of, "MiniSD"))
    fact = partial(parity, where="MiniSD", **in_words(4, False, 0.0))
    compare_start(fact, ours, theirs, f"initial A, B and factor of layers {kinds_of_layers(ours)}")
    compare_training(fact, ours, theirs, steps=20)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("structure", TINY)
def test_other_settings(parity, structure, variant):
    ours, theirs = pair(partial(unet_of, structure), **VARIANTS[variant])
    fact = partial(parity, model=structure, case=variant, where="other settings")
    compare_start(fact, ours, theirs)
    compare_training(fact, ours, theirs, steps=3)


@pytest.mark.parametrize("rslora", [False, True])
def test_text_encoder(parity, rslora):
    ours, theirs = pair(text_encoder_of, TEXT_TARGETS, use_rslora=rslora, dropout=0.3)
    fact = partial(parity, where="tiny CLIP text encoder", **in_words(4, rslora, 0.3))
    compare_start(fact, ours, theirs)
    compare_training(fact, ours, theirs, steps=20)


@pytest.mark.parametrize("structure", TINY)
def test_random_state_after_injection(parity, structure):
    states = []
    for add in (lambda u: lora.inject(u, TARGETS, 4, ALPHA), lambda u: u.add_adapter(peft_config(TARGETS))):
        torch.manual_seed(5)
        add(unet_of(structure))
        states.append(torch.get_rng_state())
    fresh = torch.manual_seed(5).get_state()
    assert_matters(states[0], fresh)
    parity("the random state after injection equals PEFT's", difference(*states), case=structure)


def test_get_peft_model_on_plain_layers(parity):
    def model():
        torch.manual_seed(0)
        convolutions = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(6, 4, 1)
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 5))

    ours, theirs, targets = model(), model(), ["0", "1", "3"]
    torch.manual_seed(5)
    lora.inject(ours, targets, 4, ALPHA)
    torch.manual_seed(5)
    theirs = get_peft_model(theirs, peft_config(targets))
    own = {f"base_model.model.{key}": value for key, value in lora.lora_state_dict(ours).items()}
    where = "two convolutions and a linear layer"
    parity("initial A and B equal get_peft_model's", difference(own, get_peft_model_state_dict(theirs)), where=where)
    x = torch.randn(2, 3, 8, 8)
    parity("the output equals that of get_peft_model", difference(ours(x), theirs(x)), where=where)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_adapter_under_a_half_base(parity, dtype):
    torch.manual_seed(0)
    base, other = nn.Linear(16, 24).to(dtype), nn.Linear(16, 24).to(dtype)
    other.load_state_dict(base.state_dict())
    ours = nn.ModuleDict({"layer": base})
    lora.inject(ours, ["layer"], 4, ALPHA)
    theirs = get_peft_model(nn.Sequential(other), peft_config(["0"]))
    layer = theirs.base_model.model[0]
    assert layer.lora_A["default"].weight.dtype == torch.float32
    # PEFT rounds its initial A to the base's dtype before it widens it again, so the weights are copied here
    layer.lora_A["default"].weight.data.copy_(ours["layer"].lora_A.weight)
    ours["layer"].lora_B.weight.data.normal_()
    layer.lora_B["default"].weight.data.copy_(ours["layer"].lora_B.weight)
    x = torch.randn(5, 16).to(dtype)
    assert ours["layer"](x).dtype == layer(x).dtype == dtype
    what = "the output of a float32 adapter over a half-precision layer"
    parity(what, difference(ours["layer"](x), layer(x)), where="one linear layer", case=str(dtype).split(".")[1])

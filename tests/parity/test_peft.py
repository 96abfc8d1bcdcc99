"""helpers/lora.py against PEFT on a tiny U-Net, CPU, float32: every comparison is max|difference| = 0.

Both sides start from the same base weights and the same seed. The targets cover linear layers and convolutions
(1x1, 3x3, 3x3 with stride 2).
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from tiny import tiny_unet
from torch import nn
from torch.nn import functional as F

from helpers import lora

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "conv_shortcut", "conv"]
RANKS = [1, 4, 16]
ALPHA = 6.0  # equal to no rank
TRAIN_SEED = 77


def peft_config(rank, use_rslora=False, dropout=0.0, targets=TARGETS):
    return LoraConfig(
        r=rank,
        lora_alpha=ALPHA,
        target_modules=targets,
        use_rslora=use_rslora,
        lora_dropout=dropout,
        init_lora_weights=True,
    )


def pair(rank, use_rslora=False, dropout=0.0):
    """The same U-Net twice, adapted by us and by PEFT, each after torch.manual_seed(5)."""
    ours, theirs = tiny_unet(), tiny_unet()
    torch.manual_seed(5)
    lora.inject(ours, TARGETS, rank, ALPHA, dropout, use_rslora)
    torch.manual_seed(5)
    theirs.add_adapter(peft_config(rank, use_rslora, dropout))
    return ours.train(), theirs.train()


def largest_difference(one, other):
    assert list(one) == list(other), "not the same keys in the same order"
    return max((one[key] - other[key]).abs().max().item() for key in one)


def weights(ours, theirs):
    return lora.lora_state_dict(ours), get_peft_model_state_dict(theirs)


def gradients(ours, theirs):
    own = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    peft = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    return own, peft


def loss(unet, step):
    """One training step's loss; dropout masks come from the global generator, seeded here."""
    generator = torch.Generator().manual_seed(1000 + step)
    latents, target = torch.randn(2, 3, 4, 8, 8, generator=generator)
    states = torch.randn(3, 5, 8, generator=generator)
    timesteps = torch.randint(0, 1000, (3,), generator=generator)
    torch.manual_seed(TRAIN_SEED + step)
    return F.mse_loss(unet(latents, timesteps, states).sample, target)


def train(unet, steps):
    """AdamW with gradient clipping, the optimizer of the course; the losses as floats."""
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-2)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(unet, step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rank", RANKS)
def test_initial_weights_and_scaling(rank, use_rslora):
    ours, theirs = pair(rank, use_rslora)
    own, peft = weights(ours, theirs)
    assert largest_difference(own, peft) == 0
    assert max(value.abs().max() for key, value in own.items() if "lora_A" in key) > 0
    scalings = {name: layer.scaling for name, layer in lora.lora_layers(ours).items()}
    assert scalings == {name: theirs.get_submodule(name).scaling["default"] for name in scalings}


def test_the_random_state_after_injection():
    torch.manual_seed(5)
    lora.inject(tiny := tiny_unet(), TARGETS, 4, ALPHA)
    ours = torch.get_rng_state()
    torch.manual_seed(5)
    (other := tiny_unet()).add_adapter(peft_config(4))
    assert torch.equal(ours, torch.get_rng_state())
    assert list(lora.lora_layers(tiny)) == [n for n, m in other.named_modules() if hasattr(m, "lora_A")]


def test_what_is_trainable():
    ours, theirs = pair(4)
    own = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert own == [name.replace(".default", "") for name, p in theirs.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rank", RANKS)
def test_twenty_steps_of_adamw(rank, use_rslora, dropout):
    ours, theirs = pair(rank, use_rslora, dropout)
    before = {key: value.clone() for key, value in lora.lora_state_dict(ours).items()}
    own_losses, peft_losses = train(ours, 20), train(theirs, 20)
    assert own_losses == peft_losses
    own, peft = weights(ours, theirs)
    assert largest_difference(own, peft) == 0
    assert min((own[key] - before[key]).abs().max() for key in own) > 0, "every A and B must have moved"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rank", RANKS)
def test_forward_and_gradients(rank, use_rslora, dropout):
    ours, theirs = pair(rank, use_rslora, dropout)
    train(ours, 2), train(theirs, 2)  # away from B = 0, where A has no gradient
    for unet in (ours, theirs):
        unet.zero_grad()
        loss(unet, 50).backward()
    own, peft = gradients(ours, theirs)
    assert largest_difference(own, peft) == 0
    assert min(value.abs().max() for value in own.values()) > 0

    generator = torch.Generator().manual_seed(3)
    latents, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    with torch.no_grad():
        one, other = (unet.eval()(latents, torch.tensor([1, 999]), states).sample for unet in (ours, theirs))
    assert torch.equal(one, other)


def test_get_peft_model_on_plain_layers():
    def model():
        torch.manual_seed(0)
        convolutions = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(6, 4, 1)
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 5))

    ours, theirs = model(), model()
    torch.manual_seed(5)
    lora.inject(ours, ["0", "1", "3"], 4, ALPHA)
    torch.manual_seed(5)
    theirs = get_peft_model(theirs, peft_config(4, targets=["0", "1", "3"]))
    peft = get_peft_model_state_dict(theirs)
    own = {f"base_model.model.{key}": value for key, value in lora.lora_state_dict(ours).items()}
    assert largest_difference(own, peft) == 0
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(ours(x), theirs(x))


def test_delta_weight_is_that_of_peft():
    ours, theirs = pair(4)
    train(ours, 2), train(theirs, 2)
    for name, layer in lora.lora_layers(ours).items():
        expected = theirs.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(lora.delta_weight(layer), expected, rtol=1e-5, atol=1e-7)


def test_merged_output_is_that_of_peft():
    ours, theirs = pair(4)
    train(ours, 5), train(theirs, 5)
    lora.merge(ours.eval())
    theirs.eval().fuse_lora()
    generator = torch.Generator().manual_seed(3)
    latents, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    with torch.no_grad():
        one, other = (unet(latents, torch.tensor([1, 999]), states).sample for unet in (ours, theirs))
    assert (one - other).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_adapter_under_a_half_base(dtype):
    torch.manual_seed(0)
    base = nn.Linear(16, 24).to(dtype)
    state = {key: value.clone() for key, value in base.state_dict().items()}
    ours = nn.ModuleDict({"layer": base})
    lora.inject(ours, ["layer"], 4, ALPHA)
    other = nn.Linear(16, 24).to(dtype)
    other.load_state_dict(state)
    theirs = get_peft_model(nn.Sequential(other), peft_config(4, targets=["0"]))
    layer = theirs.base_model.model[0]
    assert layer.lora_A["default"].weight.dtype == torch.float32
    # PEFT rounds its initial A to the base's dtype before it widens it again, so the weights are copied here
    layer.lora_A["default"].weight.data.copy_(ours["layer"].lora_A.weight)
    ours["layer"].lora_B.weight.data.normal_()
    layer.lora_B["default"].weight.data.copy_(ours["layer"].lora_B.weight)
    x = torch.randn(5, 16).to(dtype)
    assert torch.equal(ours["layer"](x), layer(x)) and layer(x).dtype == dtype

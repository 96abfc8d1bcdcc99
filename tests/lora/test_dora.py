"""The hand-written DoRA: what it computes, what trains, merge and unmerge, and its files."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny import tiny_unet
from torch import nn

from helpers import lora
from helpers.adapters.loading import load_adapter
from helpers.adapters.writing import save_adapter
from helpers.lora import dora

TARGETS = ["to_q", "to_out.0", "conv1", "conv_shortcut", "conv"]
LAYERS = {
    "linear": lambda: nn.Linear(5, 7),
    "linear without bias": lambda: nn.Linear(5, 7, bias=False),
    "convolution": lambda: nn.Conv2d(5, 7, 3, padding=1, stride=2),
    "1x1 convolution without bias": lambda: nn.Conv2d(5, 7, 1, bias=False),
}


def output(unet):
    generator = torch.Generator().manual_seed(1)
    latents, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    return unet(latents, torch.tensor([10, 900]), states).sample


def fill(model, std=0.3):
    """Give the adapter something to say: another direction (B) and other lengths (the magnitude)."""
    generator = torch.Generator().manual_seed(2)
    for layer in lora.lora_layers(model).values():
        layer.lora_B.weight.data.normal_(0, std, generator=generator)
        layer.magnitude.data *= 1 + 0.3 * torch.rand(layer.magnitude.shape, generator=generator)


def adapted(**options):
    unet = tiny_unet()
    lora.inject(unet, TARGETS, **({"rank": 4, "alpha": 6.0, "kinds": dora.KINDS} | options))
    fill(unet)
    return unet


def one_layer(kind, **options):
    """A filled DoRA layer around a base of this kind, and an input for it."""
    torch.manual_seed(0)
    base = LAYERS[kind]()
    model = nn.ModuleDict({"layer": base})
    lora.inject(model, ["layer"], 3, 6.0, kinds=dora.KINDS, **options)
    fill(model)
    return model["layer"], torch.randn(2, 5) if isinstance(base, nn.Linear) else torch.randn(2, 5, 9, 9)


def explicit_weight(layer, scaling):
    """m V / ||V|| written out row by row, in float64."""
    A, B, m = (
        t.detach().double().flatten(1) for t in (layer.lora_A.weight, layer.lora_B.weight, layer.magnitude[None])
    )
    W = layer.base.weight.detach().double()
    V = W.flatten(1) + B @ A * scaling
    rows = [m.flatten()[i] * V[i] / V[i].square().sum().sqrt() for i in range(len(V))]
    return torch.stack(rows).view(W.shape)


def explicit_output(layer, x, weight):
    base = layer.base
    bias = None if base.bias is None else base.bias.double()
    if isinstance(base, nn.Linear):
        return nn.functional.linear(x.double(), weight, bias)
    return nn.functional.conv2d(x.double(), weight, bias, base.stride, base.padding)


# ---- one layer ----


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_output_is_that_of_the_normalised_weight(kind, use_rslora):
    layer, x = one_layer(kind, use_rslora=use_rslora)
    expected = explicit_weight(layer, 6.0 / (3**0.5 if use_rslora else 3))
    torch.testing.assert_close(layer.merged_weight().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x).double(), explicit_output(layer, x, expected), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected.float(), layer.base.weight, atol=0.1), "the adapter must matter"


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_take_the_norm_as_a_constant(kind):
    layer, x = one_layer(kind)
    layer(x).square().sum().backward()
    A, B, m = (p.detach().double().requires_grad_() for p in (*layer.parameters_by_name().values(),))
    V = layer.base.weight.double() + (B.flatten(1) @ A.flatten(1)).view(layer.base.weight.shape) * 2.0
    norms = V.detach().flatten(1).norm(dim=1)
    weight = (m.flatten() / norms).view(-1, *[1] * (V.ndim - 1)) * V
    explicit_output(layer, x, weight).square().sum().backward()
    for parameter, expected in zip(layer.parameters_by_name().values(), (A, B, m), strict=True):
        scale = 1 + expected.grad.abs().max().item()
        torch.testing.assert_close(parameter.grad.double(), expected.grad, rtol=1e-4, atol=1e-5 * scale)


def test_the_magnitude_starts_as_the_rows_norms():
    linear, convolution = nn.Linear(5, 7), nn.Conv2d(5, 7, 3)
    norms = torch.stack([row.norm() for row in linear.weight])
    kernels = torch.stack([kernel.norm() for kernel in convolution.weight])
    torch.testing.assert_close(dora.DoRALinear(linear, 2, 1.0).magnitude, norms)
    torch.testing.assert_close(dora.DoRAConv2d(convolution, 2, 1.0).magnitude, kernels.view(1, 7, 1, 1))


def test_an_output_whose_weights_are_all_zero_starts_as_it_was():
    base = nn.Linear(3, 2)
    base.weight.data[0] = 0
    x = torch.ones(1, 3)
    assert torch.allclose(dora.DoRALinear(base, 1, 1.0)(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_trains_is_float32_under_a_half_base(dtype):
    base = nn.Linear(6, 4).to(dtype)
    layer = dora.DoRALinear(base, 2, 4.0)
    assert {p.dtype for p in layer.parameters_by_name().values()} == {torch.float32}
    assert layer(torch.ones(1, 6, dtype=dtype)).dtype == dtype


# ---- a U-Net ----


def test_it_starts_as_the_base():
    unet = tiny_unet()
    before = output(unet)
    lora.inject(unet, TARGETS, 4, 6.0, kinds=dora.KINDS)
    assert {type(layer) for layer in lora.lora_layers(unet).values()} == {dora.DoRALinear, dora.DoRAConv2d}
    assert (output(unet) - before).abs().max() <= 1e-6
    fill(unet)
    assert not torch.allclose(output(unet), before, atol=1e-2)


def test_dropout_is_refused_and_changes_nothing():
    unet = tiny_unet()
    modules = {name: id(module) for name, module in unet.named_modules()}
    with pytest.raises(ValueError, match="dropout must be 0, not 0.1"):
        lora.inject(unet, TARGETS, 4, 6.0, dropout=0.1, kinds=dora.KINDS)
    assert {name: id(module) for name, module in unet.named_modules()} == modules
    assert all(p.requires_grad for p in unet.parameters())


def test_a_b_and_the_magnitude_train_and_nothing_else():
    unet = adapted()
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    trained = lora.lora_parameters(unet)
    optimizer = torch.optim.SGD(trained, lr=1.0)
    output(unet).square().mean().backward()
    optimizer.step()
    changed = {name for name, p in unet.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name or name.endswith("magnitude")}
    assert len(changed) == len(trained) == 3 * len(lora.lora_layers(unet))
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in trained}


def test_merge_computes_the_same_and_unmerge_restores_the_bits():
    unet = adapted()
    weights = {name: layer.base.weight.clone() for name, layer in lora.lora_layers(unet).items()}
    with torch.no_grad():
        before = output(unet)
        lora.merge(unet)
        assert (output(unet) - before).abs().max() <= 1e-5
        assert not any(torch.equal(layer.base.weight, weights[n]) for n, layer in lora.lora_layers(unet).items())
        lora.unmerge(unet)
        assert torch.equal(output(unet), before)
    assert all(torch.equal(layer.base.weight, weights[name]) for name, layer in lora.lora_layers(unet).items())


def test_scaled_leaves_the_magnitude_as_trained():
    layer, x = one_layer("linear")
    model = nn.ModuleDict({"layer": layer})
    with lora.scaled(model, 0.0):
        expected = explicit_output(layer, x, explicit_weight(layer, 0.0))
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected.float(), layer.base(x), atol=1e-2)


def test_remove_takes_it_out():
    unet = adapted()
    lora.remove(unet)
    assert torch.equal(output(unet), output(tiny_unet()))


# ---- files ----


@pytest.mark.parametrize("use_rslora", [False, True])
def test_round_trip_through_a_file(tmp_path, use_rslora):
    unet = adapted(use_rslora=use_rslora)
    path = save_adapter(tmp_path, unet)
    other = tiny_unet()
    load_adapter(path, other)
    own, loaded = lora.lora_state_dict(unet), lora.lora_state_dict(other)
    assert set(own) == set(loaded) and all(torch.equal(own[key], loaded[key]) for key in own)
    assert torch.equal(output(other), output(unet))
    assert {id(p) for p in other.parameters() if p.requires_grad} == {id(p) for p in lora.lora_parameters(other)}
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.use_dora"] is True
        assert {key.rpartition(".lora_")[2] for key in file.keys()} == {"A.weight", "B.weight", "magnitude_vector"}


def test_kohyas_layout_keeps_the_magnitude_as_a_column(tmp_path):
    unet, other = adapted(), tiny_unet()
    path = save_adapter(tmp_path, unet, layout="kohya")
    with safe_open(path, framework="pt") as file:
        shapes = {tuple(file.get_tensor(key).shape) for key in file.keys() if key.endswith(".dora_scale")}
    assert {shape[1:] for shape in shapes} == {(1,), (1, 1, 1)} and not any(shape[0] == 1 for shape in shapes)
    load_adapter(path, other)
    assert torch.equal(output(other.eval()), output(unet.eval()))

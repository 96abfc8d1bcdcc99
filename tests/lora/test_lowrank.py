"""Adapters as values: out of a model and back, their sums, their norms, and the best one for a difference."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_unet
from torch import nn

from helpers import lora
from helpers.lora import dora
from helpers.lora.lowrank import LoRAWeights, attach, best_of_rank, compose, extract, weights_of

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
TARGETS = ["to_q", "to_out.0", "conv1", "conv_shortcut", "conv"]
SHAPES = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3)),
)


def output(unet):
    generator = torch.Generator().manual_seed(1)
    latents, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([10, 900]), states).sample


def adapted(kinds=lora.KINDS, **options):
    """A U-Net with an adapter whose numbers are all random."""
    unet = tiny_unet()
    lora.inject(unet, TARGETS, **({"rank": 4, "alpha": 6.0, "kinds": kinds} | options))
    for parameter in lora.lora_parameters(unet):
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return unet


def random_weights(shape, rank, alpha=3.0, use_rslora=False):
    """An update for a weight [out, in, ...]."""
    ones = [1] * (len(shape) - 2)
    return LoRAWeights(torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *ones), alpha, use_rslora)


def explicit(weights):
    """The update, row by row in float64."""
    A, B = weights.A.double(), weights.B.double().flatten(1)
    scaling = weights.alpha / (len(A) ** 0.5 if weights.use_rslora else len(A))
    return sum(torch.stack([b * A[i] for b in B[:, i]]) for i in range(len(A))) * scaling


def small_model():
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(6, 8), "b": nn.Conv2d(3, 5, 3), "c": nn.Linear(8, 6)})


def shifted(model, update):
    """A copy of the model whose weights are update(name, weight) further."""
    tuned = copy.deepcopy(model)
    for name, module in tuned.items():
        module.weight.data += update(name, module.weight)
    return tuned


def same_adapters(one, other):
    fields = [{n: (w.alpha, w.use_rslora, list(w.tensors())) for n, w in each.items()} for each in (one, other)]
    if fields[0] != fields[1]:
        return False
    return all(torch.equal(t, other[n].tensors()[part]) for n, w in one.items() for part, t in w.tensors().items())


# ---- out of a model and into another ----


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"conv1": 0.1}}, {"kinds": dora.KINDS}],
)
def test_weights_of_and_attach_are_inverse_to_the_bit(options):
    unet, other = adapted(**options), tiny_unet()
    adapter = weights_of(unet)
    random_state = torch.get_rng_state()
    attach(other, adapter)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert same_adapters(weights_of(other), adapter)
    assert torch.equal(output(other), output(unet)) and not torch.equal(output(other), output(tiny_unet()))
    assert {id(p) for p in other.parameters() if p.requires_grad} == {id(p) for p in lora.lora_parameters(other)}


def test_weights_of_is_a_copy_of_the_adapter_as_trained():
    unet = adapted()
    before = weights_of(unet)
    with lora.scaled(unet, 0.1):
        lora.merge(unet)
        assert same_adapters(weights_of(unet), before)
        lora.unmerge(unet)
    for parameter in lora.lora_parameters(unet):
        parameter.data.zero_()
    assert all(w.A.any() and w.B.any() for w in before.values())
    assert weights_of(tiny_unet()) == {}


def test_attach_copies_and_takes_a_dropout():
    unet, adapter = tiny_unet(), weights_of(adapted())
    attach(unet, adapter, dropout=0.25)
    assert {layer.lora_dropout.p for layer in lora.lora_layers(unet).values()} == {0.25}
    first = next(iter(adapter))
    lora.lora_layers(unet)[first].lora_A.weight.data.zero_()
    assert adapter[first].A.any()


NAME = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
MISFITS = {
    "no such layer": ({"nowhere": random_weights((4, 4), 2)}, "unexpected key 'nowhere.lora_A.weight'"),
    "not a layer": ({"mid_block": random_weights((4, 4), 2)}, "unexpected key 'mid_block.lora_A.weight'"),
    "A too wide": ({NAME: random_weights((16, 17), 2)}, "to_q.lora_A.weight' has shape .2, 17., .* needs .2, 16."),
    "B too long": ({NAME: random_weights((15, 16), 2)}, "to_q.lora_B.weight' has shape .15, 2., .* needs .16, 2."),
    "B of another rank": (
        {NAME: LoRAWeights(torch.ones(2, 16), torch.ones(16, 3), 1.0)},
        "lora_B.weight' has shape .16, 3., .* needs .16, 2.",
    ),
    "for a convolution": ({NAME: random_weights((16, 16, 1, 1), 2)}, "to_q.lora_A.weight' has shape .2, 16, 1, 1."),
    "magnitude too short": (
        {NAME: LoRAWeights(torch.ones(2, 16), torch.ones(16, 2), 1.0, magnitude=torch.ones(15))},
        "lora_magnitude_vector' has shape .15., .* needs .16.",
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_attach_refuses_what_does_not_fit_and_changes_nothing(misfit):
    adapter, message = MISFITS[misfit]
    unet = tiny_unet()
    modules, before = {name: id(module) for name, module in unet.named_modules()}, output(unet)
    fitting = {NAME.replace("to_q", "to_k"): random_weights((16, 16), 2)}
    random_state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        attach(unet, fitting | adapter)
    assert {name: id(module) for name, module in unet.named_modules()} == modules
    assert all(p.requires_grad for p in unet.parameters()) and torch.equal(output(unet), before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_attach_refuses_an_adapted_model_and_a_grouped_convolution():
    unet = adapted()
    before = output(unet)
    with pytest.raises(ValueError, match="already has LoRA layers"):
        attach(unet, weights_of(unet))
    assert torch.equal(output(unet), before)
    grouped = nn.ModuleDict({"a": nn.Conv2d(4, 4, 1, groups=2)})
    with pytest.raises(ValueError, match="no such linear or convolution layer"):
        attach(grouped, {"a": random_weights((4, 4, 1, 1), 2)})
    assert type(grouped["a"]) is nn.Conv2d


# ---- the update and its norm ----


@given(shape=SHAPES, rank=st.integers(1, 6), alpha=st.floats(-64, 64), use_rslora=st.booleans())
@PROPERTY
def test_any_update_and_its_frobenius_norm(shape, rank, alpha, use_rslora):
    torch.manual_seed(rank)
    weights = random_weights(shape, rank, alpha, use_rslora)
    expected = explicit(weights)
    norm = expected.square().sum().sqrt().item()
    assert weights.rank == rank and weights.delta().shape == expected.shape == shape
    assert (weights.delta().double() - expected).abs().max() <= 1e-5 * (1 + norm)
    assert weights.norm() == pytest.approx(norm, rel=1e-6, abs=1e-9)


def test_the_update_is_what_the_layer_adds():
    unet = adapted(use_rslora=True)
    layers = lora.lora_layers(unet)
    for name, weights in weights_of(unet).items():
        torch.testing.assert_close(weights.delta(), lora.delta_weight(layers[name]).detach(), rtol=1e-6, atol=1e-6)


def test_an_update_of_nothing_has_norm_zero():
    assert LoRAWeights(torch.ones(2, 3), torch.zeros(4, 2), 1.0).norm() == 0
    # [1, 1] [1; -1] = 0: the exact sum is zero, and rounding must not make it the root of a negative number
    cancelling = LoRAWeights(torch.tensor([[0.1, 0.7], [-0.1, -0.7]]), torch.ones(3, 2), 1.0)
    assert cancelling.norm() == pytest.approx(0, abs=1e-7)


# ---- sums ----


@given(
    shape=SHAPES,
    parts=st.lists(st.tuples(st.integers(1, 4), st.floats(-8, 8), st.booleans(), st.floats(-2, 2)), min_size=1),
)
@PROPERTY
def test_any_number_of_adapters_compose_to_their_weighted_sum(shape, parts):
    torch.manual_seed(len(parts))
    adapters = [(random_weights(shape, rank, alpha, rslora), weight) for rank, alpha, rslora, weight in parts]
    composed = compose([({"a": weights}, weight) for weights, weight in adapters])
    expected = sum(explicit(weights) * weight for weights, weight in adapters)
    size = sum(explicit(weights).abs().max().item() * abs(weight) for weights, weight in adapters)
    assert list(composed) == ["a"] and composed["a"].rank == sum(rank for rank, *_ in parts)
    assert (composed["a"].delta().double() - expected).abs().max() <= 1e-5 * (1e-3 + size)


def test_a_layer_of_one_adapter_only_is_kept():
    one = {"a": random_weights((6, 5), 2), "b": random_weights((4, 3), 2)}
    two = {"b": random_weights((4, 3), 3), "c": random_weights((2, 2), 1)}
    composed = compose([(one, 0.5), (two, -2.0)])
    assert {name: w.rank for name, w in composed.items()} == {"a": 2, "b": 5, "c": 1}
    torch.testing.assert_close(composed["a"].delta(), one["a"].delta() * 0.5)
    torch.testing.assert_close(composed["b"].delta(), one["b"].delta() * 0.5 - two["b"].delta() * 2)
    torch.testing.assert_close(composed["c"].delta(), two["c"].delta() * -2)


def test_a_composed_adapter_in_a_model_adds_both_updates():
    one, two = weights_of(adapted()), weights_of(adapted(rank=2, use_rslora=True))
    both, merged = tiny_unet(), tiny_unet()
    attach(both, compose([(one, 0.7), (two, 0.4)]))
    for name in one:
        merged.get_submodule(name).weight.data += one[name].delta() * 0.7 + two[name].delta() * 0.4
    assert (output(both) - output(merged)).abs().max() <= 1e-5
    assert not torch.allclose(output(merged), output(tiny_unet()), atol=1e-2)


def test_what_compose_refuses():
    plain = {"a": random_weights((6, 5), 2)}
    with_magnitude = {"a": LoRAWeights(torch.ones(1, 5), torch.ones(6, 1), 1.0, magnitude=torch.ones(6))}
    with pytest.raises(ValueError, match="'a' is a DoRA layer"):
        compose([(plain, 1.0), (with_magnitude, 1.0)])
    for shape in [(6, 4), (7, 5), (6, 5, 1, 1)]:
        with pytest.raises(ValueError, match="'a' has another shape in each adapter"):
            compose([(plain, 1.0), ({"a": random_weights(shape, 2)}, 1.0)])


# ---- the best adapter of a rank ----


@given(shape=SHAPES, rank=st.integers(1, 10))
@PROPERTY
def test_any_update_is_cut_with_the_error_that_is_said(shape, rank):
    torch.manual_seed(rank)
    delta = torch.randn(shape)
    weights, error = best_of_rank(delta, rank)
    rest = delta.double() - explicit(weights)
    assert error == pytest.approx((rest.norm() / delta.double().norm()).item(), abs=1e-6)
    assert weights.rank == min(rank, *delta.flatten(1).shape) and weights.scaling == 1
    assert error == pytest.approx(0, abs=1e-6) or weights.rank == rank
    # no other B A of this rank is closer: what is left has no part in the spaces that B and A span
    assert (weights.B.double().flatten(1).T @ rest.flatten(1)).abs().max() <= 1e-4
    assert (rest.flatten(1) @ weights.A.double().flatten(1).T).abs().max() <= 1e-4
    # the two factors share the update's size
    torch.testing.assert_close(weights.A.norm(), weights.B.norm())


def test_a_difference_of_the_rank_is_recovered():
    base = small_model()
    updates = {n: random_weights(tuple(m.weight.shape), 3) for n, m in base.items()}
    adapter, errors = extract(base, shifted(base, lambda name, _: updates[name].delta()), 3, ["a", "b", "c"])
    assert list(adapter) == list(errors) == ["a", "b", "c"]
    assert max(errors.values()) <= 1e-6
    for name, weights in adapter.items():
        assert (weights.delta() - updates[name].delta()).abs().max() <= 1e-5
    attach(base, adapter)
    assert {layer.rank for layer in lora.lora_layers(base).values()} == {3}


def test_a_lower_rank_leaves_the_error_that_is_said():
    base = small_model()
    torch.manual_seed(1)
    tuned = shifted(base, lambda _, weight: torch.randn(weight.shape))
    for rank in (1, 2, 4):
        adapter, errors = extract(base, tuned, rank, ["a", "b"])
        for name, weights in adapter.items():
            delta = (tuned[name].weight - base[name].weight).detach().double()
            left = ((delta - explicit(weights)).norm() / delta.norm()).item()
            assert errors[name] == pytest.approx(left, abs=1e-6) and 0.05 < left < 1


def test_no_difference_is_error_zero():
    base = small_model()
    adapter, errors = extract(base, copy.deepcopy(base), 2, ["a", "b"])
    assert errors == {"a": 0.0, "b": 0.0}
    assert not any(weights.delta().any() for weights in adapter.values())


def test_extraction_leaves_both_models_alone_and_can_take_a_regular_expression():
    base = small_model()
    tuned = shifted(base, lambda _, weight: torch.ones(weight.shape))
    before = [p.clone() for model in (base, tuned) for p in model.parameters()]
    adapter, _ = extract(base, tuned, 2, "[ab]")
    assert list(adapter) == ["a", "b"]
    after = [p for model in (base, tuned) for p in model.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert all(p.requires_grad for p in after)


def test_an_adapter_of_a_half_model_is_float32():
    base = small_model().to(torch.bfloat16)
    adapter, errors = extract(base, shifted(base, lambda _, weight: torch.ones_like(weight)), 1, ["a"])
    assert adapter["a"].A.dtype == adapter["a"].B.dtype == torch.float32 and errors["a"] < 0.1


def test_what_extract_refuses():
    base = small_model()
    with pytest.raises(ValueError, match="'to_q' matches no module"):
        extract(base, copy.deepcopy(base), 2, ["a", "to_q"])
    narrow = nn.ModuleDict({"a": nn.Linear(5, 8)})
    for tuned in (narrow, nn.ModuleDict({"b": nn.Conv2d(3, 5, 3)})):
        with pytest.raises(ValueError, match="differ in structure: 'a'"):
            extract(base, tuned, 2, ["a"])

"""The hand-written LoRA: what it computes, what it freezes, merge and unmerge, and what it refuses."""

import ast
import inspect
import io
import tokenize

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_unet
from torch import nn

from helpers import lora

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv_shortcut", "conv"]


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    states = torch.randn(2, 5, 8, generator=generator).to(dtype)
    return latents, torch.tensor([10, 900]), states


def fill_B(model, seed=2, std=0.3):
    """Give the adapter something to say: B starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora.lora_layers(model).values():
        layer.lora_B.weight.data.normal_(0, std, generator=generator)


def adapted(targets=ATTENTION + CONVOLUTIONS, **options):
    unet = tiny_unet()
    lora.inject(unet, targets, **({"rank": 4, "alpha": 6.0} | options))
    fill_B(unet)
    return unet


def output(unet, dtype=torch.float32):
    with torch.no_grad():
        return unet(*inputs(dtype)).sample


# ---- one layer ----


@pytest.mark.parametrize("use_rslora, scaling", [(False, 8.0 / 4), (True, 8.0 / 2)])
def test_linear_is_base_plus_scaled_product(use_rslora, scaling):
    torch.manual_seed(0)
    base = nn.Linear(5, 7)
    layer = lora.LoRALinear(base, rank=4, alpha=8.0, use_rslora=use_rslora)
    layer.lora_B.weight.data.normal_()
    x = torch.randn(3, 2, 5)
    weight = base.weight + layer.lora_B.weight @ layer.lora_A.weight * scaling
    torch.testing.assert_close(layer(x), x @ weight.T + base.bias)
    assert layer.scaling == scaling


@pytest.mark.parametrize(
    "kernel, options",
    [(1, {}), (3, {"padding": 1}), (3, {"stride": 2}), (3, {"padding": 2, "dilation": 2, "padding_mode": "circular"})],
)
def test_convolution_is_that_of_the_summed_kernels(kernel, options):
    torch.manual_seed(0)
    base = nn.Conv2d(5, 7, kernel, **options)
    layer = lora.LoRAConv2d(base, rank=3, alpha=2.0)
    layer.lora_B.weight.data.normal_()
    x = torch.randn(2, 5, 9, 9)
    whole = nn.Conv2d(5, 7, kernel, **options)
    whole.bias.data = base.bias.data
    product = torch.einsum("or,rikl->oikl", layer.lora_B.weight[:, :, 0, 0], layer.lora_A.weight)
    whole.weight.data = (base.weight + product * 2 / 3).detach()
    torch.testing.assert_close(layer(x), whole(x), rtol=1e-5, atol=1e-5)


@given(
    rank=st.integers(1, 20),
    alpha=st.floats(0.1, 64),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    use_rslora=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_linear_starts_as_its_base_and_has_the_counted_parameters(rank, alpha, sizes, use_rslora):
    torch.manual_seed(0)
    base = nn.Linear(*sizes)
    layer = lora.LoRALinear(base, rank, alpha, use_rslora=use_rslora)
    x = torch.randn(4, sizes[0])
    assert torch.equal(layer(x), base(x))
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == rank * sum(sizes)
    assert layer.scaling == pytest.approx(alpha / rank**0.5 if use_rslora else alpha / rank)


def test_dropout_touches_only_the_adapter_and_only_in_training():
    torch.manual_seed(0)
    layer = lora.LoRALinear(nn.Linear(6, 6), rank=4, alpha=4.0, dropout=0.5)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), layer.base(x)), "with B = 0 dropout must not be seen"
    layer.lora_B.weight.data.normal_()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_wrapping_keeps_the_mode_of_the_base():
    assert not lora.LoRALinear(nn.Linear(2, 2).eval(), 1, 1.0, dropout=0.1).lora_dropout.training
    assert lora.LoRALinear(nn.Linear(2, 2).train(), 1, 1.0, dropout=0.1).lora_dropout.training


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": -3}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_impossible_rank_or_dropout(options):
    with pytest.raises(ValueError, match="rank must be at least 1 and dropout in"):
        lora.LoRALinear(nn.Linear(2, 2), **({"rank": 1, "alpha": 1.0} | options))


def test_grouped_convolution_is_refused():
    with pytest.raises(ValueError, match="2 groups"):
        lora.LoRAConv2d(nn.Conv2d(4, 4, 1, groups=2), 1, 1.0)


# ---- a U-Net ----


def test_b_zero_changes_nothing():
    unet = tiny_unet()
    before = output(unet)
    lora.inject(unet, ATTENTION + CONVOLUTIONS, rank=4, alpha=6.0)
    assert torch.equal(output(unet), before)
    fill_B(unet)
    assert not torch.allclose(output(unet), before, atol=1e-3)


def test_inject_returns_the_names_and_wraps_exactly_those():
    unet = tiny_unet()
    names = lora.inject(unet, ["to_q", "mid_block.resnets.0.conv1"], rank=2, alpha=2.0)
    expected = [n for n, _ in tiny_unet().named_modules() if n.endswith(".to_q") or n == "mid_block.resnets.0.conv1"]
    assert names == expected == list(lora.lora_layers(unet))
    assert isinstance(unet.mid_block.resnets[0].conv1, lora.LoRAConv2d)
    assert isinstance(unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q, lora.LoRALinear)


def test_a_target_matches_whole_name_parts_only():
    model = nn.ModuleDict({"q": nn.Linear(2, 2), "to_q": nn.Linear(2, 2), "xto_q": nn.Linear(2, 2)})
    assert lora.inject(model, ["to_q"], 1, 1.0) == ["to_q"]


def test_gradients_reach_a_and_b_and_nothing_else():
    unet = adapted()
    unet(*inputs()).sample.square().mean().backward()
    parameters = lora.lora_parameters(unet)
    assert {id(p) for p in parameters} == {id(p) for p in unet.parameters() if p.requires_grad}
    assert len(parameters) == 2 * len(lora.lora_layers(unet))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    assert all(p.grad is None for p in unet.parameters() if not p.requires_grad)


def test_a_lone_layer_freezes_its_base():
    layer = lora.LoRALinear(nn.Linear(3, 3), 1, 1.0)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A.weight", "lora_B.weight"]


def test_state_dict_names_and_memory():
    unet = adapted(["to_q"])
    state = lora.lora_state_dict(unet)
    names = list(lora.lora_layers(unet))
    assert list(state) == [f"{name}.{part}.weight" for name in names for part in ("lora_A", "lora_B")]
    assert state[f"{names[0]}.lora_A.weight"].data_ptr() == lora.lora_parameters(unet)[0].data_ptr()
    assert not any(value.requires_grad for value in state.values())


def test_state_dict_round_trip():
    one, other = adapted(), adapted()
    fill_B(other, seed=9)
    assert not torch.equal(output(one), output(other))
    lora.load_lora_state_dict(other, lora.lora_state_dict(one))
    assert torch.equal(output(one), output(other))


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_a_state_dict_that_does_not_fit_is_named_and_not_loaded(fault):
    unet = adapted()
    state = {key: torch.zeros_like(value) for key, value in lora.lora_state_dict(unet).items()}
    key = list(state)[-1]
    if fault == "missing":
        del state[key]
    elif fault == "unexpected":
        key = "somewhere.lora_A.weight"
        state[key] = torch.zeros(1)
    else:
        state[key] = torch.zeros(3, 3)
    before = output(unet)
    with pytest.raises(ValueError, match=key):
        lora.load_lora_state_dict(unet, state)
    assert torch.equal(output(unet), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_and_b_are_float32_under_a_half_base(dtype):
    unet = tiny_unet(dtype=dtype)
    before = output(unet, dtype)
    lora.inject(unet, ATTENTION + CONVOLUTIONS, rank=4, alpha=6.0)
    assert {p.dtype for p in lora.lora_parameters(unet)} == {torch.float32}
    assert torch.equal(output(unet, dtype), before)
    fill_B(unet)
    changed = output(unet, dtype)
    assert changed.dtype == dtype and not torch.equal(changed, before)
    unet(*inputs(dtype)).sample.float().square().mean().backward()
    assert {p.grad.dtype for p in lora.lora_parameters(unet)} == {torch.float32}


def test_parameter_count_on_the_meta_device():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
        )
    names = lora.inject(unet, ATTENTION, rank=4, alpha=4.0)
    # Stable Diffusion 2.1: 128 attention layers, 207,488 trainable numbers for each unit of rank
    assert len(names) == 128
    assert sum(p.numel() for p in lora.lora_parameters(unet)) == 4 * 207_488
    assert {p.device.type for p in lora.lora_parameters(unet)} == {"meta"}


# ---- what inject refuses ----


@pytest.mark.parametrize(
    "targets, message",
    [
        (["to_q", "to_nothing"], "'to_nothing' matches no module"),
        (["attn1"], "'attn1' is .* not a Linear or an ungrouped Conv2d"),
        ("to_q", "list of at least one name, not 'to_q'"),
        ([], "list of at least one name"),
    ],
)
def test_bad_targets_change_nothing(targets, message):
    unet = tiny_unet()
    before = {name: id(module) for name, module in unet.named_modules()}
    with pytest.raises(ValueError, match=message):
        lora.inject(unet, targets, rank=2, alpha=2.0)
    assert {name: id(module) for name, module in unet.named_modules()} == before
    assert all(p.requires_grad for p in unet.parameters())


def test_a_bad_rank_changes_nothing():
    unet = tiny_unet()
    with pytest.raises(ValueError, match="rank"):
        lora.inject(unet, ["to_q"], rank=0, alpha=2.0)
    assert not lora.lora_layers(unet) and all(p.requires_grad for p in unet.parameters())


def test_a_second_injection_is_refused():
    unet = adapted(["to_q"])
    before = output(unet)
    with pytest.raises(ValueError, match="already has LoRA layers"):
        lora.inject(unet, ["to_k"], rank=2, alpha=2.0)
    assert torch.equal(output(unet), before)


# ---- scaled, merge, unmerge, remove ----


def test_scaled_multiplies_the_adapter_only():
    unet = tiny_unet()
    base = output(unet)
    lora.inject(unet, ATTENTION, rank=4, alpha=6.0)
    fill_B(unet)
    full = output(unet)
    with lora.scaled(unet, 0.0):
        assert torch.equal(output(unet), base)
    with lora.scaled(unet, 0.5):
        half = output(unet)
        with lora.scaled(unet, 2.0):
            assert torch.equal(output(unet), full)
    for layer in lora.lora_layers(unet).values():
        layer.scaling *= 0.5
    assert torch.equal(output(unet), half) and not torch.equal(half, full)


def test_scaled_is_undone_after_an_exception():
    unet = adapted(["to_q"])
    with pytest.raises(RuntimeError), lora.scaled(unet, 3.0):
        raise RuntimeError
    assert {layer.scaling for layer in lora.lora_layers(unet).values()} == {6.0 / 4}


def test_scaled_needs_layers_that_are_not_merged():
    unet = tiny_unet()
    with pytest.raises(ValueError, match="scaled needs"), lora.scaled(unet, 1.0):
        pass
    unet = adapted(["to_q"])
    lora.merge(unet)
    with pytest.raises(ValueError, match="scaled needs"), lora.scaled(unet, 1.0):
        pass


def test_merge_computes_the_same_and_unmerge_restores_the_bits():
    unet = adapted()
    weights = {name: layer.base.weight.clone() for name, layer in lora.lora_layers(unet).items()}
    before = output(unet)
    lora.merge(unet)
    assert not any(torch.equal(layer.base.weight, weights[name]) for name, layer in lora.lora_layers(unet).items())
    assert (output(unet) - before).abs().max() <= 1e-5
    lora.merge(unet)  # a second merge adds nothing
    assert (output(unet) - before).abs().max() <= 1e-5
    lora.unmerge(unet)
    assert all(torch.equal(layer.base.weight, weights[name]) for name, layer in lora.lora_layers(unet).items())
    assert torch.equal(output(unet), before)
    lora.unmerge(unet)
    assert torch.equal(output(unet), before)


def test_unmerge_is_bit_exact_in_bfloat16_where_subtraction_is_not():
    torch.manual_seed(0)
    base = nn.Linear(32, 32).to(torch.bfloat16)
    original = base.weight.data.clone()
    model = nn.ModuleDict({"layer": base})
    lora.inject(model, ["layer"], 4, 8.0)
    fill_B(model)
    change = lora.delta_weight(model["layer"]).detach()
    lora.merge(model)
    subtracted = (base.weight.float() - change).to(torch.bfloat16)
    assert not torch.equal(subtracted, original), "this case would not show the difference"
    lora.unmerge(model)
    assert torch.equal(base.weight, original)


def test_merge_within_scaled_takes_the_scale():
    unet = adapted(["to_q"])
    with lora.scaled(unet, 0.25):
        expected = output(unet)
        lora.merge(unet)
        assert (output(unet) - expected).abs().max() <= 1e-5
        lora.unmerge(unet)


@pytest.mark.parametrize("merged", [False, True])
def test_remove_leaves_the_very_same_modules(merged):
    unet = tiny_unet()
    modules = {name: id(module) for name, module in unet.named_modules()}
    before = output(unet)
    lora.inject(unet, ATTENTION + CONVOLUTIONS, rank=4, alpha=6.0)
    fill_B(unet)
    if merged:
        lora.merge(unet)
    lora.remove(unet)
    assert {name: id(module) for name, module in unet.named_modules()} == modules
    assert torch.equal(output(unet), before)
    assert not any(p.requires_grad for p in unet.parameters())


# ---- the file itself ----


def test_the_file_is_short_and_stands_on_torch_alone():
    source = inspect.getsource(lora)
    tree = ast.parse(source)
    prose = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            prose.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40, f"{node.name} does not fit a notebook cell"
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.strip().startswith("#"):
            prose.add(token.start[0])
    code = [line for number, line in enumerate(source.splitlines(), 1) if line.strip() and number not in prose]
    assert len(code) <= 200
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"__future__", "collections.abc", "contextlib", "math", "torch"}

"""The hand-written LoRA: what it computes, what it freezes, merge and unmerge, and what it refuses."""

import ast
import inspect
import io
import sys
import tokenize

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_text_encoder, tiny_unet
from torch import nn

from helpers import lora
from helpers.lora import dora, injection, lowrank, merging
from helpers.lora import layer as layer_module

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv_shortcut", "conv"]
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)


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
@PROPERTY
def test_any_linear_starts_as_its_base_and_has_the_counted_parameters(rank, alpha, sizes, use_rslora):
    torch.manual_seed(0)
    base = nn.Linear(*sizes)
    layer = lora.LoRALinear(base, rank, alpha, use_rslora=use_rslora)
    x = torch.randn(4, sizes[0])
    assert torch.equal(layer(x), base(x))
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == rank * sum(sizes)
    assert layer.scaling == pytest.approx(alpha / rank**0.5 if use_rslora else alpha / rank)


def random_linear(sizes, rank, alpha, use_rslora, seed):
    """A LoRALinear of random numbers and a batch for it."""
    torch.manual_seed(seed)
    layer = lora.LoRALinear(nn.Linear(*sizes), rank, alpha, use_rslora=use_rslora)
    layer.lora_B.weight.data.normal_()
    return layer, torch.randn(3, sizes[0])


LINEARS = {
    "sizes": st.tuples(st.integers(1, 12), st.integers(1, 12)),
    "rank": st.integers(1, 16),
    "alpha": st.floats(-64, 64),
    "use_rslora": st.booleans(),
    "seed": st.integers(0, 1000),
}


@given(**LINEARS)
@PROPERTY
def test_any_linear_is_the_closed_form(sizes, rank, alpha, use_rslora, seed):
    layer, x = random_linear(sizes, rank, alpha, use_rslora, seed)
    A, B, W, b = (t.detach().double() for t in (layer.lora_A.weight, layer.lora_B.weight, *layer.base.parameters()))
    scaling = alpha / (rank**0.5 if use_rslora else rank)
    expected = x.double() @ (W + B @ A * scaling).T + b
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5 * (1 + expected.abs().max().item()))


@given(scale=st.floats(-3, 3), **LINEARS)
@PROPERTY
def test_any_linear_merges_to_the_same_and_unmerges_to_its_bits(sizes, rank, alpha, use_rslora, seed, scale):
    layer, x = random_linear(sizes, rank, alpha, use_rslora, seed)
    model, original = nn.ModuleDict({"layer": layer}), layer.base.weight.clone()
    with lora.scaled(model, scale):
        unmerged = layer(x)
        lora.merge(model)
        torch.testing.assert_close(layer(x), unmerged, rtol=1e-5, atol=1e-5 * (1 + unmerged.abs().max().item()))
        lora.unmerge(model)
    assert torch.equal(layer.base.weight, original) and layer.original_weight is None


def test_how_a_starts():
    torch.manual_seed(0)
    kaiming = lora.LoRALinear(nn.Linear(400, 3), rank=8, alpha=1.0)
    gaussian = lora.LoRALinear(nn.Linear(400, 3), rank=8, alpha=1.0, init="gaussian")
    # uniform within 1 / sqrt(inputs), as nn.Linear; normal with standard deviation 1 / rank, as diffusers' scripts
    assert 0.99 / 20 <= kaiming.lora_A.weight.abs().max() <= 1 / 20
    assert kaiming.lora_A.weight.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.05)
    assert gaussian.lora_A.weight.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert gaussian.lora_A.weight.abs().max() > 3 / 8, "a normal distribution has tails"
    assert not kaiming.lora_B.weight.any() and not gaussian.lora_B.weight.any()


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
    with pytest.raises(ValueError, match="rank must be at least 1|dropout must be in"):
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


@pytest.mark.parametrize(
    "targets, name, selected",
    [
        (["to_q"], "a.to_q", True),
        (["to_q"], "to_q", True),
        (["to_q"], "a.xto_q", False),
        (["to_q"], "to_q.a", False),
        (["a.to_q", "b"], "b", True),
        (["to_."], "to_q", False),  # names in a list are no regular expressions
        (r".*\.to_[qk]", "a.to_k", True),
        (r".*\.to_[qk]", "a.to_v", False),
        ("to_q", "a.to_q", False),
        ("a", "a.to_q", False),
    ],
)
def test_what_targets_select(targets, name, selected):
    assert lora.selects(targets, name) is selected


def test_a_regular_expression_wraps_the_modules_that_it_matches_whole():
    unet = tiny_unet()
    names = lora.inject(unet, r"(down|up)_blocks\..*attn2\.to_[qk]", rank=2, alpha=2.0)
    attn2 = [n for n, _ in tiny_unet().named_modules() if n.endswith(("attn2.to_q", "attn2.to_k"))]
    assert names == [n for n in attn2 if not n.startswith("mid_block")] == list(lora.lora_layers(unet))
    assert 0 < len(names) < len(attn2)


def test_patterns_give_some_modules_another_rank_or_alpha():
    unet = tiny_unet()
    patterns = {"rank_pattern": {"attn2.to_q": 2, "mid_block.*to_k": 8}, "alpha_pattern": {"to_q": 1.5, ".*to_q": 99}}
    lora.inject(unet, ["to_q", "to_k"], 4, 6.0, **patterns)
    layers = lora.lora_layers(unet)
    for name, layer in layers.items():
        mid_k = name.startswith("mid_block") and name.endswith("to_k")
        assert layer.rank == (2 if name.endswith("attn2.to_q") else 8 if mid_k else 4), name
        assert layer.alpha == (1.5 if name.endswith("to_q") else 6.0), "the first pattern that matches counts"
        assert layer.scaling == layer.alpha / layer.rank and len(layer.lora_A.weight) == layer.rank
    assert {(layer.rank, layer.alpha) for layer in layers.values()} == {(2, 1.5), (4, 1.5), (8, 6.0), (4, 6.0)}


def test_a_pattern_matches_whole_words_at_the_end_of_a_name():
    patterns = {"to_q": 1.0, r"^a\.b": 2.0, "x|y": 3.0}
    found = [lora.by_pattern(patterns, name, 0) for name in ("to_q", "a.to_q", "ato_q", "a.b", "c.a.b", "a.y", "a.xy")]
    assert found == [1.0, 1.0, 0, 2.0, 0, 3.0, 0]
    assert lora.by_pattern(None, "to_q", 7) == 7


def test_inject_passes_the_init_on():
    unet = tiny_unet()
    torch.manual_seed(3)
    lora.inject(unet, ["ff.net.2"], rank=16, alpha=1.0, init="gaussian")
    A = torch.cat([layer.lora_A.weight.flatten() for layer in lora.lora_layers(unet).values()])
    assert A.std().item() == pytest.approx(1 / 16, rel=0.05)


def test_a_text_encoder():
    encoder = tiny_text_encoder(layers=2)
    tokens = torch.tensor([[1, 5, 9, 2]])
    before = encoder(tokens).last_hidden_state
    names = lora.inject(encoder, ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], rank=2, alpha=4.0)
    assert len(names) == 12 and torch.equal(encoder(tokens).last_hidden_state, before)
    fill_B(encoder)
    after = encoder(tokens).last_hidden_state
    assert not torch.allclose(after, before, atol=1e-3)
    after.square().mean().backward()
    trained = {id(p) for p in encoder.parameters() if p.grad is not None}
    assert trained == {id(p) for p in lora.lora_parameters(encoder)}
    lora.merge(encoder)
    assert (encoder(tokens).last_hidden_state - after).abs().max() <= 1e-5


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


def assert_refused(message, *arguments, error=ValueError, **options):
    """inject raises an error with this message, and leaves the model and the random state alone."""
    unet = tiny_unet()
    modules, random_state = {name: id(module) for name, module in unet.named_modules()}, torch.get_rng_state()
    with pytest.raises(error, match=message):
        lora.inject(unet, *arguments, **options)
    assert {name: id(module) for name, module in unet.named_modules()} == modules
    assert all(p.requires_grad for p in unet.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    "targets, message",
    [
        (["to_q", "to_nothing"], "'to_nothing' matches no module"),
        (["attn1"], "the targets select '.*attn1': Attention is no Linear"),
        ("to_q", "'to_q' matches no module"),  # a regular expression has to match a whole name
        (".*attn1", "the targets select '.*attn1': Attention is no Linear"),
        ([], "list of at least one name"),
    ],
)
def test_bad_targets_change_nothing(targets, message):
    assert_refused(message, targets, rank=2, alpha=2.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank_pattern": {"to_k": 0}}, "rank must be at least 1 .* not 0"),
        ({"rank_pattern": {"attn2.to_k": -2}}, "rank must be at least 1 .* not -2"),
        ({"rank_pattern": {"to_v": 3}}, "pattern 'to_v' matches none of the targets"),
        ({"alpha_pattern": {"to_q": 1.0, "to": 3.0}}, "pattern 'to' matches none of the targets"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"init": "zeros"}, "init is 'kaiming' or 'gaussian', not 'zeros'"),
    ],
)
def test_bad_settings_change_nothing(options, message):
    assert_refused(message, ["to_q", "to_k"], **({"rank": 2, "alpha": 2.0} | options))


@pytest.mark.parametrize("options", [{"targets": "("}, {"rank_pattern": {"(": 3}}, {"alpha_pattern": {"(": 3.0}}])
def test_a_regular_expression_that_does_not_compile_is_a_value_error(options):
    assert_refused(r"\(", **({"targets": ["to_q"], "rank": 2, "alpha": 2.0} | options))


@pytest.mark.parametrize("options", [{"rank_pattern": {"to_k": 2.5}}, {"alpha_pattern": {"to_k": "high"}}])
def test_a_pattern_value_that_is_no_number_of_its_kind_changes_nothing(options):
    assert_refused(None, ["to_q", "to_k"], error=(ValueError, TypeError), rank=2, alpha=2.0, **options)


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


@pytest.mark.parametrize(
    "module", [layer_module, injection, merging, dora, lowrank], ids=lambda module: module.__name__
)
def test_each_file_is_short_and_stands_on_torch_alone(module):
    source = inspect.getsource(module)
    tree = ast.parse(source)
    prose = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            prose.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            lines = set(range(node.lineno, node.end_lineno + 1)) - prose
            assert len(lines) <= 40, f"{node.name} does not fit a notebook cell"
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.strip().startswith("#"):
            prose.add(token.start[0])
    code = [line for number, line in enumerate(source.splitlines(), 1) if line.strip() and number not in prose]
    assert len(code) <= 120
    imported = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    others = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) if "helpers" in node.module}
    assert imported - sys.stdlib_module_names <= {"torch", "helpers"}
    assert all(name == "helpers" or name.startswith("helpers.lora") for name in others)

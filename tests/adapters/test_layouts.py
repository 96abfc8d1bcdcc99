"""What adapter files call their tensors, and that each layout is read as it was written."""

import functools
import math

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from helpers.adapters import layouts
from helpers.adapters.configuration import Adapter, AdapterError
from helpers.adapters.reading import read_adapter
from helpers.adapters.writing import write_adapter
from helpers.lora.lowrank import LoRAWeights

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)
PARTS = {
    "diffusers": layouts.PARTS,
    "peft": layouts.PARTS,
    "old": ("lora_A.weight", "lora_B.weight"),
    "kohya": tuple(layouts.KOHYA_PARTS),
    "ldm": tuple(layouts.KOHYA_PARTS),
}
OPTIONS = {
    "1.5": {"cross_attention_dim": 768},
    "2.1": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
}


@functools.cache
def names_of(model):
    """The names of all linear and convolution layers of Stable Diffusion's U-Net, 1.5 or 2.1, or text encoder."""
    with torch.device("meta"):
        whole = CLIPTextModel(CLIPTextConfig()) if model == "text" else UNet2DConditionModel(**OPTIONS[model])
    return [name for name, module in whole.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def layer_names(model):
    """The same under the names that layers have in an adapter."""
    return [layouts.layer_of("text_encoder" if model == "text" else "unet", name) for name in names_of(model)]


# ---- names ----


@pytest.mark.parametrize("model, count", [("1.5", 282), ("2.1", 282), ("text", 72)])
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_every_layer_is_read_as_it_is_written(layout, model, count):
    layers = layer_names(model)
    assert len(layers) == count
    places = [(layer, part) for layer in layers for part in PARTS[layout]]
    keys = [layouts.key_of(layout, *place) for place in places]
    assert [layouts.READERS[layout](key) for key in keys] == places
    assert len(set(keys)) == len(keys) and layouts.layout_of(keys) == layout
    assert layouts.layout_of([*keys[:3], "something.else"]) == layout
    for other in set(layouts.LAYOUTS) - {layout}:
        assert not any(layouts.READERS[other](key) for key in keys), f"{layout} keys must not read as {other}"


@pytest.mark.parametrize("model", ["1.5", "2.1", "text"])
def test_dotted_finds_the_dots_that_kohya_drops(model):
    names = names_of(model)
    assert [layouts.dotted(name.replace(".", "_")) for name in names] == names


@pytest.mark.parametrize("name", ["input_blocks_1_1_proj_in", "to_x", "to_qq", "attn1_to_q_lora", "proj_inn", "_to_q"])
def test_dotted_knows_no_other_words(name):
    assert layouts.dotted(name) is None


A, B = "lora_A.weight", "lora_B.weight"
MID = "mid_block.attentions.0.transformer_blocks.0.attn1"
MLP = "encoder.layers.3.mlp.fc1"
ATTENTION = "encoder.layers.3.self_attn"
READ = [
    ("diffusers", f"unet.{MID}.to_q.lora_A.weight", f"unet.{MID}.to_q", A),
    ("diffusers", f"unet.{MID}.to_q.lora_magnitude_vector", f"unet.{MID}.to_q", "lora_magnitude_vector"),
    ("diffusers", f"text_encoder.text_model.{MLP}.lora_B.weight", f"text_encoder.{MLP}", B),
    ("diffusers", f"text_encoder.{MLP}.lora_B.weight", f"text_encoder.{MLP}", B),
    ("diffusers", f"unet.{MID}.to_q.lora_A.default.weight", f"unet.{MID}.to_q", A),
    ("diffusers", f"unet.{MID}.to_q.lora_magnitude_vector.default.weight", f"unet.{MID}.to_q", "lora_magnitude_vector"),
    ("peft", f"base_model.model.{MID}.to_q.lora_A.weight", f"unet.{MID}.to_q", A),
    ("peft", f"base_model.model.text_model.{MLP}.lora_A.weight", f"text_encoder.{MLP}", A),
    ("peft", f"base_model.model.{MLP}.lora_A.weight", f"text_encoder.{MLP}", A),
    (
        "kohya",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight",
        f"unet.{MID}.to_out.0",
        A,
    ),
    ("kohya", "lora_unet_down_blocks_0_resnets_1_conv1.lora_up.weight", "unet.down_blocks.0.resnets.1.conv1", B),
    ("kohya", "lora_unet_time_embedding_linear_1.alpha", "unet.time_embedding.linear_1", "alpha"),
    ("kohya", "lora_te_text_model_encoder_layers_3_mlp_fc1.lora_up.weight", f"text_encoder.{MLP}", B),
    ("kohya", "lora_te_encoder_layers_3_self_attn_q_proj.alpha", f"text_encoder.{ATTENTION}.q_proj", "alpha"),
    ("kohya", "lora_unet_conv_in.lora_mid.weight", "unet.conv_in", "lora_mid.weight"),
    ("kohya", "lora_unet_conv_in.dora_scale", "unet.conv_in", "lora_magnitude_vector"),
    ("ldm", "diffusion_model.input_blocks.3.0.op.lora_up.weight", "unet.down_blocks.0.downsamplers.0.conv", B),
    ("ldm", "unet.output_blocks.2.2.conv.alpha", "unet.up_blocks.0.upsamplers.0.conv", "alpha"),  # OneTrainer's
    ("ldm", "unet.output_blocks.2.1.conv.alpha", "unet.up_blocks.0.upsamplers.0.conv", "alpha"),
    ("ldm", f"clip_l.text_model.{MLP}.lora_up.weight", f"text_encoder.{MLP}", B),
    ("ldm", f"text_encoders.clip_h.transformer.text_model.{MLP}.lora_down.weight", f"text_encoder.{MLP}", A),
    ("old", f"unet.{MID}.to_q.lora.down.weight", f"unet.{MID}.to_q", A),
    ("old", f"unet.{MID}.processor.to_out_lora.up.weight", f"unet.{MID}.to_out.0", B),
    ("old", f"{MID}.processor.to_v_lora.down.weight", f"unet.{MID}.to_v", A),
    (
        "old",
        f"text_encoder.text_model.{ATTENTION}.to_out_lora.up.weight",
        f"text_encoder.{ATTENTION}.out_proj",
        B,
    ),
    ("old", f"text_encoder.text_model.{ATTENTION}.to_k_lora.down.weight", f"text_encoder.{ATTENTION}.k_proj", A),
    ("old", f"text_encoder.text_model.{MLP}.lora_linear_layer.down.weight", f"text_encoder.{MLP}", A),
]


@pytest.mark.parametrize("layout, key, layer, part", READ)
def test_names_found_in_files(layout, key, layer, part):
    assert layouts.READERS[layout](key) == (layer, part)
    assert layouts.layout_of([key]) == layout


FOREIGN = [
    "diffusion_model.input_blocks.0.1.proj_in.lora_down.weight",
    "diffusion_model.double_blocks.0.img_attn.proj.lora_up.weight",
    "unet.middle_block.3.proj_in.lora_down.weight",
    "",
    "weight",
    f"{MID}.to_q.weight",
    f"unet.{MID}.to_q.lora_A",
    f"unet.{MID}.to_q.lora_C.weight",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
    "transformer.single_blocks.0.attn.to_q.lora_A.weight",
    "lora_unet_input_blocks_1_1_proj_in.lora_down.weight",
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha",
    "lora_unet_mid_block_attentions_0_proj_in.hada_w1_a",
    "lora_transformer_single_blocks_0_linear1.lora_down.weight",
    "lora_unet_conv_in.lora_down&weight",
    "diffusion_model.out.2.lora_up&weight",
    f"unet.{MID}.processor.to_x_lora.down.weight",
    f"unet.{MID}.to_q.lora.middle.weight",
]


@pytest.mark.parametrize("key", FOREIGN)
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_foreign_keys_are_not_read(layout, key):
    assert layouts.READERS[layout](key) is None


@pytest.mark.parametrize("model", ["1.5", "2.1"])
def test_the_first_names_of_the_unet_are_those_that_diffusers_converts(model):
    """diffusers turns a checkpoint with the first names into its own: each number must end up at the name we say."""
    names = names_of(model)
    checkpoint = {f"model.diffusion_model.{layouts.to_ldm(n)}.weight": torch.tensor(i) for i, n in enumerate(names)}
    with torch.device("meta"):
        config = dict(UNet2DConditionModel(**OPTIONS[model]).config)
    checkpoint |= dict.fromkeys(fixed_names(checkpoint), torch.tensor(-1))
    converted = convert_ldm_unet_checkpoint(checkpoint, config)
    found = {name.removesuffix(".weight"): int(value) for name, value in converted.items() if int(value) >= 0}
    assert found == {name: i for i, name in enumerate(names)}


def fixed_names(checkpoint):
    """The keys that diffusers' conversion reads whatever the model: norms of the end, and biases beside weights."""
    norm = ["model.diffusion_model.out.0.weight", "model.diffusion_model.out.0.bias"]
    return norm + [key.replace(".weight", ".bias") for key in checkpoint]


def test_an_unknown_word_before_lora_is_not_dropped():
    """Only the four projections of an attention layer had "<name>_lora" keys; any other is no key of diffusers."""
    assert layouts.READERS["old"](f"unet.{MID}.to_q.extra_lora.down.weight") is None


# ---- files ----


def random_adapter(layers, seed, dora=False):
    """{layer: (in, out, kernel, rank, alpha, rslora)} as an adapter of random numbers."""
    torch.manual_seed(seed)
    weights = {}
    for name, (inputs, outputs, kernel, rank, alpha, use_rslora) in layers.items():
        size = [] if kernel is None else [kernel, kernel]
        A, B = torch.randn(rank, inputs, *size), torch.randn(outputs, rank, *[1 for _ in size])
        magnitude = torch.randn(outputs) if dora and not size else torch.randn(1, outputs, 1, 1) if dora else None
        weights[name] = LoRAWeights(A, B, alpha, use_rslora, magnitude)
    return Adapter(weights)


def assert_same(one, other):
    """The same layers with the same bits and the same factor in front of them."""
    assert one.layers.keys() == other.layers.keys()
    for name, weights in one.layers.items():
        found = other.layers[name].tensors()
        assert found.keys() == weights.tensors().keys(), name
        assert all(torch.equal(found[part], tensor) for part, tensor in weights.tensors().items()), name


LAYERS = st.sampled_from(sorted(layer_names("1.5") + layer_names("text")))
SIZES = [st.integers(1, 6), st.integers(1, 6), st.sampled_from([None, 1, 3]), st.integers(1, 5)]
ALPHAS = st.floats(-1000, 1000)


@given(
    layers=st.dictionaries(LAYERS, st.tuples(*SIZES, ALPHAS, st.just(False)), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    use_rslora=st.booleans(),
    dora=st.booleans(),
)
@PROPERTY
def test_any_adapter_goes_through_diffusers_layout_unchanged(tmp_path_factory, layers, seed, use_rslora, dora):
    layers = {name: (*sizes[:-1], use_rslora) for name, sizes in layers.items()}
    adapter = random_adapter(layers, seed, dora)
    found = read_adapter(write_adapter(tmp_path_factory.mktemp("file"), adapter))
    assert_same(adapter, found)
    assert found.layout == "diffusers"
    for name, weights in found.layers.items():
        assert (weights.alpha, weights.use_rslora) == (adapter.layers[name].alpha, use_rslora)


@given(
    layers=st.dictionaries(LAYERS, st.tuples(*SIZES, ALPHAS, st.booleans()), min_size=1, max_size=6),
    seed=st.integers(0, 99),
    dora=st.booleans(),
)
@PROPERTY
def test_any_adapter_goes_through_kohyas_layout_up_to_a_float32_alpha(tmp_path_factory, layers, seed, dora):
    adapter = random_adapter(layers, seed, dora)
    found = read_adapter(write_adapter(tmp_path_factory.mktemp("file"), adapter, "kohya"))
    assert_same(adapter, found)
    assert found.layout == "kohya"
    for name, weights in found.layers.items():
        before = adapter.layers[name]
        alpha = before.alpha * math.sqrt(before.rank) if before.use_rslora else before.alpha
        assert weights.alpha == float(str(np.float32(alpha))) and not weights.use_rslora
        assert weights.scaling == pytest.approx(before.scaling, rel=1e-6, abs=1e-40)


@pytest.mark.parametrize("alpha, read", [(0.1, 0.1), (6, 6.0), (1 / 3, 0.33333334), (-2.5, -2.5), (0, 0.0)])
def test_kohyas_alpha_is_the_shortest_number_of_its_float32(tmp_path, alpha, read):
    layers = {f"unet.{MID}.to_q": (3, 4, None, 2, alpha, False), f"text_encoder.{MLP}": (3, 4, None, 2, 7.0, False)}
    path = write_adapter(tmp_path, random_adapter(layers, 0), "kohya")
    with safe_open(path, framework="pt") as file:
        key = layouts.key_of("kohya", f"unet.{MID}.to_q", "alpha")
        assert torch.equal(file.get_tensor(key), torch.tensor(float(alpha), dtype=torch.float32))
        assert len(file.keys()) == 6
        header = file.metadata()
    assert (header["ss_network_module"], header["ss_network_dim"]) == ("networks.lora", "2")
    assert float(header["ss_network_alpha"]) == pytest.approx(alpha, rel=1e-5)
    assert [weights.alpha for weights in read_adapter(path).layers.values()] == [7.0, read]


def test_a_rank_stabilised_adapter_means_the_same_in_kohyas_layout(tmp_path):
    adapter = random_adapter({f"unet.{MID}.to_q": (3, 4, None, 4, 3.0, True)}, 0)
    found = read_adapter(write_adapter(tmp_path, adapter, "kohya")).layers[f"unet.{MID}.to_q"]
    assert (found.alpha, found.use_rslora, found.scaling) == (6.0, False, 1.5)


KINDS = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"magnitude": torch.ones(5)}}


@pytest.mark.parametrize(
    "first, second", [("plain", "rslora"), ("rslora", "plain"), ("plain", "dora"), ("dora", "plain")]
)
def test_layers_of_two_kinds_are_not_mixed_up(tmp_path, first, second):
    """One header has one `use_rslora` and one `use_dora`: the file means the same, or it is not written."""
    kinds = {f"unet.{MID}.to_q": KINDS[first], f"unet.{MID}.to_v": KINDS[second]}
    adapter = Adapter({name: LoRAWeights(torch.randn(4, 3), torch.randn(5, 4), 2.0, **kinds[name]) for name in kinds})
    try:
        path = write_adapter(tmp_path / "new", adapter)
    except AdapterError:
        assert not (tmp_path / "new").exists()
        return
    found = read_adapter(path)
    assert_same(adapter, found)
    assert {n: w.scaling for n, w in found.layers.items()} == {n: w.scaling for n, w in adapter.layers.items()}


@pytest.mark.parametrize("layout", layouts.WRITABLE)
def test_an_adapter_without_layers_is_not_written(tmp_path, layout):
    with pytest.raises(AdapterError):
        write_adapter(tmp_path / "new", Adapter({}), layout)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("layout", ["peft", "old", "webui"])
def test_other_layouts_are_not_written(tmp_path, layout):
    adapter = random_adapter({f"unet.{MID}.to_q": (3, 4, None, 2, 1.0, False)}, 0)
    with pytest.raises(AdapterError, match=f"layouts diffusers and kohya, not '{layout}'"):
        write_adapter(tmp_path / "new", adapter, layout)
    assert not (tmp_path / "new").exists()

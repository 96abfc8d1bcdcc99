"""Adapter files: through diffusers and back, and what is said about files that cannot be used."""

import json
import os

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_unet
from transformers import CLIPTextConfig, CLIPTextModel

from helpers import lora
from helpers.adapters import (
    CONFIG_KEY,
    WEIGHTS_NAME,
    AdapterError,
    adapter_file,
    load_adapter,
    matching,
    save_adapter,
    short_targets,
)

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv_shortcut", "conv"]


def tiny_pipeline():
    torch.manual_seed(1)
    text_config = CLIPTextConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text_config).eval(),
        tokenizer=None,
        unet=tiny_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def output(unet):
    generator = torch.Generator().manual_seed(1)
    latents, states = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([10, 900]), states).sample


def fill_B(unet, std=0.3):
    generator = torch.Generator().manual_seed(2)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, std, generator=generator)


def adapted(targets=ATTENTION + CONVOLUTIONS, **options):
    unet = tiny_unet()
    lora.inject(unet, targets, **({"rank": 4, "alpha": 6.0} | options))
    fill_B(unet)
    return unet.eval()


def header(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(path, change):
    """Save the file again after change(tensors, configuration) has altered both in place."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    config = json.loads(metadata[CONFIG_KEY])
    change(tensors, config)
    save_file(tensors, path, metadata=metadata | {CONFIG_KEY: json.dumps(config)})


# ---- round trip ----


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha": 4.0}, {"rank": 1}, {"dropout": 0.25}])
def test_round_trip(tmp_path, options):
    unet = adapted(**options)
    path = save_adapter(tmp_path / "deep" / "folder", unet, {"seed": 3, "dataset": "doodles"})
    assert path == tmp_path / "deep" / "folder" / WEIGHTS_NAME
    other = tiny_unet()
    random_state = torch.get_rng_state()
    found = load_adapter(tmp_path / "deep" / "folder", other)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(output(other.eval()), output(unet))
    own, loaded = lora.lora_state_dict(unet), lora.lora_state_dict(other)
    assert list(own) == list(loaded) and all(torch.equal(own[key], loaded[key]) for key in own)
    expected = {"rank": 4, "alpha": 6.0, "use_rslora": False, "dropout": 0.0} | options
    expected |= {"targets": sorted(ATTENTION + CONVOLUTIONS), "metadata": {"seed": 3, "dataset": "doodles"}}
    assert found == expected
    trainable = {id(p) for p in other.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in lora.lora_parameters(other)}


def test_a_file_name_is_kept_and_nothing_else_is_left(tmp_path):
    path = save_adapter(tmp_path / "mine.safetensors", adapted())
    assert path == tmp_path / "mine.safetensors" == adapter_file(str(path))
    assert os.listdir(tmp_path) == ["mine.safetensors"]
    assert load_adapter(path, tiny_unet())["metadata"] == {}


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = save_adapter(tmp_path, adapted())
    before = path.read_bytes()

    def broken(tensors, name, metadata):
        name.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr("helpers.adapters.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(tmp_path, adapted())
    assert path.read_bytes() == before and os.listdir(tmp_path) == [WEIGHTS_NAME]


def test_scaled_and_merged_models_are_saved_as_trained(tmp_path):
    unet = adapted()
    before = output(unet)
    with lora.scaled(unet, 0.1):
        lora.merge(unet)
        save_adapter(tmp_path, unet)
    other = tiny_unet()
    load_adapter(tmp_path, other)
    assert torch.equal(output(other), before)


def test_layers_of_different_rank_and_alpha(tmp_path):
    unet = tiny_unet()
    name = "mid_block.attentions.0.transformer_blocks.0.attn1."
    for part, rank, alpha in [("to_q", 2, 3.0), ("to_k", 5, 3.0), ("to_v", 2, 8.0)]:
        lora.wrap(unet, name + part, rank, alpha)
    fill_B(unet)
    save_adapter(tmp_path, unet)
    other = tiny_unet()
    found = load_adapter(tmp_path, other)
    assert (found["rank"], found["alpha"]) == (2, 3.0)
    assert torch.equal(output(other), output(unet))
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(tmp_path)
    assert (output(pipeline.unet) - output(unet)).abs().max() <= 1e-6


@pytest.mark.parametrize(
    "names, targets",
    [
        (["a.to_q", "b.to_q"], ["to_q"]),
        (["a.to_q"], ["a.to_q"]),
        (["a.to_q", "b.to_q", "a.to_out.0", "b.to_out.0"], ["to_out.0", "to_q"]),
        (["top"], r"top"),  # the ending "top" would take b.top too
        (["top", "a.to_q"], r"a\.to_q|top"),
    ],
)
def test_short_targets_select_the_names_and_no_others(names, targets):
    def block():
        return torch.nn.ModuleDict({"to_q": torch.nn.Linear(1, 1), "to_out": torch.nn.ModuleList([torch.nn.ReLU()])})

    model = torch.nn.ModuleDict({"a": block(), "b": block(), "top": torch.nn.Linear(1, 1)})
    model["b"]["top"] = torch.nn.Linear(1, 1)
    assert short_targets(model, names) == targets
    assert sorted(matching([name for name, _ in model.named_modules()], targets)) == sorted(names)


# ---- with diffusers ----


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha": 4.0}])
def test_diffusers_loads_our_file_to_the_same_outputs(tmp_path, options):
    unet = adapted(**options)
    save_adapter(tmp_path, unet, {"seed": 3})
    pipeline = tiny_pipeline()
    assert (output(pipeline.unet) - output(unet)).abs().max() > 1e-2, "the adapter must matter"
    pipeline.load_lora_weights(tmp_path)
    assert (output(pipeline.unet) - output(unet)).abs().max() <= 1e-6


def test_diffusers_draws_the_same_latents_with_our_file(tmp_path):
    save_adapter(tmp_path, adapted())
    generator = torch.Generator().manual_seed(4)
    states, empty = torch.randn(2, 1, 5, 8, generator=generator)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    arguments = {"prompt_embeds": states, "negative_prompt_embeds": empty, "latents": latents, "output_type": "latent"}
    pictures = []
    for load in (lambda p: p.load_lora_weights(tmp_path), lambda p: load_adapter(tmp_path, p.unet), lambda p: None):
        pipeline = tiny_pipeline()
        load(pipeline)
        pictures.append(pipeline(num_inference_steps=4, guidance_scale=3.0, **arguments).images)
    theirs, ours, base = pictures
    assert (ours - theirs).abs().max() <= 1e-6 and (ours - base).abs().max() > 1e-2


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_alpha": 3}, {"alpha_pattern": {"to_q": 9}}])
def test_we_load_what_diffusers_saved(tmp_path, options):
    unet = tiny_unet()
    targets = ATTENTION + CONVOLUTIONS
    unet.add_adapter(LoraConfig(**({"r": 3, "lora_alpha": 7, "target_modules": targets} | options)))
    fill_B(unet)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    other = tiny_unet()
    found = load_adapter(tmp_path, other)
    assert (output(other) - output(unet)).abs().max() <= 1e-6
    assert found["rank"] == 3 and sorted(found["targets"]) == sorted(targets) and found["metadata"] == {}


def test_our_header_has_the_layout_that_diffusers_writes(tmp_path):
    ours = json.loads(header(save_adapter(tmp_path / "ours", adapted()))[CONFIG_KEY])
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=4, lora_alpha=6.0, target_modules=sorted(ATTENTION + CONVOLUTIONS)))
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "theirs",
        unet_lora_layers=get_peft_model_state_dict(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    metadata = header(tmp_path / "theirs" / WEIGHTS_NAME)
    theirs = json.loads(metadata[CONFIG_KEY])
    theirs["unet.target_modules"].sort()
    assert metadata["format"] == "pt"
    assert {key: theirs[key] for key in ours} == ours


def test_without_a_configuration_alpha_is_the_rank_as_in_diffusers(tmp_path):
    tensors = {f"unet.{key}": value for key, value in lora.lora_state_dict(adapted()).items()}
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    unet, pipeline = tiny_unet(), tiny_pipeline()
    found = load_adapter(tmp_path, unet)
    pipeline.load_lora_weights(tmp_path)
    assert (found["rank"], found["alpha"], found["targets"]) == (4, 4, sorted(ATTENTION + CONVOLUTIONS))
    assert (output(unet) - output(pipeline.unet)).abs().max() <= 1e-6


def test_a_half_file_is_loaded_as_float32(tmp_path):
    path = save_adapter(tmp_path, adapted())
    rewrite(path, lambda tensors, _: tensors.update({key: value.half() for key, value in tensors.items()}))
    unet = tiny_unet()
    load_adapter(path, unet)
    assert {p.dtype for p in lora.lora_parameters(unet)} == {torch.float32}


# ---- files that cannot be used ----

NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
A, B = f"{NAME}.lora_A.weight", f"{NAME}.lora_B.weight"


def drop(*keys):
    return lambda tensors, config: [tensors.pop(key) for key in keys]


def put(key, value):
    return lambda tensors, config: tensors.update({key: value})


def setting(key, value):
    return lambda tensors, config: config.update({key: value})


FAULTS = {
    "no A": (drop(A), f"missing key '{A}'"),
    "no B": (drop(B), f"missing key '{B}'"),
    "a layer of the targets is absent": (drop(A, B), f"missing key '{A}'"),
    "a layer that is not there": (put("unet.nowhere.lora_A.weight", torch.ones(4, 8)), "unexpected key 'unet.nowhere."),
    "a module that is no layer": (put("unet.mid_block.lora_A.weight", torch.ones(4, 8)), "unexpected key 'unet.mid_"),
    "text encoder": (put("text_encoder.q.lora_A.weight", torch.ones(1)), "unexpected key 'text_encoder.q.lora_A"),
    "DoRA magnitude": (put(f"{NAME}.lora_magnitude_vector", torch.ones(8)), "unexpected key .*lora_magnitude_vector"),
    "A too wide": (put(A, torch.ones(4, 9)), f"'{A}' has shape .4, 9., this U-Net needs"),
    "B of another rank": (put(B, torch.ones(16, 5)), f"'{B}' has shape .16, 5., this U-Net needs .16, 4."),
    "A without rows": (put(A, torch.ones(0, 16)), f"'{A}' has shape .0, 16."),
    "A without dimensions": (put(A, torch.tensor(1.0)), f"'{A}' has shape .., this U-Net needs"),
    "NaN": (put(B, torch.full((16, 4), torch.nan)), f"'{B}' holds values that are not finite"),
    "integers": (put(B, torch.ones(16, 4, dtype=torch.int64)), f"'{B}' holds values that are not finite floating"),
    "no tensors": (lambda tensors, config: tensors.clear(), "holds no tensors"),
    "DoRA": (setting("unet.use_dora", True), "DoRA"),
    "alpha is text": (setting("unet.lora_alpha", "8"), "'unet.lora_alpha' makes no sense: '8'"),
    "alpha is infinite": (setting("unet.lora_alpha", float("inf")), "'unet.lora_alpha' makes no sense"),
    "alpha pattern is no pattern": (setting("unet.alpha_pattern", {"(": 1}), "'unet.alpha_pattern' makes no sense"),
    "dropout of 1": (setting("unet.lora_dropout", 1), "'unet.lora_dropout' makes no sense: 1"),
    "rsLoRA is text": (setting("unet.use_rslora", "yes"), "'unet.use_rslora' makes no sense: 'yes'"),
    "targets are numbers": (setting("unet.target_modules", [1]), "'unet.target_modules' makes no sense"),
}


def untouched(unet, modules, before):
    """Whether a U-Net is still made of these modules, all trainable, with this output."""
    same = {name: id(module) for name, module in unet.named_modules()} == modules
    return same and all(p.requires_grad for p in unet.parameters()) and torch.equal(output(unet), before)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_does_not_fit_is_refused(tmp_path, fault):
    change, message = FAULTS[fault]
    path = save_adapter(tmp_path, adapted())
    rewrite(path, change)
    unet = tiny_unet()
    modules, before = {name: id(module) for name, module in unet.named_modules()}, output(unet)
    random_state = torch.get_rng_state()
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(path, unet)
    assert str(path) in str(caught.value)
    assert untouched(unet, modules, before) and torch.equal(torch.get_rng_state(), random_state)


def test_an_adapter_of_another_base_model_is_refused(tmp_path):
    save_adapter(tmp_path, adapted())
    unet = tiny_unet(width=12)
    modules, before = {name: id(module) for name, module in unet.named_modules()}, output(unet)
    with pytest.raises(AdapterError, match="has shape .* Is the adapter for this base model"):
        load_adapter(tmp_path, unet)
    assert untouched(unet, modules, before)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04K\x01.", b"\xff" * 64, b"{}", None],
    ids=["empty", "pickle", "absurd header length", "text", "truncated"],
)
def test_a_damaged_file_is_refused(tmp_path, content):
    path = save_adapter(tmp_path, adapted())
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    unet = tiny_unet()
    with pytest.raises(AdapterError, match="not a readable safetensors file"):
        load_adapter(path, unet)
    assert not lora.lora_layers(unet)


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 100_000])
def test_a_header_that_is_not_a_json_object_is_refused(tmp_path, text):
    path = save_adapter(tmp_path, adapted())
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    save_file(tensors, path, metadata={CONFIG_KEY: text})
    with pytest.raises(AdapterError, match=f"{CONFIG_KEY}.* is not"):
        load_adapter(path, tiny_unet())


def test_a_missing_file_and_an_adapted_unet_are_refused(tmp_path):
    with pytest.raises(AdapterError, match="there is no such adapter file"):
        load_adapter(tmp_path / "nowhere", tiny_unet())
    unet = adapted()
    save_adapter(tmp_path, unet)
    with pytest.raises(AdapterError, match="already has LoRA layers"):
        load_adapter(tmp_path, unet)
    with pytest.raises(AdapterError, match="no LoRA layers to save"):
        save_adapter(tmp_path, tiny_unet())

"""Adapter files: through diffusers and back, and what is said about files that cannot be used."""

import json
import os

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_text_encoder, tiny_unet

from helpers import lora
from helpers.adapters import layouts
from helpers.adapters.configuration import CONFIG_KEY, AdapterError
from helpers.adapters.loading import load_adapter, put_into
from helpers.adapters.reading import WEIGHTS_NAME, adapter_file, read_adapter
from helpers.adapters.writing import save_adapter, short_targets

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv_shortcut", "conv"]


def tiny_pipeline():
    torch.manual_seed(1)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=tiny_text_encoder(),
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
    expected |= {"layout": "diffusers", "notes": ()}
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

    monkeypatch.setattr("helpers.adapters.writing.save_file", broken)
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
    assert sorted(name for name, _ in model.named_modules() if lora.selects(targets, name)) == sorted(names)


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


# ---- other layouts, and the text encoder ----


def adapted_text_encoder():
    encoder = tiny_text_encoder()
    lora.inject(encoder, ["q_proj", "out_proj", "fc1"], rank=2, alpha=3.0)
    fill_B(encoder)
    return encoder


def states(encoder):
    with torch.no_grad():
        return encoder(torch.tensor([[1, 5, 9, 2]])).last_hidden_state


def write_as(layout, folder, unet=None, text_encoder=None, config=None):
    """Write the adapter as other software does: in PEFT's folder, or as diffusers did before it used PEFT."""
    if layout in layouts.WRITABLE:
        return save_adapter(folder, unet, text_encoder=text_encoder, layout=layout)
    tensors = {
        layouts.key_of(layout, layouts.layer_of(component, name), part): p.detach()
        for component, model in (("unet", unet), ("text_encoder", text_encoder))
        for name, layer in (lora.lora_layers(model).items() if model else ())
        for part, p in layer.parameters_by_name().items()
    }
    folder.mkdir()
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / ("adapter_model.safetensors" if layout == "peft" else WEIGHTS_NAME))
    return folder


@pytest.mark.parametrize("layout", [name for name in layouts.LAYOUTS if name != "ldm"])  # see test_foreign_files.py
def test_every_layout_loads_to_the_same_outputs(tmp_path, layout):
    unet, encoder = adapted(alpha=4.0), adapted_text_encoder()
    if layout in ("peft", "old"):  # their files do not say alpha; the rank stands for it
        for layer in lora.lora_layers(encoder).values():
            layer.alpha, layer.scaling = 2, 1.0
    path = write_as(layout, tmp_path / "new", unet, encoder)
    other, other_encoder = tiny_unet(), tiny_text_encoder()
    found = load_adapter(path, other, other_encoder)
    assert torch.equal(output(other), output(unet)) and torch.equal(states(other_encoder), states(encoder))
    assert not torch.allclose(states(encoder), states(tiny_text_encoder()), atol=1e-3)
    assert (found["layout"], found["rank"], found["alpha"]) == (layout, 4, 4.0)
    assert found["targets"] == sorted(ATTENTION + CONVOLUTIONS)
    for model in (other, other_encoder):
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in lora.lora_parameters(model)}


@pytest.mark.parametrize("layout", layouts.WRITABLE)
def test_a_text_encoder_alone(tmp_path, layout):
    encoder, other, unet = adapted_text_encoder(), tiny_text_encoder(), tiny_unet()
    save_adapter(tmp_path, text_encoder=encoder, layout=layout)
    found = load_adapter(tmp_path, unet, other)
    assert torch.equal(states(other), states(encoder)) and not lora.lora_layers(unet)
    assert (found["rank"], found["alpha"], found["targets"]) == (2, 3.0, ["fc1", "out_proj", "q_proj"])
    assert torch.equal(output(unet), output(tiny_unet()))


def test_a_folder_of_peft_says_alpha_in_its_own_file(tmp_path):
    unet = adapted(alpha=9.0, use_rslora=True)
    config = {"r": 4, "lora_alpha": 9.0, "use_rslora": True, "lora_dropout": 0.1, "target_modules": ATTENTION}
    found = load_adapter(write_as("peft", tmp_path / "new", unet, config=config), tiny_unet())
    assert (found["alpha"], found["use_rslora"], found["dropout"]) == (9.0, True, 0.1)
    assert found["targets"] == ATTENTION and found["layout"] == "peft"
    other = tiny_unet()
    load_adapter(tmp_path / "new", other)
    assert torch.equal(output(other.eval()), output(unet))


def test_a_model_for_each_component_of_the_file(tmp_path):
    save_adapter(tmp_path, adapted(), text_encoder=adapted_text_encoder())
    unet, encoder = tiny_unet(), tiny_text_encoder()
    before = output(unet), states(encoder)
    for given, absent in ({"unet": unet}, "text_encoder"), ({"text_encoder": encoder}, "unet"), ({}, "unet"):
        with pytest.raises(AdapterError, match=f"has layers of the {absent}: give load_adapter its {absent} too"):
            load_adapter(tmp_path, **given)
    assert not lora.lora_layers(unet) and not lora.lora_layers(encoder)
    assert all(p.requires_grad for model in (unet, encoder) for p in model.parameters())
    assert torch.equal(output(unet), before[0]) and torch.equal(states(encoder), before[1])


def test_a_text_encoder_that_does_not_fit_leaves_the_unet_alone(tmp_path):
    save_adapter(tmp_path, adapted(), text_encoder=adapted_text_encoder())
    unet, encoder = tiny_unet(), tiny_text_encoder(layers=1)
    modules, before = {name: id(module) for name, module in unet.named_modules()}, output(unet)
    with pytest.raises(AdapterError, match="unexpected key 'text_encoder.text_model.encoder.layers.1.*lora_A"):
        load_adapter(tmp_path, unet, encoder)
    assert untouched(unet, modules, before) and not lora.lora_layers(encoder)


def test_reading_needs_no_model_and_putting_in_no_file(tmp_path):
    unet = adapted()
    adapter = read_adapter(save_adapter(tmp_path, unet, {"seed": 3}))
    names = list(lora.lora_layers(unet))
    assert sorted(adapter.layers) == sorted(f"unet.{name}" for name in names)
    assert sorted(adapter.of("unet")) == sorted(names) and adapter.of("text_encoder") == {}
    assert (adapter.targets, adapter.metadata) == ({"unet": sorted(ATTENTION + CONVOLUTIONS)}, {"seed": 3})
    other = tiny_unet()
    put_into(adapter, other)
    assert torch.equal(output(other), output(unet))
    with pytest.raises(AdapterError, match="^mine: the unet already has LoRA layers"):
        put_into(adapter, other, what="mine")


# ---- what the caller expects ----


def test_an_adapter_for_another_prediction_is_refused(tmp_path):
    path = save_adapter(tmp_path, adapted(), {"prediction_type": "epsilon", "seed": 3})
    unet = tiny_unet()
    modules, before = {name: id(module) for name, module in unet.named_modules()}, output(unet)
    message = "trained with prediction_type 'epsilon', this model has 'v_prediction'. Load the base model"
    with pytest.raises(AdapterError, match=message) as caught:
        load_adapter(path, unet, expect={"seed": 3, "prediction_type": "v_prediction"})
    assert str(path) in str(caught.value) and untouched(unet, modules, before)
    load_adapter(path, unet, expect={"seed": 3, "prediction_type": "epsilon", "resolution": 512})
    assert lora.lora_layers(unet), "what the file does not say cannot contradict"


# ---- files that cannot be used ----

NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
A, B = f"{NAME}.lora_A.weight", f"{NAME}.lora_B.weight"


def drop(*keys):
    return lambda tensors, config: [tensors.pop(key) for key in keys]


def put(key, value):
    return lambda tensors, config: tensors.update({key: value})


def put_layer(layer):
    return lambda tensors, config: tensors.update(
        {f"{layer}.lora_A.weight": torch.ones(4, 8), f"{layer}.lora_B.weight": torch.ones(8, 4)}
    )


def setting(key, value):
    return lambda tensors, config: config.update({key: value})


FAULTS = {
    "no A": (drop(A), f"missing key '{A}'"),
    "no B": (drop(B), f"missing key '{B}'"),
    "a layer of the targets is absent": (drop(A, B), f"missing key '{A}'"),
    "half a layer that is not there": (
        put("unet.nowhere.lora_A.weight", torch.ones(4, 8)),
        "missing key 'unet.nowhere.lora_B.weight'",
    ),
    "a layer that is not there": (put_layer("unet.nowhere"), "unexpected key 'unet.nowhere.lora_A.weight'"),
    "a module that is no layer": (put_layer("unet.mid_block"), "unexpected key 'unet.mid_block.lora_A.weight'"),
    "half a text encoder": (
        put("text_encoder.q.lora_A.weight", torch.ones(1, 4)),
        "missing key 'text_encoder.*q.lora_B",
    ),
    "text encoder": (put_layer("text_encoder.q"), "layers of the text_encoder: give load_adapter its text_encoder too"),
    "DoRA magnitude": (
        put(f"{NAME}.lora_magnitude_vector", torch.ones(8)),
        f"'{NAME}.lora_magnitude_vector' has shape .8., this model needs .16.",
    ),
    "A too wide": (put(A, torch.ones(4, 9)), f"'{A}' has shape .4, 9., this model needs .4, 16."),
    "B of another rank": (put(B, torch.ones(16, 5)), f"'{A}' has rank 4 and '{B}' rank 5"),
    "A without rows": (put(A, torch.ones(0, 16)), f"'{A}' has shape .0, 16."),
    "A without dimensions": (put(A, torch.tensor(1.0)), f"'{A}' has shape .., and needs 2 or 4 dimensions"),
    "NaN": (put(B, torch.full((16, 4), torch.nan)), f"'{B}' holds values that are not finite"),
    "integers": (put(B, torch.ones(16, 4, dtype=torch.int64)), f"'{B}' is stored as int64"),
    "no tensors": (lambda tensors, config: tensors.clear(), "holds no tensors"),
    "DoRA without magnitudes": (
        setting("unet.use_dora", True),
        "missing key 'unet.*lora_magnitude_vector': the header says that this is DoRA",
    ),
    "DoRA is text": (setting("unet.use_dora", "yes"), "'unet.use_dora' makes no sense: 'yes'"),
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

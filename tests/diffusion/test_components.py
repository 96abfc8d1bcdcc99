"""Loading a model from a folder, prompts to embeddings, pictures to latents and back."""

import dataclasses
import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import lora
from helpers.diffusion import components as c
from helpers.diffusion import pictures as convert
from helpers.diffusion import text
from helpers.diffusion.sampling import sampling_batch
from helpers.minisd import architecture
from helpers.presets.variants import get_preset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny MiniSD: U-Net and VAE fp16, text encoder fp32."""
    path = tmp_path_factory.mktemp("model") / "weights"
    architecture.save(architecture.build_tiny(seed=1), path)
    return path


@pytest.fixture
def preset(folder):
    return get_preset("mini", model=str(folder), resolution=architecture.TINY.picture)


def copy(folder, target):
    import shutil

    shutil.copytree(folder, target)
    return target


def test_loads_float32_frozen_and_in_evaluation_mode(preset, folder):
    assert load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == torch.float16
    parts = c.load_components(preset, "cpu")
    for module in (parts.unet, parts.vae, parts.text_encoder):
        assert not module.training
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in module.parameters())
    assert (parts.title, parts.prediction_type, parts.latent_shape) == (
        "MiniSD",
        "v_prediction",
        (architecture.TINY.latent_channels, 4, 4),
    )
    assert parts.device == torch.device("cpu")


def test_weights_are_those_of_the_file(preset, folder):
    parts = c.load_components(preset, "cpu")
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, stored[name].float()) for name, value in parts.unet.state_dict().items())
    written = architecture.build_tiny(seed=1)["text_encoder"].state_dict()
    assert all(torch.equal(value, written[name]) for name, value in parts.text_encoder.state_dict().items())


def test_noise_scheduler_has_the_schedule_of_the_folder(preset):
    scheduler = c.load_components(preset, "cpu").noise_scheduler
    expected = architecture.build_scheduler().alphas_cumprod
    assert torch.equal(scheduler.alphas_cumprod, expected)
    assert scheduler.config.clip_sample is False


def test_a_pndm_configuration_as_of_stable_diffusion_is_understood(tmp_path):
    from diffusers import PNDMScheduler

    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    ).save_pretrained(tmp_path)
    scheduler = c.read_noise_scheduler(tmp_path)
    assert torch.equal(scheduler.alphas_cumprod, architecture.build_scheduler().alphas_cumprod)
    assert scheduler.config.prediction_type == "epsilon"


def test_text_encoder_files_of_both_transformers_generations(preset, folder, tmp_path):
    other = copy(folder, tmp_path / "weights")
    file = other / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    prefixed = any(name.startswith("text_model.") for name in tensors)
    renamed = {name.removeprefix("text_model.") if prefixed else f"text_model.{name}": v for name, v in tensors.items()}
    save_file(renamed, file, metadata={"format": "pt"})
    here = c.load_components(preset, "cpu")
    there = c.load_components(dataclasses.replace(preset, model=str(other)), "cpu")
    assert torch.equal(text.encode_prompts(here, ["a cat"]), text.encode_prompts(there, ["a cat"]))


def test_loading_prints_nothing(preset, capfd):
    c.load_components(preset, "cpu")
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_missing_folder_and_missing_part_are_named(preset, folder, tmp_path):
    with pytest.raises(c.ComponentsError, match="no model in .*nowhere"):
        c.load_components(dataclasses.replace(preset, model=str(tmp_path / "nowhere")))
    other = copy(folder, tmp_path / "weights")
    (other / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(c.ComponentsError, match="cannot read the vae"):
        c.load_components(dataclasses.replace(preset, model=str(other)))


def test_a_damaged_part_is_named(preset, folder, tmp_path):
    other = copy(folder, tmp_path / "weights")
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(c.ComponentsError, match="cannot read the unet"):
        c.load_components(dataclasses.replace(preset, model=str(other)))


def test_a_text_encoder_without_all_its_weights_is_refused(preset, folder, tmp_path):
    other = copy(folder, tmp_path / "weights")
    file = other / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if name.endswith("final_layer_norm.weight"))
    save_file({name: v for name, v in tensors.items() if name != lost}, file, metadata={"format": "pt"})
    with pytest.raises(c.ComponentsError, match="final_layer_norm.weight"):
        c.load_components(dataclasses.replace(preset, model=str(other)))


def test_another_prediction_type_than_the_preset_says_is_refused(preset):
    with pytest.raises(c.ComponentsError, match="v_prediction.*epsilon"):
        c.load_components(dataclasses.replace(preset, prediction_type="epsilon"))


def test_only_safetensors_are_downloaded():
    files = [pattern for pattern in c.HUB_FILES if not pattern.endswith(".json")]
    assert all(pattern.endswith(".safetensors") or pattern == "tokenizer/*" for pattern in files)


def test_prompts_are_padded_to_the_text_encoders_positions(tiny):
    states = text.encode_prompts(tiny, ["", "a cat", "a portrait of a cat"])
    assert states.shape == (3, 24, 16)
    assert not torch.equal(states[1], states[2])
    assert not states.requires_grad
    with pytest.raises(ValueError, match="no prompts"):
        text.encode_prompts(tiny, [])


def test_embeddings_do_not_depend_on_the_chunking(tiny):
    prompts = [f"a cat with {i} scarfs" for i in range(c.CHUNK + 3)]
    one_by_one = torch.cat([text.encode_prompts(tiny, [prompt]) for prompt in prompts])
    assert torch.allclose(text.encode_prompts(tiny, prompts), one_by_one, atol=1e-5)


def test_long_prompts_are_cut_and_counted(tiny):
    long = "a red scarf and " * 20
    with pytest.warns(UserWarning, match="2 of 3 prompts are longer than 24 tokens"):
        ids = text.tokenize(tiny, ["a cat", long, long])
    assert ids.shape == (3, 24)
    assert ids[1, -1] == tiny.tokenizer.eos_token_id
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.tokenize(tiny, ["a cat"])


def test_padding_of_stable_diffusion_2_is_token_0(tiny):
    tiny.tokenizer.pad_token = tiny.tokenizer.eos_token
    parts = {"tokenizer": tiny.tokenizer, "text_encoder": tiny.text_encoder}
    c.use_padding_of_stable_diffusion_2(parts)
    assert tiny.tokenizer.pad_token_id == tiny.tokenizer.eos_token_id  # a text encoder of another size: as configured
    tiny.text_encoder.config.hidden_size = 1024
    c.use_padding_of_stable_diffusion_2(parts)
    assert tiny.tokenizer.pad_token_id == 0


def test_latents_are_the_scaled_posterior(tiny):
    pictures = torch.rand(2, 3, tiny.resolution, tiny.resolution) * 2 - 1
    mean, std = convert.to_latents(tiny, pictures)
    posterior = tiny.vae.encode(pictures).latent_dist
    assert mean.shape == std.shape == (2, *tiny.latent_shape)
    assert torch.allclose(mean, posterior.mean * 4.0)  # tiny.py's scaling factor
    assert torch.allclose(std, posterior.std * 4.0)


def test_pictures_are_decoded_as_the_vae_does_and_clamped(tiny):
    latents = torch.randn(c.CHUNK + 1, *tiny.latent_shape)
    decoded = convert.to_pictures(tiny, latents)
    expected = (tiny.vae.decode(latents / 4.0).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(decoded, expected, atol=1e-5)
    assert 0 <= decoded.min() and decoded.max() <= 1
    first = convert.to_pil(decoded)[0]
    assert (first.mode, first.size) == ("RGB", (tiny.resolution, tiny.resolution))


def test_to_pil_rounds():
    pixels = torch.tensor([0.0, 0.5, 1.0, 0.999]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert [p[0] for p in convert.to_pil(pixels)[0].get_flattened_data()] == [0, 128, 255, 255]


def test_the_pipeline_shares_the_modules(tiny, capfd):
    pipeline = c.as_pipeline(tiny)
    assert capfd.readouterr().err == ""
    assert pipeline.unet is tiny.unet and pipeline.vae is tiny.vae and pipeline.text_encoder is tiny.text_encoder
    assert pipeline.safety_checker is None
    assert (pipeline.scheduler.config.set_alpha_to_one, pipeline.scheduler.config.steps_offset) == (False, 1)


def test_in_float32_and_back_each_weight_has_its_own_bits(tiny):
    unet = tiny.unet.bfloat16()
    lora.inject(unet, ["to_q"], 2, 2.0)
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    assert {p.dtype for p in before.values()} == {torch.bfloat16, torch.float32}
    with c.in_float32(unet):
        assert {p.dtype for p in unet.parameters()} == {torch.float32}
    after = dict(unet.named_parameters())
    assert all(after[name].dtype == p.dtype and torch.equal(after[name], p) for name, p in before.items())


def test_the_saved_folder_is_what_plain_diffusers_reads(folder):
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_a_resolution_that_the_vae_cannot_halve_is_refused(tiny):
    with pytest.raises(c.ComponentsError, match="18 is no multiple of 8"):
        dataclasses.replace(tiny, resolution=18)
    assert dataclasses.replace(tiny, resolution=64).latent_shape == (architecture.TINY.latent_channels, 8, 8)


def test_stable_diffusion_is_called_by_its_repository(tiny):
    assert dataclasses.replace(tiny, name="a/b", is_minisd=False).title == "a/b"


@pytest.mark.parametrize(("resolution", "pictures", "prompts"), [(16, 16, 16), (512, 2, 4), (768, 1, 1)])
def test_large_pictures_go_through_the_vae_and_the_unet_a_few_at_a_time(tiny, resolution, pictures, prompts):
    """At 512 pixels Stable Diffusion's VAE takes over a GB for each; its latents are an eighth as wide."""
    large = dataclasses.replace(tiny, resolution=resolution)
    assert convert.vae_chunk(large) == pictures
    vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=[1, 1, 1, 1]))
    assert sampling_batch(dataclasses.replace(tiny, vae=vae, resolution=resolution)) == prompts


def test_the_noise_schedule_lies_where_the_model_is(preset):
    components = c.load_components(preset, "cpu")
    assert components.noise_scheduler.alphas_cumprod.device == components.device

"""Files as other tools leave them: written by diffusers, PEFT and safetensors, then stored as trainers store them."""

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import tiny_sd15_unet, tiny_text_encoder

from helpers import lora
from helpers.adapters import layouts
from helpers.adapters.cards import inspect
from helpers.adapters.configuration import AdapterError
from helpers.adapters.loading import load_adapter
from helpers.adapters.reading import read_adapter
from helpers.adapters.writing import save_adapter

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
TARGETS = ["to_q", "conv1", "proj_in"]


def by_peft(**options):
    """A U-Net with an adapter of PEFT's that says something."""
    unet = tiny_sd15_unet(layers_per_block=2)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS, **options))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return unet.requires_grad_(False)


def output(unet):
    generator = torch.Generator().manual_seed(1)
    latents, states = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 5, 8, generator=generator)
    with torch.no_grad():
        return unet.eval()(latents, torch.tensor([500]), states).sample


def save(path, tensors):
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    return path


def prefixed(tensors, prefix="unet."):
    return {prefix + key: value for key, value in tensors.items()}


def in_kohya(tensors):
    """diffusers' keys as kohya has them: "." becomes "_", and the halves are called down and up."""
    sides = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    parts = {key: next(part for part in sides if key.endswith(part)) for key in tensors}
    names = {key: key.removesuffix("." + part).replace(".", "_") for key, part in parts.items()}
    return {f"lora_unet_{names[key]}.{sides[part]}": tensors[key] for key, part in parts.items()}


@pytest.fixture(scope="module")
def theirs():
    return by_peft()


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_float8_is_read_as_the_numbers_that_it_stands_for(tmp_path, theirs, layout, dtype):
    tensors = get_peft_model_state_dict(theirs)
    tensors = in_kohya(tensors) if layout == "kohya" else prefixed(tensors)
    path = save(tmp_path / "small.safetensors", {key: value.to(dtype) for key, value in tensors.items()})
    found = read_adapter(path)
    stored = sorted(value.to(dtype).float().flatten().sum().item() for value in tensors.values())
    ours = sorted(t.flatten().sum().item() for weights in found.layers.values() for t in weights.tensors().values())
    assert ours == stored and all(weights.A.dtype == torch.float32 for weights in found.layers.values())
    (note,) = found.notes
    assert str(dtype).removeprefix("torch.") in note and note in str(inspect(path))
    other = tiny_sd15_unet(layers_per_block=2)
    load_adapter(path, other)
    assert not torch.allclose(output(other), output(tiny_sd15_unet(layers_per_block=2)), atol=1e-3)


def test_float8_that_is_not_a_number_is_named(tmp_path, theirs):
    tensors = prefixed(get_peft_model_state_dict(theirs))
    key = next(iter(tensors))
    tensors[key] = torch.full_like(tensors[key], torch.nan).to(torch.float8_e4m3fn)
    with pytest.raises(AdapterError, match="not finite"):
        read_adapter(save(tmp_path / "x.safetensors", tensors))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool], ids=str)
def test_numbers_of_another_kind_are_named(tmp_path, theirs, dtype):
    tensors = prefixed(get_peft_model_state_dict(theirs))
    key = next(iter(tensors))
    path = save(tmp_path / "x.safetensors", tensors | {key: tensors[key].to(dtype)})
    with pytest.raises(AdapterError, match=f"stored as {str(dtype).removeprefix('torch.')}"):
        read_adapter(path)


EMBEDDINGS = {
    "bundle_emb.my_style.emb_params": torch.randn(2, 8),
    "bundle_emb.someone.string_to_param.*": torch.randn(1, 8),
}


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_an_embedding_in_the_file_is_left_out_and_named(tmp_path, theirs, layout):
    tensors = get_peft_model_state_dict(theirs)
    tensors = in_kohya(tensors) if layout == "kohya" else prefixed(tensors)
    found = read_adapter(save(tmp_path / "x.safetensors", tensors | EMBEDDINGS))
    assert len(found.layers) == len(tensors) // 2 and found.layout == layout
    (note,) = found.notes
    assert "'my_style', 'someone'" in note and "left out" in note


def test_embeddings_alone_are_no_adapter(tmp_path):
    with pytest.raises(AdapterError, match="textual inversion"):
        read_adapter(save(tmp_path / "x.safetensors", EMBEDDINGS))
    for key in ("emb_params", "clip_l"):
        with pytest.raises(AdapterError, match=f"'{key}'.*textual inversion"):
            read_adapter(save(tmp_path / "x.safetensors", {key: torch.randn(2, 8)}))


def test_a_whole_model_is_named_as_one(tmp_path):
    with pytest.raises(AdapterError, match="whole model"):
        read_adapter(save(tmp_path / "x.safetensors", {"model.diffusion_model.out.2.weight": torch.randn(2, 8)}))


@pytest.mark.parametrize("dora", [False, True])
def test_the_models_own_state_dict_is_read(tmp_path, dora):
    """People save `unet.state_dict()`, in which PEFT's keys carry the adapter's name."""
    unet = by_peft(use_dora=dora)
    tensors = {key: value for key, value in unet.state_dict().items() if "lora_" in key}
    assert any(".default" in key for key in tensors)
    other = tiny_sd15_unet(layers_per_block=2)
    load_adapter(save(tmp_path / "x.safetensors", prefixed(tensors)), other)
    assert torch.allclose(output(other), output(unet), atol=1e-5)


@pytest.mark.parametrize("prefix", ["diffusion_model.", "unet."])
def test_comfyuis_and_onetrainers_names_are_read(tmp_path, theirs, prefix):
    sides = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    tensors = {}
    for key, value in get_peft_model_state_dict(theirs).items():
        name, _, part = key.rpartition(".lora_")
        tensors[f"{prefix}{layouts.to_ldm(name)}.{sides['lora_' + part]}"] = value
    assert any("middle_block.1." in key for key in tensors)
    other = tiny_sd15_unet(layers_per_block=2)
    found = load_adapter(save(tmp_path / "x.safetensors", tensors), other)
    assert found["layout"] == "ldm" and torch.allclose(output(other), output(theirs), atol=1e-5)


@pytest.mark.parametrize("prefix", ["clip_l", "text_encoders.clip_l.transformer"])
def test_their_text_encoder_is_read_too(tmp_path, prefix):
    encoder, other = tiny_text_encoder(), tiny_text_encoder()
    lora.inject(encoder, ["q_proj", "fc1"], 2, 2)
    for parameter in lora.lora_parameters(encoder):
        torch.nn.init.normal_(parameter, std=0.3)
    tensors = {}
    for key, value in load_file(save_adapter(tmp_path / "ours", text_encoder=encoder)).items():
        name, _, part = key.removeprefix("text_encoder").rpartition(".lora_")
        tensors[f"{prefix}{name}.lora_{ {'A': 'down', 'B': 'up'}[part[0]] }.weight"] = value
    load_adapter(save(tmp_path / "x.safetensors", tensors), text_encoder=other)
    ids = torch.arange(8)[None]
    assert torch.equal(other(ids).last_hidden_state, encoder(ids).last_hidden_state)

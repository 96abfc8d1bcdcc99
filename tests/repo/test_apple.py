"""An Apple GPU has no float64: training, validation, sampling and measuring on a device that refuses it.

The device is pretended (see apple.py), so nothing here needs a Mac. What is computed must also be what a CPU computes.
"""

import ast

import pytest
import torch
from apple import MPS, AppleTensor, apple
from tiny import tiny_minisd
from training_tools import make_preset, quiet, weights

from helpers import lora
from helpers.base.paths import ROOT
from helpers.diffusion.sampling import generate, image_to_image, initial_latents, sample
from helpers.evaluation.distances import copy_share, diversity, mmd, mmd_interval, nearest
from helpers.evaluation.measures import adapted, random_adapter
from helpers.lora import lowrank
from helpers.training.validation import loss_by_timestep


def on(device, components):
    """The model on a device, as `load_components` puts it there."""
    for part in ("text_encoder", "vae", "unet"):
        getattr(components, part).to(device).requires_grad_(False)
    components.noise_scheduler.alphas_cumprod = components.noise_scheduler.alphas_cumprod.to(device)
    return components


@pytest.fixture
def mac():
    """A small model on a pretended Apple GPU."""
    with apple() as device:
        yield on(device, tiny_minisd())


def test_the_pretended_device_refuses_float64():
    with apple() as device:
        x = torch.randn(2, 3).to(device)
        assert x.device.type == "mps" and (x @ x.T).device.type == "mps" and type(x.cpu()) is torch.Tensor
        assert x.cpu().double().dtype == torch.float64
        for refused in (lambda: x.double(), lambda: x.to(torch.float64),
                        lambda: torch.zeros(2, dtype=torch.float64, device=device)):  # fmt: skip
            with pytest.raises(TypeError, match="doesn't support float64"):
                refused()
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(2, 3)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()


def test_a_whole_run_with_its_validations(world, pictures, whole, mac):
    run = quiet(make_preset(pictures), mac)
    assert isinstance(next(mac.unet.parameters()), AppleTensor)
    assert run.validations() == whole.validations() and len(run.metrics()) == 10
    ours, theirs = weights(run), weights(whole)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)
    for mine, other in zip(run.validation_metrics(), whole.validation_metrics(), strict=True):
        assert mine["held_out_loss"] == pytest.approx(other["held_out_loss"], rel=1e-3)


@pytest.mark.parametrize("settings", [
    {"train_text_encoder": True, "snr_gamma": 5.0, "rescale_weights": True},
    {"use_dora": True, "gradient_accumulation_steps": 2},
    {"lora_dropout": 0.1, "gradient_checkpointing": True, "channels_last": True},
])  # fmt: skip
def test_other_settings_of_a_run(world, pictures, mac, settings):
    assert quiet(make_preset(pictures, steps=2, **settings), mac).done["steps"] == 2


def test_the_held_out_losses(mac, tiny, latents):
    losses = loss_by_timestep(mac, latents)
    assert losses.dtype == torch.float64 and losses.device.type == "cpu"
    assert torch.allclose(losses, loss_by_timestep(tiny, latents), rtol=1e-4)


def test_pictures(mac, tiny):
    noise = initial_latents(mac, [0, 1])
    assert noise.device.type == "mps"
    there = sample(mac, ["a cat", "a man"], noise, 3)
    here = sample(tiny, ["a cat", "a man"], initial_latents(tiny, [0, 1]), 3)
    assert torch.allclose(there.cpu(), here, atol=1e-4)
    drawn = generate(mac, ["a cat"], [0], num_inference_steps=2)
    assert image_to_image(mac, drawn, ["a man"], 0.5, [1], 4)[0].size == drawn[0].size


def test_distances_of_features_on_the_device(mac):
    x, y = (torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    a, b = x.to(mac.device), y.to(mac.device)
    assert mmd(a, b) == mmd(x, y) and mmd_interval(a, b, draws=20) == mmd_interval(x, y, draws=20)
    assert diversity([a, b]) == diversity([x, y]) and copy_share(a, b, b) == copy_share(x, y, y)
    assert torch.equal(nearest(a, b)[1], nearest(x, y)[1])


def test_clip_on_the_device(tmp_path):
    from hub_cache import clip_files
    from PIL import Image

    from helpers.evaluation.encoders import ClipEncoder

    for name, content in clip_files(tmp_path / "work").items():
        (tmp_path / name).write_bytes(content)
    pictures, prompts = [Image.new("RGB", (30, 20), color) for color in ("red", "blue")], ["a cat", "a man"]
    clip, expected = (ClipEncoder.load(tmp_path, device) for device in (MPS, "cpu"))
    with apple():
        there = clip.adherence(pictures, prompts)
    assert there == pytest.approx(expected.adherence(pictures, prompts), abs=1e-3)


def test_adapters_on_the_device(world, pictures, mac):
    run = quiet(make_preset(pictures, steps=2), mac)
    with adapted(mac, run.adapter) as unet:
        layers = lora.lora_layers(unet)
        assert all(layer.lora_A.weight.device.type == "mps" for layer in layers.values())
        with random_adapter(unet), lora.scaled(unet, 0.5):
            generate(mac, ["a cat"], [0], num_inference_steps=1)
        lora.merge(unet)
        generate(mac, ["a cat"], [0], num_inference_steps=1)
        lora.unmerge(unet)
        layer = next(iter(layers.values()))
        held = lowrank.LoRAWeights(layer.lora_A.weight.detach(), layer.lora_B.weight.detach(), layer.alpha)
        assert held.norm() == pytest.approx(lora.delta_weight(layer).norm().item(), rel=1e-4)
        lowrank.best_of_rank(lora.delta_weight(layer).detach(), 1)


def float64_on_a_device(tree: ast.AST) -> list[int]:
    """Lines where a tensor is made float64 without `.cpu()` right before: x.double(), x.to(torch.float64)."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        asked = [ast.unparse(argument) for argument in (*node.args, *(keyword.value for keyword in node.keywords))]
        makes = node.func.attr == "double" or (node.func.attr in ("to", "type") and "torch.float64" in asked)
        if makes and not ast.unparse(node.func.value).endswith(".cpu()"):
            lines.append(node.lineno)
    return lines


def test_float64_is_made_on_the_cpu_everywhere():
    assert float64_on_a_device(ast.parse("x.square().double().cpu()")) == [1]
    assert float64_on_a_device(ast.parse("x.to(torch.float64)\nx.to(device, dtype=torch.float64)")) == [1, 2]
    assert float64_on_a_device(ast.parse("x.cpu().double()\ntorch.empty(2, dtype=torch.float64)")) == []
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in sorted((ROOT / "helpers").rglob("*.py"))
        for line in float64_on_a_device(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert not found, "the tensor leaves the device first: x.cpu().double()"

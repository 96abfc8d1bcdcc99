"""Adapter files of LyCORIS, which kohya's trainers use for convolutions, DoRA and more.

The files are written by LyCORIS itself (lycoris-lora on PyPI), in kohya's layout.
"""

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_sd15_unet, tiny_text_encoder

from helpers.adapters.loading import load_adapter
from helpers.adapters.reading import read_adapter
from helpers.adapters.writing import write_adapter

kohya = pytest.importorskip("lycoris.kohya", reason="lycoris-lora writes the files of this test")
KINDS = {
    "LoRA": {},
    "rank-stabilised": {"rs_lora": True},
    "a trained scalar": {"use_scalar": True},
    "convolutions in three parts": {"use_tucker": True},
    "DoRA by output": {"dora_wd": True},
    "DoRA by input": {"dora_wd": True, "wd_on_output": False},
    "DoRA by input, three parts": {"dora_wd": True, "wd_on_output": False, "use_tucker": True},
}
# Its own preset "full" finds the time embedding of Stable Diffusion twice.
WHERE = """
enable_conv = true
unet_target_module = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
unet_target_name = ["conv_in", "conv_out"]
text_encoder_target_module = ["CLIPAttention", "CLIPMLP"]
"""


def trained(text_encoder, unet, folder, options):
    """LyCORIS' network on both, active, with random numbers where training would put some."""
    (folder / "where.toml").write_text(WHERE)
    options = {name: str(value) for name, value in options.items()}  # as kohya's command line gives them
    options["preset"] = str(folder / "where.toml")
    network = kohya.create_network(1.0, 3, 2.0, None, text_encoder, unet, conv_dim=2, **options)
    network.apply_to(text_encoder, unet, True, True)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("lora_up.weight", "scalar")):
            parameter.data.copy_(0.3 * noise)
        elif name.endswith("dora_scale"):
            parameter.data.mul_(1 + 0.1 * noise)
    return network


@torch.no_grad()
def outputs(text_encoder, unet):
    """What both make of fixed inputs."""
    states = text_encoder(torch.arange(8)[None]).last_hidden_state
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    return states, unet(latents, torch.tensor([500]), states).sample


@pytest.mark.parametrize("kind", KINDS)
def test_what_lycoris_writes_computes_the_same_here(tmp_path, kind):
    models = tiny_text_encoder(), tiny_sd15_unet()
    before = outputs(*models)
    network = trained(*models, tmp_path, KINDS[kind])
    theirs = outputs(*models)
    path = tmp_path / "lycoris.safetensors"
    network.save_weights(path, torch.float32, {"made by": "LyCORIS"})
    text_encoder, unet = tiny_text_encoder(), tiny_sd15_unet()
    assert load_adapter(path, unet, text_encoder)["layout"] == "kohya"
    for one, other, base in zip(outputs(text_encoder, unet), theirs, before, strict=True):
        assert not torch.allclose(other, base, atol=1e-2), "the adapter must change the result"
        assert torch.allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("kind", ["DoRA by output", "DoRA by input"])
def test_the_magnitudes_that_we_write_are_lycoris_own(tmp_path, kind):
    trained(tiny_text_encoder(), tiny_sd15_unet(), tmp_path, KINDS[kind]).save_weights(
        tmp_path / "theirs.safetensors", torch.float32, {}
    )
    path = write_adapter(tmp_path / "ours.safetensors", read_adapter(tmp_path / "theirs.safetensors"), "kohya")
    # (text encoders of transformers 5 have other names in LyCORIS)
    theirs, ours = (
        {key: value for key, value in load_file(file).items() if key.endswith("dora_scale") and "unet" in key}
        for file in (tmp_path / "theirs.safetensors", path)
    )
    assert ours and ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_lycoris_reads_the_dora_that_we_write(tmp_path):
    """By output; what it writes by input LyCORIS cannot read itself."""
    network = trained(tiny_text_encoder(), tiny_sd15_unet(), tmp_path, KINDS["DoRA by output"])
    network.save_weights(tmp_path / "theirs.safetensors", torch.float32, {})
    path = write_adapter(tmp_path / "ours.safetensors", read_adapter(tmp_path / "theirs.safetensors"), "kohya")
    models = tiny_text_encoder(), tiny_sd15_unet()
    again, _ = kohya.create_network_from_weights(1.0, str(path), None, *models)
    again.apply_to(*models, True, True)
    one, two = (
        {k: v for k, v in n.state_dict().items() if k.endswith("dora_scale") and "unet" in k} for n in (network, again)
    )
    assert one and one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)

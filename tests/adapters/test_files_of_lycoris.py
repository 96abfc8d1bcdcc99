"""Adapter files of LyCORIS, which kohya's trainers use for convolutions, DoRA and more.

The files are written by LyCORIS itself (lycoris-lora on PyPI), in kohya's layout.
"""

import pytest
import torch
from parity_tools import ROUNDING, assert_matters, base_results, difference, draw, loaded_by_us, output, pipeline_of

from helpers.adapters.reading import read_adapter
from helpers.adapters.writing import write_adapter

kohya = pytest.importorskip("lycoris.kohya", reason="lycoris-lora writes the files of this test")
# V / ||V|| is computed on the whole weight there and on the output here
DORA_ROUNDING = 2e-5
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


def trained(pipeline, folder, options):
    """LyCORIS' network on U-Net and text encoder, active, with random numbers where training would put some."""
    (folder / "where.toml").write_text(WHERE)
    options = {name: str(value) for name, value in options.items()}  # as kohya's command line gives them
    options["preset"] = str(folder / "where.toml")
    network = kohya.create_network(1.0, 3, 2.0, None, pipeline.text_encoder, pipeline.unet, conv_dim=2, **options)
    network.apply_to(pipeline.text_encoder, pipeline.unet, True, True)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("lora_up.weight", "scalar")):
            parameter.data.copy_(0.1 * noise)
        elif name.endswith("dora_scale"):
            parameter.data.mul_(1 + 0.1 * noise)
    return network


@pytest.mark.parametrize("kind", KINDS)
def test_what_lycoris_writes_draws_the_same_here(parity, tmp_path, kind):
    pipeline = pipeline_of("SD 1.5")
    network = trained(pipeline, tmp_path, KINDS[kind])
    theirs = output(pipeline.text_encoder), draw(pipeline)
    path = tmp_path / "lycoris.safetensors"
    network.save_weights(path, torch.float32, {"made by": "LyCORIS"})
    assert read_adapter(path).layout == "kohya"
    loaded = loaded_by_us("SD 1.5", path)
    ours = output(loaded.text_encoder), draw(loaded)
    latents, embeddings = base_results("SD 1.5")
    bound = DORA_ROUNDING if "DoRA" in kind else 10 * ROUNDING
    for name, one, other, base in zip(("text embeddings", "latents"), ours, theirs, (embeddings, latents), strict=True):
        assert_matters(one, base)
        parity(f"{name} with a file of LyCORIS equal its own", difference(one, other), bound, case=kind)


@pytest.mark.parametrize("kind", ["DoRA by output", "DoRA by input"])
def test_lycoris_reads_the_dora_that_we_write(parity, tmp_path, kind):
    pipeline = pipeline_of("SD 1.5")
    network = trained(pipeline, tmp_path, KINDS[kind])
    network.save_weights(tmp_path / "theirs.safetensors", torch.float32, {})
    path = write_adapter(tmp_path / "ours.safetensors", read_adapter(tmp_path / "theirs.safetensors"), "kohya")
    other = pipeline_of("SD 1.5")
    again, _ = kohya.create_network_from_weights(1.0, str(path), None, other.text_encoder, other.unet)
    again.apply_to(other.text_encoder, other.unet, True, True)
    one, two = (
        {k: v for k, v in n.state_dict().items() if "dora_scale" in k and "unet" in k} for n in (network, again)
    )
    assert one and one.keys() == two.keys()
    parity("the magnitudes that LyCORIS reads from our kohya file", difference(one, two), case=kind)

"""Sixteen latent channels to the ten that they use: `python -m second_generation.reduce FOLDER` rewrites FOLDER/vae.

Trained with noise in its latents, the autoencoder of sixteen channels says ten things, some of them several times: the
covariance of its latents has ten eigenvalues that count, and without the others the pictures lose less than 0.1 dB.
"""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from helpers.minisd import architecture
from helpers.minisd.pool import NO_STYLE, draw_pool
from helpers.minisd.train_vae import encode, fold_statistics, psnr, reconstruct
from helpers.world.scenes import BASE_STYLES, HELD_OUT_STYLES


@torch.no_grad()
def reduced(vae: AutoencoderKL, pictures, channels: int) -> AutoencoderKL:
    """The autoencoder on the leading principal components of its latents."""
    small = architecture.build_vae(architecture.Geometry(latent_channels=channels)).eval()
    wide = vae.config.latent_channels
    state = vae.state_dict()
    mean, _ = encode(vae, pictures, 64)
    rows = mean.permute(0, 2, 3, 1).flatten(0, 2)
    center = rows.mean(0)
    basis = torch.linalg.eigh(torch.cov(rows.T)).eigenvectors[:, -channels:]  # [wide, channels]
    # encoder: z = basis^T (Wq (conv x + b) + bq - center); the log variances are written by fold_statistics
    quant = state["quant_conv.weight"][:wide, :, 0, 0]
    project = torch.cat([basis.T @ quant, torch.zeros(channels, 2 * wide)])
    weight, bias = state["encoder.conv_out.weight"], state["encoder.conv_out.bias"]
    state["encoder.conv_out.weight"] = torch.einsum("oc,cikl->oikl", project, weight)
    state["encoder.conv_out.bias"] = project @ bias
    state["encoder.conv_out.bias"][:channels] += basis.T @ (state["quant_conv.bias"][:wide] - center)
    state["quant_conv.weight"] = torch.eye(2 * channels)[..., None, None]
    state["quant_conv.bias"] = torch.zeros(2 * channels)
    # decoder: its first convolution after post_quant_conv, which becomes the identity and a shift
    post, first = state["post_quant_conv.weight"][:, :, 0, 0], state["decoder.conv_in.weight"]
    spread = post @ basis  # [wide, channels]
    constant = post @ center + state["post_quant_conv.bias"]
    shift = torch.linalg.lstsq(spread, constant[:, None]).solution[:, 0]
    state["post_quant_conv.weight"] = torch.eye(channels)[..., None, None]
    state["post_quant_conv.bias"] = shift
    state["decoder.conv_in.weight"] = torch.einsum("oikl,ic->ockl", first, spread)
    state["decoder.conv_in.bias"] = state["decoder.conv_in.bias"] + first.sum((2, 3)) @ (constant - spread @ shift)
    small.load_state_dict(state)
    return small


if __name__ == "__main__":
    folder = Path(sys.argv[1]) / "vae"
    before = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).eval()
    styles = dict.fromkeys((*BASE_STYLES, *HELD_OUT_STYLES), 1.0) | {NO_STYLE: 3.0}
    pictures = draw_pool(384, styles, 128, seed=11).pictures
    after = reduced(before, pictures, architecture.MINI.latent_channels)
    for vae in (before, after):
        print(f"{psnr(pictures[:64], reconstruct(vae, pictures[:64], 32)).mean():.2f} dB")
    fold_statistics(after, pictures)
    print(f"{psnr(pictures[:64], reconstruct(after, pictures[:64], 32)).mean():.2f} dB")
    z, width = encode(after, pictures, 64)
    print("deviations", (z.std((0, 2, 3)) * architecture.SCALING_FACTOR).numpy().round(2), width.flatten()[0].item())
    after.half().save_pretrained(folder)

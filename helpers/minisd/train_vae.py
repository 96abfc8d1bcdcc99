"""Pretraining the autoencoder: pictures to latents of a twelfth of the numbers and back.

loss = |e| + e^2 + 0.5 |slope of e| + 1e-5 mean^2 / 2, each a mean over elements; e = x' - x, and its slopes are what
makes an edge crisp. The last term is what is left of KL(N(mean, std) || N(0, 1)) when the width is not learnt. Instead
the latents get noise of up to a tenth of their own spread, so that the decoder forgives the small errors of a U-Net,
and half of that is the posterior's width at the end.
After training, the statistics of the latents are folded into the two 1x1 quant convolutions, so that latents times the
one scaling factor of the pipeline have mean 0, variance 1 on average (Rombach et al. 2022, G), and no correlations.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from helpers.minisd.architecture import SCALING_FACTOR
from helpers.minisd.budget import Budget, Ema, captured

KL_WEIGHT = 1e-5
EDGE_WEIGHT = 0.5
NOISE = 0.1  # of the latents' standard deviation, at most
CROP = 64  # pixels: the network is convolutional, so that crops teach it at a quarter of the price


def pixels(pictures, device="cpu") -> Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in -1..1."""
    x = torch.as_tensor(pictures, device=device)
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels of x [B, C, H, W], to the right and down."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def vae_loss(vae: AutoencoderKL, x: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    """Loss of pictures x [B, 3, H, W] in -1..1; noise has the latents' shape, level [B] is in standard deviations."""
    posterior = vae.encode(x).latent_dist
    # z = mean + level * spread * noise, where spread is the latents' own standard deviation in each channel
    spread = posterior.mean.detach().std((0, 2, 3), keepdim=True)
    z = posterior.mean + level.view(-1, 1, 1, 1) * spread * noise
    error = vae.decode(z).sample - x
    edges = sum(d.abs().mean() for d in slopes(error))
    # KL = (mean^2 + std^2 - 1 - log std^2) / 2, of which only the mean is learnt
    kl = 0.5 * posterior.mean.pow(2).mean()
    return error.abs().mean() + error.pow(2).mean() + EDGE_WEIGHT * edges + KL_WEIGHT * kl


class VaeLoss(nn.Module):
    """`vae_loss` as a module of (x, noise, level)."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """Scalar loss."""
        return vae_loss(self.vae, x, noise, level)


def crops(pictures, batch_size: int, g: torch.Generator, device, step: int = 8) -> Tensor:
    """Random crops [B, 3, CROP, CROP] in -1..1 of uint8 pictures [N, H, W, 3], every other one in random colours.

    Corners are multiples of `step`, the pixels of one latent, so that a print's screen lies as in the whole picture.
    """
    rows = torch.randint(len(pictures), (batch_size,), generator=g).tolist()
    room = (pictures.shape[1] - CROP) // step + 1
    corners = (step * torch.randint(room, (batch_size, 2), generator=g)).tolist()
    cut = [pictures[i, y : y + CROP, x : x + CROP] for i, (y, x) in zip(rows, corners, strict=True)]
    x = pixels(np.stack(cut), device)
    # Channels in another order, or as a negative: colours that no style has
    for b in range(0, batch_size, 2):
        x[b] = x[b, torch.randperm(3, generator=g)] * (1 if torch.rand((), generator=g) < 0.5 else -1)
    return x


def train_vae(vae: AutoencoderKL, pictures, budget: Budget, batch_size: int = 16, learning_rate: float = 8e-4) -> Ema:
    """Train what requires a gradient, in place on uint8 pictures [N, H, W, 3] until the budget ends; the average."""
    device = next(vae.parameters()).device
    vae.train().to(memory_format=torch.channels_last)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    ema = Ema({"vae": vae}, decay=0.998)
    budget.resume({"vae": vae}, optimizer, ema)
    shape = (batch_size, vae.config.latent_channels, *[CROP // downsampling(vae)] * 2)
    first = torch.Generator().manual_seed(0)
    sample = (crops(pictures, batch_size, first, device), torch.zeros(shape, device=device))
    loss_of = captured(VaeLoss(vae), (*sample, torch.zeros(batch_size, device=device)))
    for step in budget.steps():
        g = torch.Generator().manual_seed(step)
        x = crops(pictures, batch_size, g, device).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(shape, generator=g).to(device)
        level = NOISE * torch.rand(batch_size, generator=g).to(device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * budget.cosine(warmup_steps=100)
        budget.learn(loss_of(x, noise, level), optimizer, ema, batch_size)
        budget.checkpoint({"vae": vae}, optimizer, ema)
    ema.copy_to({"vae": vae})
    vae.eval()
    return ema


def downsampling(vae: AutoencoderKL) -> int:
    """Pixels of the picture to one of the latent, along a side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Posterior mean and std [N, C, h, w] of uint8 pictures [N, H, W, 3], on the CPU, unscaled."""
    device = next(vae.parameters()).device
    parts = [vae.encode(pixels(b, device)).latent_dist for b in _batches(pictures, batch_size)]
    return torch.cat([p.mean.cpu() for p in parts]), torch.cat([p.std.cpu() for p in parts])


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures, batch_size: int = 64) -> Tensor:
    """uint8 pictures [N, H, W, 3] through the autoencoder (posterior mean), as uint8 [N, H, W, 3]."""
    device = next(vae.parameters()).device
    vae.to(memory_format=torch.channels_last)
    parts = []
    for batch in _batches(pictures, batch_size):  # bytes at once: thousands of pictures as floats are gigabytes
        decoded = vae.decode(vae.encode(pixels(batch, device)).latent_dist.mean).sample
        parts.append(((decoded + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8).cpu())
    return torch.cat(parts)


def _batches(pictures, batch_size: int):
    return (pictures[i : i + batch_size] for i in range(0, len(pictures), batch_size))


def psnr(a, b) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair of uint8 pictures [N, H, W, 3]: 10 log10(255^2 / MSE)."""
    a, b = (torch.as_tensor(x).float() for x in (a, b))
    return 10 * torch.log10(255**2 / (a - b).pow(2).flatten(1).mean(1).clamp(min=1e-6))


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, pictures) -> None:
    """Turn the latents in place to their principal components, mean 0; reconstructions do not change.

    A component of variance v gets a variance of about sqrt(v), and the mean variance is 1 after the pipeline's scaling
    factor: what carries most of the picture stays the loudest, and the rest can be heard through the same noise.
    The posterior's std becomes half of NOISE, the same in every channel and picture.
    """
    mean, _ = encode(vae, pictures)
    device = vae.quant_conv.weight.device
    c = vae.config.latent_channels
    rows = mean.permute(0, 2, 3, 1).reshape(-1, c)
    center = rows.mean(0).to(device)
    variance, basis = torch.linalg.eigh(torch.cov(rows.T))
    gain = variance.clamp(min=1e-3 * variance.max()) ** -0.25
    gain = gain / (SCALING_FACTOR * (variance * gain**2).mean().sqrt())
    # encoder: z' = G (z - center) with G = diag(gain) basis^T; log var' = 2 log(noise / 2 / scaling factor)
    turn = (gain[:, None] * basis.T).to(device)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:c] = torch.einsum("oc,cikl->oikl", turn, quant.weight[:c])
    quant.bias[:c] = turn @ (quant.bias[:c] - center)
    quant.weight[c:] = 0
    quant.bias[c:] = 2 * math.log(0.5 * NOISE / SCALING_FACTOR)
    # decoder: W z = W (G^-1 z' + center)
    back = (basis / gain).to(device)
    post.bias += F.conv2d(center.view(1, -1, 1, 1), post.weight).flatten()
    post.weight.copy_(torch.einsum("ocij,cd->odij", post.weight, back))

"""One step of LoRA fine-tuning of a latent diffusion model: what it draws, and what it does with it.

One step, of a batch of pictures x with captions c (Rombach et al. 2022, arXiv 2112.10752, equation 3):

    z   ~ q(z | x)                          the VAE's posterior: mean + std * noise, both cached
    t   ~ uniform(0, T),  eps ~ N(0, 1)     a timestep and a noise for each picture
    z_t = add_noise(z, eps, t)
    loss = mean of w_t * (unet(z_t, t, c) - target)^2      target: eps or v, w_t: 1 or Min-SNR
    AdamW on the LoRA matrices alone, gradients clipped

What step k draws depends on (seed, purpose, k) and on nothing else: each draw has its own generator, seeded by a hash
of the three. So a run that was killed and resumed, or validated more often, ends with the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from helpers import lora
from helpers.components import Components
from helpers.data import LatentCache
from helpers.diffusion import add_noise, diffusion_target, loss_weights
from helpers.presets import TrainConfig
from helpers.runs import TrainingError

HELD_OUT_TIMESTEPS = 8  # of the fixed grid on which the held-out loss is measured


# --- what a step draws -------------------------------------------------------------------------------------------


def seed_for(seed: int, purpose: str, step: int) -> int:
    """A 64-bit seed that depends on all three and on nothing else."""
    digest = hashlib.sha256(f"{seed}:{purpose}:{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def generator_for(seed: int, purpose: str, step: int) -> torch.Generator:
    """A CPU generator of its own for one purpose at one step, so that every device draws the same numbers."""
    return torch.Generator().manual_seed(seed_for(seed, purpose, step))


@contextmanager
def seeded(seed: int, purpose: str, step: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators inside the block and put them back after it, for code that draws from nothing else."""
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed_for(seed, purpose, step))
        yield


@dataclass(frozen=True)
class StepDraw:
    """All that is random in one step, for a batch of b pictures.

    indices: int64 [b], rows of the dataset; latents, noise: float32 [b, C, h, w]; timesteps: int64 [b], 0 … T-1;
    encoder_hidden_states: float32 [b, L, D], of the caption or, where it was dropped, of the empty one.
    """

    indices: Tensor
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    encoder_hidden_states: Tensor

    def to(self, device: torch.device | str) -> StepDraw:
        return StepDraw(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def steps_per_epoch(config: TrainConfig, rows: int) -> int:
    """How many batches see each picture once; the last batch may be smaller. 685 rows by 8 are 86."""
    return math.ceil(rows / config.batch_size)


def batch_indices(config: TrainConfig, rows: int, step: int) -> Tensor:
    """The rows of step `step` (from 0), int64 [b]: a slice of its epoch's own permutation."""
    epoch, position = divmod(step, steps_per_epoch(config, rows))
    order = torch.randperm(rows, generator=generator_for(config.seed, "order", epoch))
    return order[position * config.batch_size : (position + 1) * config.batch_size]


def draw_step(config: TrainConfig, cache: LatentCache, step: int, num_train_timesteps: int = 1000) -> StepDraw:
    """What step `step` (from 0) trains on. The same arguments give the same bits, whatever was drawn before."""
    indices = batch_indices(config, len(cache.mean), step)
    # One memory layout, whether the cache was just computed or read from disk: kernels round each layout differently
    mean, std = (part[indices].float().contiguous() for part in (cache.mean, cache.std))

    def normal(purpose: str) -> Tensor:
        return torch.randn(mean.shape, generator=generator_for(config.seed, purpose, step))

    # z = mean + std * n, n ~ N(0, 1): a sample of the VAE's posterior, new at every visit of the picture
    latents = mean + std * normal("posterior")
    timesteps = torch.randint(
        num_train_timesteps, (len(indices),), generator=generator_for(config.seed, "timesteps", step)
    )
    # Without a caption now and then, the U-Net keeps knowing what guidance needs: pictures of anything
    dropped = torch.rand(len(indices), generator=generator_for(config.seed, "dropout", step)) < config.caption_dropout
    captions = cache.caption_embeddings[cache.caption_index[indices]].float()
    captions = torch.where(dropped[:, None, None], cache.empty_embedding.float(), captions)
    return StepDraw(indices, latents, normal("noise"), timesteps, captions)


# --- one step ----------------------------------------------------------------------------------------------------


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then constant, linear or cosine down to zero."""
    if step < config.lr_warmup_steps:
        return config.learning_rate * (step + 1) / config.lr_warmup_steps
    # p runs from 0 to 1 over the steps that follow the warm-up
    p = (step - config.lr_warmup_steps) / max(1, config.steps - config.lr_warmup_steps)
    factors = {"constant": 1.0, "linear": 1.0 - p, "cosine": 0.5 * (1.0 + math.cos(math.pi * p))}
    return config.learning_rate * factors[config.lr_schedule]


def check_trainable(unet: nn.Module) -> None:
    """Raises TrainingError unless the LoRA matrices are all that trains, and are float32."""
    wanted = {id(p) for p in lora.lora_parameters(unet)}
    for name, parameter in unet.named_parameters():
        if parameter.requires_grad != (id(parameter) in wanted):
            raise TrainingError(f"{name} should be {'trained' if id(parameter) in wanted else 'frozen'}, and is not")
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise TrainingError(f"{name} is {parameter.dtype}: small updates would be lost, train it in float32")
    if not wanted:
        raise TrainingError("the U-Net has no LoRA layers: nothing to train")


@contextmanager
def injected(unet: nn.Module, config: TrainConfig) -> Iterator[torch.optim.AdamW]:
    """The U-Net with fresh LoRA layers, and their optimizer; afterwards the U-Net is what it was, bit for bit."""
    device = next(unet.parameters()).device
    with seeded(config.seed, "init", 0, device):
        lora.inject(unet, config.targets, config.rank, config.alpha, config.lora_dropout, config.use_rslora)
    try:
        check_trainable(unet)
        yield torch.optim.AdamW(
            lora.lora_parameters(unet), config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
    finally:
        lora.remove(unet)
        unet.eval()


def training_step(
    unet: nn.Module,
    optimizer: torch.optim.Optimizer,
    draw: StepDraw,
    alphas_cumprod: Tensor,
    prediction_type: str,
    config: TrainConfig,
    step: int,
) -> dict[str, float]:
    """One update of the LoRA matrices; returns loss, grad_norm (before clipping), lr and mean_timestep.

    Raises TrainingError, and changes no weight, when the loss or its gradient is not a number.
    """
    device = next(unet.parameters()).device
    batch = draw.to(device)
    noisy_latents = add_noise(batch.latents, batch.noise, batch.timesteps, alphas_cumprod)
    target = diffusion_target(prediction_type, batch.latents, batch.noise, batch.timesteps, alphas_cumprod)

    unet.train()
    with seeded(config.seed, "lora dropout", step, device):
        output = unet(
            noisy_latents.to(unet.dtype), batch.timesteps, batch.encoder_hidden_states.to(unet.dtype)
        ).sample.float()
    # loss = mean over the batch of w_t * mean over the latent of (output - target)^2
    errors = (output - target).square().mean(dim=(1, 2, 3))
    weights = loss_weights(batch.timesteps, alphas_cumprod, prediction_type, config.snr_gamma).to(device)
    loss = (weights * errors).mean()

    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
    if not (torch.isfinite(loss) and torch.isfinite(grad_norm)):
        raise TrainingError(
            f"step {step}: the loss is {loss.item()} and its gradient's norm {grad_norm.item()}; "
            f"timesteps {draw.timesteps.tolist()}, rows {draw.indices.tolist()}. The last checkpoint is kept."
        )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.step()
    return {
        "loss": loss.item(),
        "lr": learning_rate(config, step),
        "grad_norm": grad_norm.item(),
        "mean_timestep": draw.timesteps.float().mean().item(),
    }


# --- the loss on held-out pictures -------------------------------------------------------------------------------


@torch.no_grad()
def held_out_loss(components: Components, cache: LatentCache, seed: int = 0, batch_size: int = 16) -> float:
    """Mean unweighted squared error on held-out pictures, at a fixed grid of timesteps with one fixed noise a picture.

    Nothing in it is drawn anew, so two values differ because of the model alone. Latents are the posterior's means.
    """
    unet, scheduler = components.unet.eval(), components.noise_scheduler
    alphas_cumprod, kind = scheduler.alphas_cumprod.to(components.device), components.prediction_type
    latents = cache.mean.float().contiguous()
    noise = torch.randn(latents.shape, generator=generator_for(seed, "held-out noise", 0))
    captions = cache.caption_embeddings[cache.caption_index].float()
    # the middles of equal parts of 0 … T
    T = len(alphas_cumprod)
    grid = [int((i + 0.5) * T / HELD_OUT_TIMESTEPS) for i in range(HELD_OUT_TIMESTEPS)]
    total = 0.0
    for t in grid:
        for rows in torch.arange(len(latents)).split(batch_size):
            x, n, c = (part[rows].to(components.device) for part in (latents, noise, captions))
            timesteps = torch.full((len(rows),), t, device=components.device)
            noisy = add_noise(x, n, timesteps, alphas_cumprod)
            output = unet(noisy.to(unet.dtype), timesteps, c.to(unet.dtype)).sample.float()
            target = diffusion_target(kind, x, n, timesteps, alphas_cumprod)
            total += (output - target).square().mean(dim=(1, 2, 3)).sum().item()
    return total / (len(grid) * len(latents))

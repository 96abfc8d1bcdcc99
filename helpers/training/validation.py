"""What a run shows of itself while it trains: pictures of fixed prompts from fixed noise, and a held-out loss.

Both use the modules that train, as they are: nothing is loaded or copied for a validation, and nothing that a later
step draws depends on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from helpers import lora
from helpers.data.caches import LatentCache
from helpers.diffusion.components import Components
from helpers.diffusion.sampling import initial_latents
from helpers.diffusion.schedule import add_noise, diffusion_target
from helpers.diffusion.text import encode_tokens
from helpers.presets.configuration import TrainConfig
from helpers.training.draws import generator_for, steps_per_epoch

HELD_OUT_TIMESTEPS = 8  # of the fixed grid on which the held-out loss is measured


def validation_steps(config: TrainConfig, rows: int) -> list[int]:
    """Before the first step, after every `validation_epochs` epochs or `validation_steps` steps, after the last.

    And after the `early_validations` that come before the end.
    """
    every = config.validation_steps or config.validation_epochs * steps_per_epoch(config, rows)
    early = [step for step in config.early_validations if step < config.steps]
    return sorted({*range(0, config.steps, every), *early, config.steps})


def validation_pairs(config: TrainConfig, prompts: tuple[str, ...] | list[str]) -> list[tuple[str, int]]:
    """(prompt, seed) of each validation picture: every prompt with `validation_seeds` seeds of its own."""
    return [
        (prompt, 1000 * config.seed + i + len(prompts) * k)
        for i, prompt in enumerate(prompts)
        for k in range(config.validation_seeds)
    ]


def validation_latents(components: Components, config: TrainConfig, prompts: tuple[str, ...] | list[str]) -> Tensor:
    """The noise from which each validation of a run starts, float32 [pictures, C, h, w], on the CPU."""
    seeds = [seed for _, seed in validation_pairs(config, prompts)]
    return initial_latents(components, seeds).float().cpu().contiguous()


def held_out_loss(components: Components, cache: LatentCache, seed: int = 0, batch_size: int = 16) -> float:
    """Mean over pictures and timesteps of `loss_by_timestep`: one number that differs because of the model alone."""
    return loss_by_timestep(components, cache, seed, batch_size).mean().item()


@torch.no_grad()
def loss_by_timestep(components: Components, cache: LatentCache, seed: int = 0, batch_size: int = 16) -> Tensor:
    """Unweighted squared error of each of N pictures at each timestep of a fixed grid, float64 [N, HELD_OUT_TIMESTEPS].

    Every picture has one fixed noise. Nothing is drawn anew, so two values differ because of the model alone. Latents
    are the posterior's means. The columns are the `grid_timesteps`.
    """
    unet, scheduler = components.unet.eval(), components.noise_scheduler
    dtype = next(unet.parameters()).dtype
    alphas_cumprod, kind = scheduler.alphas_cumprod.to(components.device), components.prediction_type
    latents = cache.mean.float().contiguous()
    noise = torch.randn(latents.shape, generator=generator_for(seed, "held-out noise", 0))
    captions = caption_states(components, cache)
    losses = torch.empty(len(latents), HELD_OUT_TIMESTEPS, dtype=torch.float64)
    for column, t in enumerate(grid_timesteps(len(alphas_cumprod))):
        for rows in torch.arange(len(latents)).split(batch_size):
            x, n, c = (part[rows].to(components.device) for part in (latents, noise, captions))
            timesteps = torch.full((len(rows),), t, device=components.device)
            noisy = add_noise(x, n, timesteps, alphas_cumprod)
            output = unet(noisy.to(dtype), timesteps, c.to(dtype)).sample.float()
            target = diffusion_target(kind, x, n, timesteps, alphas_cumprod)
            # the CPU's first, float64 then: an Apple GPU has no float64
            losses[rows, column] = (output - target).square().mean(dim=(1, 2, 3)).cpu().double()
    return losses


def grid_timesteps(num_train_timesteps: int = 1000) -> list[int]:
    """The timesteps at which losses are measured: the middles of HELD_OUT_TIMESTEPS equal parts of 0 … T."""
    return [int((i + 0.5) * num_train_timesteps / HELD_OUT_TIMESTEPS) for i in range(HELD_OUT_TIMESTEPS)]


def caption_states(components: Components, cache: LatentCache) -> Tensor:
    """Text embeddings float32 [N, L, D] of each row's caption: the cached ones, unless the text encoder has a LoRA."""
    embeddings = cache.caption_embeddings
    if components.text_encoder is not None and lora.lora_layers(components.text_encoder):
        embeddings = encode_tokens(components, cache.caption_ids).cpu()
    return embeddings[cache.as_written].float()

"""Pretraining the U-Net and the text encoder together, on cached latents.

The text encoder learns from the denoising loss alone: it is not trained contrastively on pictures and captions as
CLIP's is. v-prediction (Salimans and Ho 2022), Adam, a tenth of the captions dropped for classifier-free guidance
(Ho and Salimans 2022), weights averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from helpers.diffusion.schedule import add_noise, alphas_cumprod, velocity
from helpers.minisd.architecture import SCALING_FACTOR
from helpers.minisd.budget import Budget, Ema, captured

CAPTION_DROPOUT = 0.1


@dataclass
class LatentPool:
    """Posterior means and stds [N, C, h, w], already scaled; token ids [N, K, L] of K captions a picture."""

    mean: Tensor
    std: Tensor
    tokens: Tensor
    empty: Tensor  # token ids [L] of ""


def tokenize(tokenizer, captions: list[str]) -> Tensor:
    """Token ids [B, L], padded to the text encoder's positions."""
    batch = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    return batch.input_ids


def latent_pool(mean: Tensor, std: Tensor, captions: list[list[str]], tokenizer) -> LatentPool:
    """Scale the latents and tokenize the captions of a pool of pictures."""
    flat = tokenize(tokenizer, [words for row in captions for words in row])
    tokens = flat.view(len(captions), -1, flat.shape[-1]).to(torch.int16)
    return LatentPool(mean * SCALING_FACTOR, std * SCALING_FACTOR, tokens, tokenize(tokenizer, [""])[0])


def draw_batch(pool: LatentPool, batch_size: int, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, noise [B, C, h, w], timesteps [B] and token ids [B, L] of step `step`, from its own generator."""
    g = torch.Generator().manual_seed(step)
    rows = torch.randint(len(pool.mean), (batch_size,), generator=g)
    latents = pool.mean[rows] + pool.std[rows] * torch.randn(pool.mean[rows].shape, generator=g)
    noise = torch.randn(latents.shape, generator=g)
    timesteps = draw_timesteps(batch_size, g)
    which = torch.randint(pool.tokens.shape[1], (batch_size,), generator=g)
    tokens = pool.tokens[rows, which].long()
    dropped = torch.rand(batch_size, generator=g) < CAPTION_DROPOUT
    return latents, noise, timesteps, torch.where(dropped[:, None], pool.empty, tokens)


def draw_timesteps(batch_size: int, g: torch.Generator) -> Tensor:
    """Timesteps [B] in 0..999: half of them uniform, half logit-normal, in a random order.

    The middle of the schedule decides what is in the picture, so it is visited more often (Esser et al. 2024, arXiv
    2403.03206, section 3.1); the uniform half keeps both ends trained.
    """
    half = batch_size // 2
    # One draw in each of B / 2 equal strata: the same distribution with less variance
    u, v = ((torch.arange(n) + torch.rand(n, generator=g)) / n for n in (batch_size - half, half))
    # t = sigmoid(z), z ~ N(0, 1)
    t = torch.cat([u, torch.sigmoid(torch.special.ndtri(v))])
    return (t * 1000).long().clamp(0, 999)[torch.randperm(batch_size, generator=g)]


class Velocity(nn.Module):
    """The U-Net as a module of tensors alone: (noisy latents, timesteps, text) to the predicted velocity."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, noisy: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        """[B, C, h, w], [B], [B, L, D] to [B, C, h, w]."""
        return self.unet(noisy, timesteps, words, return_dict=False)[0]


def denoising_loss(predict, text_encoder, batch, schedule: Tensor) -> Tensor:
    """Mean squared error of the predicted velocity."""
    latents, noise, timesteps, tokens = batch
    words = text_encoder(tokens).last_hidden_state
    noisy = add_noise(latents, noise, timesteps, schedule)
    predicted = predict(noisy, timesteps, words)
    return (predicted - velocity(latents, noise, timesteps, schedule)).pow(2).mean()


def example(pool: LatentPool, text_encoder, batch_size: int, device) -> tuple[Tensor, Tensor, Tensor]:
    """What `Velocity` takes: a batch of noise, timesteps and text, of which the text wants a gradient."""
    noise = torch.randn(batch_size, *pool.mean.shape[1:], device=device)
    timesteps = torch.zeros(batch_size, dtype=torch.long, device=device)
    width = text_encoder.config.hidden_size
    return noise, timesteps, torch.randn(batch_size, pool.tokens.shape[-1], width, device=device, requires_grad=True)


def train_unet(
    unet,
    text_encoder,
    pool: LatentPool,
    budget: Budget,
    batch_size: int = 32,
    learning_rate: float = 7e-4,
    on_save=None,
) -> Ema:
    """Train both in place until the budget ends; they hold the averaged weights afterwards.

    on_save(ema) is called after each checkpoint.
    """
    device = next(unet.parameters()).device
    unet.train().to(memory_format=torch.channels_last)
    modules = {"unet": unet, "text_encoder": text_encoder.train()}
    parameters = [p for m in modules.values() for p in m.parameters()]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    ema = Ema(modules, decay=0.999)
    budget.resume(modules, optimizer, ema)
    schedule = alphas_cumprod().to(device)
    predict = captured(Velocity(unet), example(pool, text_encoder, batch_size, device))
    for step in budget.steps():
        batch = [x.to(device, non_blocking=True) for x in draw_batch(pool, batch_size, step)]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * budget.cosine(warmup_steps=200)
        loss = denoising_loss(predict, text_encoder, batch, schedule)
        budget.learn(loss, optimizer, ema, batch_size)
        if budget.checkpoint(modules, optimizer, ema) and on_save:
            on_save(ema)
    ema.copy_to(modules)
    unet.eval(), text_encoder.eval()
    return ema

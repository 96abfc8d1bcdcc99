"""From noise to pictures: DDIM sampling with classifier-free guidance, by hand.

- Song et al. 2021, Denoising Diffusion Implicit Models, arXiv 2010.02502: the sampler, here without added noise
- Ho and Salimans 2022, Classifier-Free Diffusion Guidance, arXiv 2207.12598: the guidance
- Meng et al. 2022, SDEdit, arXiv 2108.01073: starting from a given picture instead of noise

The result equals that of diffusers' StableDiffusionPipeline with its DDIMScheduler as Stable Diffusion 2.1 sets it up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from helpers.diffusion.components import Components
from helpers.diffusion.pictures import to_latents, to_pictures, to_pil, to_tensor
from helpers.diffusion.schedule import add_noise, predicted_noise, predicted_x0
from helpers.diffusion.text import encode_prompts

STEPS_OFFSET = 1  # Stable Diffusion's samplers end at timestep 1, not 0

BATCH_PIXELS = 4 * 64 * 64  # latent pixels that are denoised at once

Callback = Callable[[int, int, Tensor], None]


def initial_latents(components: Components, seeds: Sequence[int]) -> Tensor:
    """Standard normal noise float32 [B, C, h, w], one row a seed.

    Each row comes from a CPU generator of its own, so it depends on neither the device nor the other seeds.
    """
    rows = [torch.randn(components.latent_shape, generator=torch.Generator("cpu").manual_seed(s)) for s in seeds]
    return torch.stack(rows).to(components.device)


def inference_timesteps(num_inference_steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """The timesteps that sampling visits, from noisy to clean, evenly spaced ("leading" spacing).

    Raises ValueError unless 1 <= num_inference_steps < num_train_timesteps.
    """
    if not 1 <= num_inference_steps < num_train_timesteps:
        raise ValueError(f"num_inference_steps must be 1 to {num_train_timesteps - 1}, not {num_inference_steps}")
    stride = num_train_timesteps // num_inference_steps
    return [i * stride + STEPS_OFFSET for i in reversed(range(num_inference_steps))]


def guided_output(unet, latents: Tensor, timestep: int, empty: Tensor, text: Tensor, guidance_scale: float) -> Tensor:
    """The U-Net's output float32 [B, C, h, w] at latents [B, C, h, w], drawn towards the prompt.

    empty, text: embeddings [B, L, D] of the empty prompt and the prompts; the U-Net sees both in one batch.
    A guidance_scale of 1 or less means no guidance. Ho and Salimans 2022, equation 6 (guidance_scale = w + 1).
    """
    guided = guidance_scale > 1
    inputs = torch.cat([latents, latents]) if guided else latents
    states = torch.cat([empty, text]) if guided else text
    output = unet(inputs.to(unet.dtype), timestep, encoder_hidden_states=states.to(unet.dtype)).sample.float()
    if not guided:
        return output
    unconditional, conditional = output.chunk(2)
    # out = out(empty) + guidance_scale * (out(text) - out(empty))
    return unconditional + guidance_scale * (conditional - unconditional)


def ddim_step(
    prediction_type: str, latents: Tensor, output: Tensor, timestep: int, previous: int, alphas_cumprod: Tensor
) -> Tensor:
    """Latents at timestep `previous` < `timestep`, without added noise. Song et al. 2021, equation 12 with sigma = 0.

    A negative `previous` means the end of sampling, which takes the alpha-bar of timestep 0.
    """
    t = torch.full((len(latents),), timestep, device=latents.device)
    x0 = predicted_x0(prediction_type, latents, output, t, alphas_cumprod)
    noise = predicted_noise(prediction_type, latents, output, t, alphas_cumprod)
    # x_prev = sqrt(alpha_bar_prev) x_0 + sqrt(1 - alpha_bar_prev) eps
    return add_noise(x0, noise, torch.full_like(t, max(previous, 0)), alphas_cumprod)


@torch.inference_mode()
def denoise(
    components: Components,
    text: Tensor,
    latents: Tensor,
    timesteps: list[int],
    stride: int,
    guidance_scale: float,
    callback: Callback | None = None,
) -> Tensor:
    """The sampling loop for one batch: latents [B, C, h, w] at timesteps[0] to clean ones; text is [B, L, D]."""
    alphas_cumprod = components.noise_scheduler.alphas_cumprod.to(components.device)
    empty = encode_prompts(components, [""]).expand(len(text), -1, -1)
    for step, t in enumerate(timesteps):
        output = guided_output(components.unet, latents, t, empty, text, guidance_scale)
        latents = ddim_step(components.prediction_type, latents, output, t, t - stride, alphas_cumprod)
        if callback is not None:
            callback(step, t, latents)
    return latents


def sampling_batch(components: Components) -> int:
    """How many prompts are denoised at once: fewer where latents, and with them the U-Net's activations, are large."""
    _, height, width = components.latent_shape
    return max(1, min(16, BATCH_PIXELS // (height * width)))


def sample(
    components: Components,
    prompts: Sequence[str],
    latents: Tensor,
    num_inference_steps: int = 25,
    guidance_scale: float = 4.0,
    callback: Callback | None = None,
    batch_size: int | None = None,
    strength: float = 1.0,
) -> Tensor:
    """Clean latents float32 [B, C, h, w] for B prompts, from noise latents [B, C, h, w]. Deterministic.

    callback(step, timestep, latents) is called after each step of each batch of at most `batch_size` prompts; by
    default 16, and fewer where latents are large: 4 at 512 pixels, 1 at 768.
    strength: below 1, only that last share of the steps is taken, and `latents` are noisy ones of their first timestep.
    Raises ValueError when prompts and latents differ in number.
    """
    check_numbers(prompts=prompts, latents=latents)
    num_train_timesteps = components.noise_scheduler.config.num_train_timesteps
    timesteps = inference_timesteps(num_inference_steps, num_train_timesteps)
    timesteps = timesteps[len(timesteps) - steps_taken(num_inference_steps, strength) :]
    stride = num_train_timesteps // num_inference_steps
    text = encode_prompts(components, list(prompts))
    batch_size = batch_size or sampling_batch(components)
    latents = latents.to(components.device, torch.float32)
    done = [
        denoise(components, text_part, part, timesteps, stride, guidance_scale, callback)
        for text_part, part in zip(text.split(batch_size), latents.split(batch_size), strict=True)
    ]
    return torch.cat(done).clone()  # outside inference mode: an ordinary tensor, usable in training


def generate(
    components: Components,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Callable[..., Tensor] = sample,
    **settings,
) -> list[Image.Image]:
    """A picture for each prompt, from the noise of the seed beside it.

    sampler: `sample`, or `helpers.diffusion.dpm_solver.sample_by_dpm_solver`; settings go to it.
    """
    check_numbers(prompts=prompts, seeds=seeds)
    return to_pil(to_pictures(components, sampler(components, prompts, initial_latents(components, seeds), **settings)))


def image_to_image(
    components: Components,
    pictures: Sequence[Image.Image] | Tensor,
    prompts: Sequence[str],
    strength: float,
    seeds: Sequence[int],
    num_inference_steps: int = 25,
    **settings,
) -> list[Image.Image]:
    """Given pictures redrawn to the prompts. Meng et al. 2022, as diffusers' StableDiffusionImg2ImgPipeline does it.

    pictures: B pictures, or a tensor [B, 3, H, W] in -1..1 of the model's resolution. strength: 0 gives back the
    pictures as the VAE decodes them, 1 keeps next to nothing of them. settings: as for `sample`.
    Raises ValueError for a strength outside 0..1, or when the numbers of pictures, prompts and seeds differ.
    """
    check_numbers(pictures=pictures, prompts=prompts, seeds=seeds)
    if not isinstance(pictures, Tensor):
        pictures = torch.stack([to_tensor(picture, components.resolution) for picture in pictures])
    latents, _ = to_latents(components, pictures)
    skipped = num_inference_steps - steps_taken(num_inference_steps, strength)
    if skipped < num_inference_steps:
        timesteps = inference_timesteps(num_inference_steps, components.noise_scheduler.config.num_train_timesteps)
        start = torch.full((len(latents),), timesteps[skipped], device=latents.device)
        noise = initial_latents(components, seeds)
        latents = add_noise(latents, noise, start, components.noise_scheduler.alphas_cumprod.to(latents.device))
        latents = sample(components, prompts, latents, num_inference_steps, strength=strength, **settings)
    return to_pil(to_pictures(components, latents))


def steps_taken(num_inference_steps: int, strength: float) -> int:
    """How many of the steps a given strength takes, counted from the clean end."""
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be between 0 and 1, not {strength}")
    return min(int(num_inference_steps * strength), num_inference_steps)


def check_numbers(**things) -> None:
    """Raise ValueError, naming the numbers, unless all have the same length, at least one."""
    counts = {name: len(thing) for name, thing in things.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        said = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"as many of each are needed, at least one: got {said}")

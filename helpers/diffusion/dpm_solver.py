"""From noise to pictures in fewer steps: DPM-Solver++ (2M), by hand.

DDIM takes the clean picture that the model sees now, and walks towards it for a whole step. But on the way the model
would change its mind. This solver remembers what the model saw one step earlier, draws a line through the two, and
walks towards where that line is in the middle of the step. It asks the model no more often: one evaluation a step.

- Lu et al. 2022, DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models, arXiv 2211.01095,
  Algorithm 2; with the first order alone it is DDIM

The result equals that of diffusers' DPMSolverMultistepScheduler ("dpmsolver++", order 2, "midpoint") on the timesteps
of our DDIM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from helpers.diffusion.components import Components
from helpers.diffusion.sampling import Callback, check_numbers, guided_output, inference_timesteps, sampling_batch
from helpers.diffusion.schedule import predicted_x0
from helpers.diffusion.text import encode_prompts

FEW = 15  # with fewer steps the last one is of first order: a long line to the end would overshoot


def half_log_snr(alpha_bar: float) -> float:
    """lambda, the solver's clock: it grows as the noise goes. Lu et al. 2022, section 2."""
    # lambda = log(alpha / sigma),  alpha = sqrt(alpha_bar),  sigma = sqrt(1 - alpha_bar)
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


def dpm_solver_step(latents: Tensor, x0: Tensor, earlier_x0: Tensor | None, alpha_bars: Sequence[float]) -> Tensor:
    """Latents [B, C, h, w] where the step ends. Lu et al. 2022, Algorithm 2 (by Proposition 4.1).

    x0: the clean latents that the model sees now; earlier_x0: those of one step before, or None for a first-order step.
    alpha_bars: of one step before, of now, and of where the step ends.
    """
    before, now, after = map(half_log_snr, alpha_bars)
    h = after - now
    # D = x0 + (x0 - earlier_x0) / (2 r),  r = (lambda_now - lambda_before) / h
    target = x0 if earlier_x0 is None else x0 + (x0 - earlier_x0) * (h / (2 * (now - before)))
    # x_after = sigma_after / sigma_now x - alpha_after (e^-h - 1) D
    shrink = math.sqrt((1 - alpha_bars[2]) / (1 - alpha_bars[1]))
    return shrink * latents - math.sqrt(alpha_bars[2]) * math.expm1(-h) * target


@torch.inference_mode()
def denoise_by_dpm_solver(
    components: Components,
    text: Tensor,
    latents: Tensor,
    timesteps: list[int],
    guidance_scale: float,
    callback: Callback | None = None,
) -> Tensor:
    """The sampling loop for one batch: latents [B, C, h, w] at timesteps[0] to clean ones; text is [B, L, D].

    It ends at the alpha-bar of timestep 0, as DDIM does here.
    """
    schedule = components.noise_scheduler.alphas_cumprod.to(components.device)
    alpha_bar = schedule.tolist()
    empty = encode_prompts(components, [""]).expand(len(text), -1, -1)
    before, earlier_x0 = timesteps[0], None
    for step, t in enumerate(timesteps):
        output = guided_output(components.unet, latents, t, empty, text, guidance_scale)
        now = torch.full((len(text),), t, device=latents.device)
        x0 = predicted_x0(components.prediction_type, latents, output, now, schedule)
        last = step == len(timesteps) - 1
        after = 0 if last else timesteps[step + 1]
        known = None if last and len(timesteps) < FEW else earlier_x0
        latents = dpm_solver_step(latents, x0, known, (alpha_bar[before], alpha_bar[t], alpha_bar[after]))
        before, earlier_x0 = t, x0
        if callback is not None:
            callback(step, t, latents)
    return latents


def sample_by_dpm_solver(
    components: Components,
    prompts: Sequence[str],
    latents: Tensor,
    num_inference_steps: int = 12,
    guidance_scale: float = 4.0,
    callback: Callback | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Clean latents float32 [B, C, h, w] for B prompts, from noise latents [B, C, h, w]. Deterministic.

    As `helpers.diffusion.sampling.sample`, with another solver. Raises ValueError when prompts and latents differ in
    number.
    """
    check_numbers(prompts=prompts, latents=latents)
    timesteps = inference_timesteps(num_inference_steps, components.noise_scheduler.config.num_train_timesteps)
    text = encode_prompts(components, list(prompts))
    batch_size = batch_size or sampling_batch(components)
    latents = latents.to(components.device, torch.float32)
    done = [
        denoise_by_dpm_solver(components, text_part, part, timesteps, guidance_scale, callback)
        for text_part, part in zip(text.split(batch_size), latents.split(batch_size), strict=True)
    ]
    return torch.cat(done).clone()  # outside inference mode: an ordinary tensor, usable in training

"""DPM-Solver++ (2M) by hand against diffusers' own, and against a problem whose solution is known."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from helpers.diffusion import dpm_solver
from helpers.diffusion.components import as_pipeline
from helpers.diffusion.dpm_solver import dpm_solver_step, sample_by_dpm_solver
from helpers.diffusion.pictures import to_pictures, to_pil
from helpers.diffusion.sampling import generate, inference_timesteps, initial_latents, sample
from helpers.diffusion.schedule import alphas_cumprod

PROMPTS = ["a drawing of a man with a red scarf", "a portrait of a cat"]
SETTINGS = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True}


def with_prediction_type(components, prediction_type):
    config = components.noise_scheduler.config
    components.noise_scheduler = DDPMScheduler.from_config(config, prediction_type=prediction_type)
    return components


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("steps", [1, 2, 14, 15])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_equal_to_diffusers(tiny, prediction_type, steps, guidance_scale):
    """14 and 15 steps: the last is of first order below 15."""
    components = with_prediction_type(tiny, prediction_type)
    latents = initial_latents(components, [0, 1])
    ours = sample_by_dpm_solver(components, PROMPTS, latents, steps, guidance_scale)
    pipeline = as_pipeline(components)
    config = components.noise_scheduler.config
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(config, final_sigmas_type="sigma_min", **SETTINGS)
    settings = {"timesteps": inference_timesteps(steps), "guidance_scale": guidance_scale, "output_type": "latent"}
    theirs = pipeline(PROMPTS, latents=latents, **settings).images
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())
    assert not torch.equal(ours, latents) and ours.is_inference() is False


# --- a known solution ----------------------------------------------------------------------------------------------

WIDTH = 0.5  # data are normal with this standard deviation: the best guess of x0 is a multiple of x_t


def error(order, steps):
    """How far the end is from the exact solution, along which x keeps the ratio to its own standard deviation.

    The steps are even in lambda = log(alpha / sigma), from Stable Diffusion's noisiest timestep to its cleanest.
    """
    ends = alphas_cumprod()[[-1, 0]]
    alpha_bar = torch.sigmoid(torch.linspace(*torch.logit(ends.double()), steps + 1, dtype=torch.float64)).tolist()
    spread = [math.sqrt(a * WIDTH**2 + 1 - a) for a in alpha_bar]
    x, earlier = torch.tensor([spread[0]], dtype=torch.float64), None
    for i in range(steps):
        x0 = x * math.sqrt(alpha_bar[i]) * WIDTH**2 / spread[i] ** 2
        known = earlier if order == 2 else None
        x = dpm_solver_step(x, x0, known, (alpha_bar[max(i - 1, 0)], alpha_bar[i], alpha_bar[i + 1]))
        earlier = x0
    return abs(x.item() - spread[-1])


@pytest.mark.parametrize("order", [1, 2])
def test_it_is_of_second_order_and_ddim_of_first(order):
    """Twice the steps: a quarter of the error, and half of it."""
    ratios = [error(order, steps) / error(order, 2 * steps) for steps in (50, 100)]
    assert all(abs(math.log2(ratio) - order) < 0.15 for ratio in ratios), ratios


def test_half_the_evaluations_are_nearer():
    assert error(2, 12) < error(1, 25)


def test_without_memory_it_is_ddim(tiny, monkeypatch):
    step = dpm_solver.dpm_solver_step
    monkeypatch.setattr(dpm_solver, "dpm_solver_step", lambda latents, x0, earlier, bars: step(latents, x0, None, bars))
    latents = initial_latents(tiny, [0, 1])
    ddim = sample(tiny, PROMPTS, latents, 5)
    assert (sample_by_dpm_solver(tiny, PROMPTS, latents, 5) - ddim).abs().max() <= 1e-5 * ddim.abs().max()


# --- as a sampler --------------------------------------------------------------------------------------------------


def test_batches_and_callback(tiny):
    latents, seen = initial_latents(tiny, [0, 1]), []
    whole = sample_by_dpm_solver(tiny, PROMPTS, latents, 3)
    parts = sample_by_dpm_solver(
        tiny, PROMPTS, latents, 3, callback=lambda step, t, z: seen.append((step, t, len(z))), batch_size=1
    )
    assert torch.allclose(whole, parts, atol=1e-5)
    assert seen == [(step, t, 1) for step, t in enumerate(inference_timesteps(3))] * 2


def test_wrong_numbers_are_refused(tiny):
    with pytest.raises(ValueError, match="as many of each are needed"):
        sample_by_dpm_solver(tiny, PROMPTS, initial_latents(tiny, [0]))
    with pytest.raises(ValueError, match="num_inference_steps must be 1 to 999"):
        sample_by_dpm_solver(tiny, PROMPTS, initial_latents(tiny, [0, 1]), 0)


def test_pictures_by_either_sampler(tiny):
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0}
    latents = sample_by_dpm_solver(tiny, PROMPTS, initial_latents(tiny, [5, 6]), 3, 2.0)
    expected = [np.asarray(picture) for picture in to_pil(to_pictures(tiny, latents))]
    pictures = generate(tiny, PROMPTS, [5, 6], sample_by_dpm_solver, **settings)
    assert all(np.array_equal(*pair) for pair in zip(pictures, expected, strict=True))
    assert not np.array_equal(pictures[0], generate(tiny, PROMPTS, [5, 6], **settings)[0])

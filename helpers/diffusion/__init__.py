"""Latent diffusion: the noise schedule's mathematics, a model's parts, text and pictures as tensors, and sampling.

Begin with schedule.py, then sampling.py: together they are what Stable Diffusion computes.
"""

from helpers.diffusion.components import Components, ComponentsError, as_pipeline, in_float32, load_components
from helpers.diffusion.dpm_solver import denoise_by_dpm_solver, dpm_solver_step, sample_by_dpm_solver
from helpers.diffusion.pictures import to_latents, to_pictures, to_pil, to_tensor, vae_chunk
from helpers.diffusion.sampling import (
    ddim_step,
    denoise,
    generate,
    guided_output,
    image_to_image,
    inference_timesteps,
    initial_latents,
    sample,
    sampling_batch,
)
from helpers.diffusion.schedule import (
    PREDICTION_TYPES,
    add_noise,
    alphas_cumprod,
    diffusion_target,
    loss_weights,
    predicted_noise,
    predicted_x0,
    signal_and_noise,
    snr,
    unknown_prediction_type,
    velocity,
)
from helpers.diffusion.text import encode_prompts, encode_tokens, tokenize

__all__ = [
    "Components",
    "ComponentsError",
    "PREDICTION_TYPES",
    "add_noise",
    "alphas_cumprod",
    "as_pipeline",
    "ddim_step",
    "denoise",
    "denoise_by_dpm_solver",
    "diffusion_target",
    "dpm_solver_step",
    "encode_prompts",
    "encode_tokens",
    "generate",
    "guided_output",
    "image_to_image",
    "in_float32",
    "inference_timesteps",
    "initial_latents",
    "load_components",
    "loss_weights",
    "predicted_noise",
    "predicted_x0",
    "sample",
    "sample_by_dpm_solver",
    "sampling_batch",
    "signal_and_noise",
    "snr",
    "to_latents",
    "to_pictures",
    "to_pil",
    "to_tensor",
    "tokenize",
    "unknown_prediction_type",
    "vae_chunk",
    "velocity",
]

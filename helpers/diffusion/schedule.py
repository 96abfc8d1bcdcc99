"""The mathematics of diffusion training: noise schedule, noising, targets and loss weights.

Everything here is a closed formula on tensors and needs PyTorch alone. Sources:

- Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239
- Salimans and Ho 2022, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512
- Hang et al. 2023, Efficient Diffusion Training via Min-SNR Weighting Strategy, arXiv 2303.09556

Shapes: x0, noise, x_t and output are [B, ...] (for latents [B, C, h, w]); timesteps is int64 [B] with values
0 ... T-1; alphas_cumprod is float32 [T], decreasing, each value between 0 and 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction")


def alphas_cumprod(num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """The schedule of Stable Diffusion ("scaled_linear"): alpha-bar for each timestep, float32 [T], decreasing.

    Ho et al. 2020, equation 4, with betas that are linear in their square roots.
    """
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(f"betas need 0 < beta_start <= beta_end < 1, not {beta_start} and {beta_end}")
    # beta_t = (linear from sqrt(beta_start) to sqrt(beta_end))^2
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32) ** 2
    # alpha_bar_t = product of (1 - beta_i) for i <= t
    return torch.cumprod(1.0 - betas, dim=0)


def signal_and_noise(timesteps: Tensor, alphas_cumprod: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), each [B, 1, ...] so that they multiply `like` [B, ...].

    Their squares add up to one: noising keeps the variance of data that has variance one.
    """
    alpha_bar = alphas_cumprod.to(timesteps.device)[timesteps]
    alpha_bar = alpha_bar.reshape(-1, *[1] * (like.ndim - 1))
    signal, noise_level = alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5
    return signal.to(like.device, like.dtype), noise_level.to(like.device, like.dtype)


def add_noise(x0: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The noised x_t, shaped as x0. Ho et al. 2020, equation 4 (reparameterised)."""
    signal, noise_level = signal_and_noise(timesteps, alphas_cumprod, x0)
    # x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps
    return signal * x0 + noise_level * noise


def velocity(x0: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The v target, shaped as x0. Salimans and Ho 2022, section 4 and appendix D."""
    signal, noise_level = signal_and_noise(timesteps, alphas_cumprod, x0)
    # v_t = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0
    return signal * noise - noise_level * x0


def diffusion_target(
    prediction_type: str, x0: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """What the U-Net is trained to output: the noise ("epsilon") or the velocity ("v_prediction").

    Raises ValueError for any other prediction type.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return velocity(x0, noise, timesteps, alphas_cumprod)
    raise unknown_prediction_type(prediction_type)


def predicted_x0(
    prediction_type: str, x_t: Tensor, output: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """The clean sample that the U-Net's output implies at x_t, shaped as x_t.

    Ho et al. 2020, equation 15 (epsilon); Salimans and Ho 2022, section 4 (v).
    """
    signal, noise_level = signal_and_noise(timesteps, alphas_cumprod, x_t)
    if prediction_type == "epsilon":
        # x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)
        return (x_t - noise_level * output) / signal
    if prediction_type == "v_prediction":
        # x_0 = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v
        return signal * x_t - noise_level * output
    raise unknown_prediction_type(prediction_type)


def predicted_noise(
    prediction_type: str, x_t: Tensor, output: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """The noise that the U-Net's output implies at x_t, shaped as x_t. Salimans and Ho 2022, appendix D."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        signal, noise_level = signal_and_noise(timesteps, alphas_cumprod, x_t)
        # eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t
        return signal * output + noise_level * x_t
    raise unknown_prediction_type(prediction_type)


def snr(timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Signal-to-noise ratio of x_t, float [B], positive and decreasing in t. Hang et al. 2023, section 3.1."""
    alpha_bar = alphas_cumprod.to(timesteps.device)[timesteps]
    # SNR(t) = alpha_bar_t / (1 - alpha_bar_t)
    return alpha_bar / (1.0 - alpha_bar)


def loss_weights(
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: str,
    snr_gamma: float | None = None,
    rescale: bool = False,
) -> Tensor:
    """The weight of each example's squared error, float [B]. Hang et al. 2023, section 3.4.

    Without snr_gamma every weight is one. With it (the paper takes 5), the implied loss on x_0 is weighted by
    min(SNR, gamma), so that nearly clean examples do not dominate. The divisor turns that weight into one on the
    quantity the U-Net predicts: a squared error in x_0 is one in eps times 1/SNR, in v times 1/(SNR + 1).
    Such weights lie between 0 and 1, so they shrink the loss: on Stable Diffusion's schedule gamma 5 has the mean
    weight 0.92 for eps and 0.29 for v. With rescale they are divided by that mean, taken over all timesteps.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise unknown_prediction_type(prediction_type)
    ratio = snr(timesteps, alphas_cumprod)
    if snr_gamma is None:
        return torch.ones_like(ratio)
    if not snr_gamma > 0:
        raise ValueError(f"snr_gamma must be positive, not {snr_gamma}")
    # epsilon: min(SNR, gamma) / SNR;  v: min(SNR, gamma) / (SNR + 1)
    divisor = ratio if prediction_type == "epsilon" else ratio + 1.0
    weights = ratio.clamp(max=snr_gamma) / divisor
    if rescale:
        # w / mean of w over t = 0 ... T-1
        every = torch.arange(len(alphas_cumprod), device=timesteps.device)
        weights = weights / loss_weights(every, alphas_cumprod, prediction_type, snr_gamma).mean()
    return weights


def unknown_prediction_type(prediction_type: str) -> ValueError:
    """The error for a prediction type that is neither of the two that Stable Diffusion uses."""
    return ValueError(f"unknown prediction type {prediction_type!r}; known: {', '.join(PREDICTION_TYPES)}")

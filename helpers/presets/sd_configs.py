"""The configurations of Stable Diffusion 2.1-base, 2.1 and 1.5, as their repositories on the hub state them.

They say everything about a model but its weights: enough to count its parameters, to measure what a step costs on a GPU
(weights do not change the arithmetic), and to build a small model of the same structure. Loading a model reads the
files of its own folder, never this.

Rombach et al. 2022, arXiv 2112.10752. Stable Diffusion 2 reads text with OpenCLIP's ViT-H, without its last layer: 23
of 24 are in the file, so that the file's last layer is the penultimate one. Version 1 reads with OpenAI's ViT-L.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

_UNET = {
    "sample_size": 64,  # latent pixels on a side: 512 / 8
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
}
# attention_head_dim is the number of heads: diffusers keeps the name, which was a mistake, for the files' sake.
_UNET_1 = _UNET | {"cross_attention_dim": 768, "attention_head_dim": 8}
_UNET_2 = _UNET | {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "dual_cross_attention": False,
    "use_linear_projection": True,
}
_VAE = {
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
_TEXT = {"vocab_size": 49_408, "max_position_embeddings": 77, "layer_norm_eps": 1e-05, "pad_token_id": 1}
_TEXT |= {"bos_token_id": 0, "eos_token_id": 2}
_TEXT_1 = _TEXT | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
_TEXT_2 = _TEXT | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}

CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "sd21-base": {
        "unet": _UNET_2,
        "vae": _VAE,
        "text_encoder": _TEXT_2,
        "scheduler": _SCHEDULER | {"prediction_type": "epsilon"},
    },
    "sd21": {
        "unet": _UNET_2 | {"sample_size": 96, "upcast_attention": True},
        "vae": _VAE | {"sample_size": 768},
        "text_encoder": _TEXT_2,
        "scheduler": _SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},
    },
    "sd15": {  # says nothing of a prediction type, which means epsilon
        "unet": _UNET_1,
        "vae": _VAE,
        "text_encoder": _TEXT_1,
        "scheduler": _SCHEDULER,
    },
}


def build_part(model: str, part: str, device: str | torch.device = "meta", **changes: Any) -> nn.Module:
    """The "unet", "vae" or "text_encoder" of "sd21-base", "sd21" or "sd15" with random weights, float32, frozen.

    On the device "meta" it has shapes and no numbers, and costs nothing. changes: entries of the configuration that
    shall be others. Raises ValueError for an unknown model or part.
    """
    if model not in CONFIGS or part not in ("unet", "vae", "text_encoder"):
        raise ValueError(f"no configuration of the part {part!r} of {model!r}; models: {', '.join(CONFIGS)}")
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    config = copy.deepcopy(CONFIGS[model][part]) | changes
    with torch.device(device):
        if part == "text_encoder":
            module = CLIPTextModel(CLIPTextConfig(**config))
        else:
            module = (AutoencoderKL if part == "vae" else UNet2DConditionModel).from_config(config)
    return module.eval().requires_grad_(False)

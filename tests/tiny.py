"""A U-Net of a few thousand random weights that several test files share."""

import torch
from diffusers import UNet2DConditionModel


def tiny_unet(seed=0, dtype=torch.float32, width=8):
    """Stable Diffusion's structure with two levels; the same seed gives the same weights. In evaluation mode."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(width, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return unet.to(dtype).eval()

"""How many numbers train, on Stable Diffusion's real sizes.

The U-Nets are built on the meta device: shapes without numbers, so that they need no memory and no download.
"""

from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel
from parity_tools import ALPHA, ATTENTION

from helpers import lora

SIZES = {
    "SD 1.5": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "SD 2.1": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
}
PARAMETERS = {"SD 1.5": 859_520_964, "SD 2.1": 865_910_724}
PER_RANK = {"SD 1.5": 199_296, "SD 2.1": 207_488}
LAYERS = 128  # 16 transformer blocks of two attentions with four matrices each


@cache
def full_size_unet(structure):
    """diffusers' default U-Net is Stable Diffusion 1.5's but for these settings."""
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, **SIZES[structure])


@pytest.mark.parametrize("structure", SIZES)
def test_the_unet_itself(parity, structure):
    count = sum(parameter.numel() for parameter in full_size_unet(structure).parameters())
    parity(f"the U-Net has {PARAMETERS[structure]:,} parameters", abs(count - PARAMETERS[structure]), model=structure)


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("structure", SIZES)
def test_lora_on_attention(parity, structure, rank):
    unet = full_size_unet(structure)
    try:
        assert len(lora.inject(unet, ATTENTION, rank, ALPHA)) == LAYERS
        count = sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    finally:
        lora.remove(unet)
    what = f"LoRA on the {LAYERS} matrices of its attention trains {PER_RANK[structure]:,} · r numbers"
    parity(what, abs(count - PER_RANK[structure] * rank), model=structure, r=rank)

"""Making a trained U-Net deeper without changing what it computes, so that training goes on instead of starting anew.

Each block gets a second pair of residual block and transformer behind its first, as identities: the last layer of
a residual branch is zero (Chen et al. 2016, Net2Net, arXiv 1511.05641, section 2.3; zero branches as in Goyal et al.
2017, arXiv 1706.02677, section 5.1). The new layers learn from the first step on, since the branch before its zero
layer is random.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor


def deepen(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A U-Net of two layers a block that computes exactly what `unet`, of one layer a block, does.

    Draws the new layers from the global generator. Raises ValueError for a U-Net of more layers.
    """
    layers = unet.config.layers_per_block
    if layers != 1:
        raise ValueError(f"only a U-Net of 1 layer a block can be deepened, this one has {layers}")
    deeper = type(unet).from_config({**unet.config, "layers_per_block": 2}).to(unet.device)
    old, new = unet.state_dict(), deeper.state_dict()
    deeper.load_state_dict(
        {key: value if (source := _source(key)) is None else old[source] for key, value in new.items()}
    )
    for name, module in deeper.named_modules():
        if name.endswith(("conv2", "proj_out")) and _source(name) is None:
            torch.nn.init.zeros_(module.weight), torch.nn.init.zeros_(module.bias)
        elif name.endswith("conv_shortcut") and _source(name) is None:
            module.weight.data, module.bias.data = _first_channels(module.weight), torch.zeros_like(module.bias)
    return deeper


def _source(key: str) -> str | None:
    """The shallow model's name for the deep model's `key`; None for what is new.

    On the way down the new pair comes second: [0, new]. On the way up, where a block has one pair more than on the
    way down, it comes between: its skip connection is the new pair's on the way down: [0, new, 1].
    """
    parts = key.split(".")
    if parts[0] in ("down_blocks", "up_blocks") and parts[2] in ("resnets", "attentions"):
        if parts[3] == "1":
            return None
        parts[3] = {"0": "0", "2": "1"}[parts[3]]
    return ".".join(parts)


def _first_channels(weight: Tensor) -> Tensor:
    """A 1x1 kernel [out, in, 1, 1] that passes on the first `out` channels and forgets the rest, the skip's."""
    return torch.eye(*weight.shape[:2], device=weight.device)[:, :, None, None]

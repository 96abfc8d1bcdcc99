"""The sizes in the labels, read from the model's configuration and from the presets: nothing is typed.

What the house needs for that is imported when a diagram is drawn, since the model's classes load slowly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Level:
    """One resolution of the U-Net. skips: channels of what comes over from the way down, in the order of use."""

    side: int
    channels: int
    down_layers: int
    up_layers: int
    transformer: bool
    skips: tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """MiniSD's sizes and the course's settings."""

    picture: int
    latent: tuple[int, int, int]  # channels, height, width
    tokens: int
    text_width: int
    levels: tuple[Level, ...]  # from the finest to the coarsest
    rank: int
    alpha: float
    targets: tuple[str, ...]  # of MiniSD's adapters
    attention: tuple[str, ...]  # of Stable Diffusion's
    stable_diffusion_width: int
    steps: int
    guidance: float

    @property
    def transformer_blocks(self) -> int:
        """In the whole U-Net: at every level but the lowest, and one at the bottom."""
        return 1 + sum(level.down_layers + level.up_layers for level in self.levels if level.transformer)


@cache
def sizes() -> Sizes:
    """Read once."""
    from helpers.minisd.architecture import MINI
    from helpers.presets.catalogue import PRESETS
    from helpers.presets.configuration import ATTENTION
    from helpers.presets.sd_configs import CONFIGS

    preset = PRESETS["mini"]
    side = MINI.picture // MINI.downsampling
    return Sizes(
        picture=MINI.picture,
        latent=(MINI.latent_channels, side, side),
        tokens=MINI.text_positions,
        text_width=MINI.text_width,
        levels=tuple(levels(MINI.unet, MINI.unet_layers, side)),
        rank=preset.train.rank,
        alpha=preset.train.alpha,
        targets=preset.train.targets,
        attention=ATTENTION,
        stable_diffusion_width=CONFIGS["sd21-base"]["unet"]["block_out_channels"][-1],
        steps=preset.num_inference_steps,
        guidance=preset.guidance_scale,
    )


def levels(channels: tuple[int, ...], layers: int, side: int) -> list[Level]:
    """The U-Net's levels as diffusers builds them: every result of the way down is used once on the way up.

    Those are the first convolution's, each layer's, and each downsampling's: one more per level than it has layers.
    """
    last = len(channels) - 1
    results = [channels[0]]
    for number, width in enumerate(channels):
        results += [width] * layers + [width] * (number < last)
    skips = [tuple(reversed(results[i : i + layers + 1])) for i in range(0, len(results), layers + 1)]
    return [
        Level(side // 2**number, width, layers, layers + 1, number < last, skips[number])
        for number, width in enumerate(channels)
    ]

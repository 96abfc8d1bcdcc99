"""Pictures of any kind to tensors, to latents, and back."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from helpers.base.errors import unreadable
from helpers.diffusion.components import CHUNK, Components, in_own_precision

CHUNK_PIXELS = 2 * 512 * 512  # of the pictures that go through the VAE at once: each takes over a GB at 512 pixels


def vae_chunk(components: Components) -> int:
    """How many pictures go through the VAE at once."""
    return max(1, min(CHUNK, CHUNK_PIXELS // components.resolution**2))


@torch.no_grad()
def to_latents(components: Components, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each float32 [B, C, h, w], of the latents of pictures [B, 3, H, W] in -1..1.

    Both are multiplied by the VAE's scaling factor, so `mean + std * noise` is what the U-Net is trained on
    (Rombach et al. 2022, section 3.1 and appendix G).
    """
    scale = components.vae.config.scaling_factor
    with in_own_precision(components):
        posteriors = [
            components.vae.encode(chunk.to(components.device, components.vae.dtype)).latent_dist
            for chunk in pictures.split(vae_chunk(components))
        ]
    mean = torch.cat([posterior.mean for posterior in posteriors]).float()
    std = torch.cat([posterior.std for posterior in posteriors]).float()
    return mean * scale, std * scale


@torch.no_grad()
def to_pictures(components: Components, latents: Tensor) -> Tensor:
    """Pictures float32 [B, 3, H, W] in 0..1 that the VAE decodes from latents [B, C, h, w]."""
    latents = latents.to(components.device, components.vae.dtype) / components.vae.config.scaling_factor
    with in_own_precision(components):
        decoded = torch.cat([components.vae.decode(chunk).sample for chunk in latents.split(vae_chunk(components))])
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


def to_pil(pictures: Tensor) -> list[Image.Image]:
    """RGB pictures of a tensor [B, 3, H, W] in 0..1."""
    pixels = (pictures.detach().float() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def to_tensor(picture: Image.Image, size: int) -> Tensor:
    """A picture of any mode as float32 [3, size, size] in -1..1.

    Turned as its EXIF tag says, laid on white where it is transparent, scaled until it covers the square, and cropped
    to the centre. Of an animated picture it is the first frame. Raises DataError for a picture that cannot be decoded.
    """
    try:
        picture = to_rgb(ImageOps.exif_transpose(picture))
    except (OSError, SyntaxError, ValueError) as error:
        raise unreadable(getattr(picture, "filename", ""), error) from error
    picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    # 0..255 to -1..1
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1.0


def to_rgb(picture: Image.Image) -> Image.Image:
    """The picture in mode RGB: transparency on white, 16-bit and floating-point grey scaled to 8 bits."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        picture = to_8_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def to_8_bits(picture: Image.Image) -> Image.Image:
    """Grey of many bits as mode L. Floats up to 1 are taken for 0..1; values above 255 for 16 bits."""
    grey = np.asarray(picture).astype(np.float64)
    if picture.mode.startswith("I;16") or grey.max() > 255:
        grey = grey / 257  # 65535 / 255
    elif picture.mode == "F" and grey.max() <= 1:
        grey = grey * 255
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))

"""Stable Diffusion as a whole: from a prompt and noise to an image."""

from __future__ import annotations

from helpers.diagrams.canvas import Canvas, Picture
from helpers.diagrams.sizes import sizes


def stable_diffusion() -> Picture:
    """The whole of Stable Diffusion as it generates, and the VAE's encoder, which only training needs."""
    size = sizes()
    canvas = Canvas("stable_diffusion", 452)
    latent, image = " × ".join(map(str, size.latent)), f"3 × {size.picture} × {size.picture}"
    _prompt(canvas, f"{size.tokens} tokens", f"{size.tokens} × {size.text_width}")

    canvas.box(20, 168, 98, 60, "noise", "data", latent)
    canvas.group(136, 104, 388, 216, f"repeat {size.steps} times")
    canvas.arrow((366, 68), (366, 84), (286, 84), (286, 156), colour="text_encoder", width=2.4)
    canvas.arrow((118, 198), (150, 198))
    canvas.box(150, 168, 84, 60, "latents", "data", "at step *t*")
    canvas.arrow((234, 198), (260, 198))
    canvas.box(260, 156, 88, 84, "U-Net", "unet")
    canvas.rectangle(308, 112, 70, 20, "scheduler", r=5)
    canvas.label(343, 126.5, "timestep *t*", ink="solid-ink")
    canvas.arrow((328, 132), (328, 156), colour="scheduler", width=2.4)
    canvas.arrow((348, 198), (424, 198))
    canvas.label(385, 190, "prediction")
    canvas.box(424, 156, 90, 84, "scheduler", "scheduler", "one step less\nof noise", size=13)
    canvas.arrow((214, 228), (214, 262), (446, 262), (446, 240))
    canvas.arrow((490, 240), (490, 286), (172, 286), (172, 228))
    canvas.label(331, 306, "less noisy latents, for the next step")

    canvas.label(616, 146, "after the last step")
    canvas.arrow((514, 198), (556, 198))
    canvas.box(556, 168, 124, 60, "VAE decoder", "vae", f"{size.picture // size.latent[1]} times as wide")
    canvas.arrow((618, 228), (618, 262))
    canvas.box(556, 262, 124, 58, "image", "data", image)
    _encoder(canvas, image, latent)
    return canvas.picture(
        "Stable Diffusion",
        f"The prompt goes through tokenizer and text encoder to {size.tokens} embeddings of width {size.text_width},"
        f" which enter the U-Net. Noise, {latent}, is the first latents. {size.steps} times the U-Net takes latents and"
        " timestep and outputs a prediction, from which the scheduler makes less noisy latents for the next step. After"
        f" the last step the VAE's decoder makes the image, {image}. The VAE's encoder, from image to latents, is"
        " needed for training only.",
    )


def _prompt(canvas: Canvas, tokens: str, embeddings: str) -> None:
    canvas.box(20, 20, 152, 48, '"a cat with a hat"', "data", "prompt", size=13)
    canvas.arrow((172, 44), (196, 44))
    canvas.box(196, 20, 110, 48, "tokenizer", "text_encoder", tokens)
    canvas.arrow((306, 44), (330, 44))
    canvas.box(330, 20, 130, 48, "text encoder", "text_encoder", embeddings)


def _encoder(canvas: Canvas, image: str, latent: str) -> None:
    canvas.group(20, 340, 660, 92, "for training only")
    canvas.box(180, 362, 104, 52, "image", "data", image)
    canvas.arrow((284, 388), (312, 388))
    canvas.box(312, 362, 124, 52, "VAE encoder", "vae")
    canvas.arrow((436, 388), (464, 388))
    canvas.box(464, 362, 104, 52, "latents", "data", latent)

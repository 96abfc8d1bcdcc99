"""What is done again and again: a step of sampling, and a step of training."""

from __future__ import annotations

from helpers.diagrams.canvas import Canvas, Picture
from helpers.diagrams.sizes import sizes


def sampling_step() -> Picture:
    """One step of sampling: the U-Net with and without the prompt, guidance, the scheduler, and round again."""
    size = sizes()
    canvas = Canvas("sampling_step", 434)
    canvas.box(20, 156, 92, 60, "latents", "data", "*x*~t~, noisy")
    canvas.group(144, 66, 196, 240, "one batch of two")
    for y, prompt, there, name in (
        (100, "the prompt", 18, "prediction with the prompt"),
        (222, "empty prompt", 322, "prediction without the prompt"),
    ):
        canvas.box(182, y, 120, 50, "U-Net", "unet")
        canvas.box(182, there, 120, 32, prompt, "text_encoder", size=13)
        start, end = (there + 32, y) if there < y else (there, y + 50)
        canvas.arrow((286, start), (286, end), colour="text_encoder", width=2.4)
        canvas.arrow((112, 186), (164, 186), (164, y + 25), (182, y + 25))
        canvas.arrow((302, y + 25), (372, y + 25), (372, 168 if y < 186 else 204), (404, 168 if y < 186 else 204))
        canvas.label(356, y + (14 if y < 186 else 48), name, anchor="start")
    canvas.rectangle(206, 176, 72, 20, "scheduler", r=5)
    canvas.label(242, 190.5, "timestep *t*", ink="solid-ink")
    canvas.arrow((242, 176), (242, 150), colour="scheduler", width=2.4)
    canvas.arrow((242, 196), (242, 222), colour="scheduler", width=2.4)
    canvas.box(404, 150, 136, 72, "guidance", "plain", f"without + *w* ·\n(with − without)\n*w* = {size.guidance:g}")
    canvas.arrow((540, 186), (572, 186))
    canvas.box(572, 150, 108, 72, "scheduler", "scheduler", "one step less\nof noise")
    canvas.arrow((82, 216), (82, 372), (604, 372), (604, 222))
    canvas.arrow((648, 222), (648, 396), (48, 396), (48, 216))
    canvas.label(350, 418, f"less noisy latents, for the next step of {size.steps}")
    return canvas.picture(
        "One step of sampling",
        "Noisy latents and the timestep go through the U-Net twice in one batch, with the prompt and with an empty one."
        f" Guidance makes without + w (with - without) of the two predictions, w = {size.guidance:g}. From that and the"
        f" latents the scheduler makes less noisy latents, with which the next of {size.steps} steps begins.",
    )


def training_step() -> Picture:
    """One step of training an adapter: what is computed, what is compared, and what changes."""
    canvas = Canvas("training_step", 422)
    _inputs(canvas)
    canvas.box(540, 20, 140, 214, "", "unet")
    canvas.label(610, 48, "U-Net", 14, bold=True)
    canvas.label(610, 66, "frozen")
    canvas.rectangle(562, 136, 96, 56, "lora", "lora")
    canvas.label(610, 160, "LoRA: A, B", 14, bold=True, ink="solid-ink")
    canvas.label(610, 178, "trained", ink="solid-ink")
    canvas.arrow((578, 234), (578, 284))
    canvas.label(570, 264, "prediction", anchor="end")
    canvas.box(348, 284, 156, 60, "target", "scheduler", "*v* from *x*~0~, noise, *t*")
    canvas.arrow((504, 314), (556, 314))
    canvas.box(556, 284, 124, 60, "loss", "plain", "squared error")
    canvas.arrow((618, 284), (618, 192), colour="lora", width=3, dashed=True)
    canvas.label(628, 264, "gradient", anchor="start")
    _legend(canvas)
    return canvas.picture(
        "One step of training",
        "The frozen VAE encoder turns the image into latents x_0; noise is added, as much as the timestep says, and the"
        " noisy latents x_t enter the frozen U-Net with its LoRA, together with the timestep and the caption from the"
        " frozen text encoder. The loss is the squared error between the U-Net's prediction and the target, the"
        " velocity v. Its gradient changes A and B of the LoRA and nothing else.",
    )


def _inputs(canvas: Canvas) -> None:
    """Caption, image, noise and timestep, on their way into the U-Net and the target."""
    canvas.box(20, 20, 92, 50, "caption", "data")
    canvas.arrow((112, 45), (140, 45))
    canvas.box(140, 20, 126, 50, "text encoder", "text_encoder", "frozen")
    canvas.arrow((266, 45), (540, 45), colour="text_encoder", width=2.4)
    canvas.box(20, 98, 80, 50, "image", "data")
    canvas.arrow((100, 123), (124, 123))
    canvas.box(124, 98, 120, 50, "VAE encoder", "vae", "frozen")
    canvas.arrow((244, 123), (268, 123))
    canvas.box(268, 98, 84, 50, "latents", "data", "*x*~0~")
    canvas.arrow((352, 123), (376, 123))
    canvas.box(376, 98, 112, 50, "add noise", "scheduler", "more at larger *t*")
    canvas.arrow((488, 123), (540, 123))
    canvas.label(512, 114, "*x*~t~", 13)
    canvas.box(368, 188, 76, 34, "noise", "data")
    canvas.arrow((406, 188), (406, 148))
    canvas.arrow((406, 222), (406, 284))
    canvas.rectangle(456, 195, 22, 20, "scheduler", r=5)
    canvas.label(467, 209.5, "*t*", 13, bold=True, ink="solid-ink")
    canvas.label(483, 198, "timestep", anchor="start")
    for turn in (((467, 195), (467, 148)), ((467, 215), (467, 284)), ((478, 205), (540, 205))):
        canvas.arrow(*turn, colour="scheduler", width=2.4)
    canvas.arrow((310, 148), (310, 314), (348, 314))


def _legend(canvas: Canvas) -> None:
    canvas.rectangle(20, 380, 28, 20, "unet-pale", "unet", r=5)
    canvas.label(58, 395, "frozen: computes, never changes", anchor="start")
    canvas.rectangle(292, 380, 28, 20, "lora", "lora", r=5)
    canvas.label(330, 395, "trained", anchor="start")
    canvas.arrow((410, 390), (452, 390), colour="lora", width=3, dashed=True)
    canvas.label(464, 395, "gradient: changes A and B only", anchor="start")

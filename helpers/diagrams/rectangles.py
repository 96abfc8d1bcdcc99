"""LoRA to scale: a big square beside two thin rectangles."""

from __future__ import annotations

from helpers.diagrams.canvas import Canvas, Picture
from helpers.diagrams.sizes import sizes


def lora() -> Picture:
    """W beside B and A, drawn to scale: a square layer of MiniSD, and in an inset one of Stable Diffusion."""
    size = sizes()
    canvas = Canvas("lora", 530)
    n, r, wide = size.levels[-1].channels, size.rank, size.stable_diffusion_width
    canvas.text(350, 46, "*y*  =  {unet:W} *x*  +  (*α* / *r*) {lora:B} {lora:A} *x*", 25, bold=True)
    settings = f"rank *r* = {r} and *α* = {size.alpha:g}, so *α* / *r* = {size.alpha / r:g}"
    canvas.label(350, 71, settings, 13)

    canvas.label(40, 108, f"A layer of MiniSD with {n} inputs and {n} outputs", 14, anchor="start", bold=True)
    top, left = 122, 40
    canvas.box(left, top, n, n, "*W*", "unet", f"{n} × {n}\n{n * n:,} parameters\nfrozen", size=22)
    canvas.text(left + n + 32, top + n / 2 + 9, "+", 28, bold=True)
    b, a = left + n + 64, left + n + 64 + r + 150
    canvas.rectangle(b, top, r, n, "lora", r=2)
    canvas.label(b + r + 12, top + 78, "*B*", 22, anchor="start", bold=True)
    canvas.label(b + r + 12, top + 99, f"{n} × {r}\n{n * r:,} parameters\ntrained", anchor="start")
    canvas.rectangle(a, top, n, r, "lora", r=2)
    canvas.label(a + n / 2, top + r + 27, "*A*", 22, bold=True)
    canvas.label(a + n / 2, top + r + 48, f"{r} × {n}\n{n * r:,} parameters\ntrained")
    canvas.label(a + n / 2, top + 144, _share(n, r), 14, bold=True)
    canvas.label(a + n / 2, top + 164, f"{2 * n * r:,} in place of {n * n:,} parameters")

    _inset(canvas, wide, r)
    return canvas.picture(
        "LoRA: a big square beside two thin rectangles",
        f"y = Wx + (alpha / r) BAx. Drawn to scale, W is a square of {n} by {n}, frozen; B is {n} by {r} and A {r} by"
        f" {n}, thin rectangles that train: {2 * n * r:,} parameters in place of {n * n:,}. Below, a layer of Stable"
        f" Diffusion of {wide:,} by {wide:,}: at the same rank {2 * wide * r:,} in place of {wide * wide:,}, so B and A"
        " are hairlines.",
    )


def _inset(canvas: Canvas, n: int, r: int) -> None:
    """A layer of Stable Diffusion, at a tenth of the scale."""
    canvas.rectangle(20, 340, 660, 170, "group-pale", "edge", r=10)
    top, left, side, thin = 361, 40, 0.1 * n, 0.1 * r
    canvas.box(left, top, side, side, "*W*", "unet", f"{n:,} ×\n{n:,}", size=18)
    canvas.text(left + side + 27, top + side / 2 + 7, "+", 22, bold=True)
    b, a, words = left + side + 54, left + side + 100, 424
    canvas.rectangle(b, top, thin, side, "lora", r=0)
    canvas.label(b + 12, top + side / 2 + 6, "*B*", 18, anchor="start", bold=True)
    canvas.rectangle(a, top, side, thin, "lora", r=0)
    canvas.label(a + side / 2, top + 24, "*A*", 18, bold=True)
    said = f"A layer of Stable Diffusion, a tenth\nof the scale, with the same rank {r}"
    canvas.label(words, top + 14, said, 13, anchor="start")
    canvas.label(words, top + 66, _share(n, r), 14, anchor="start", bold=True)
    canvas.label(words, top + 86, f"{2 * n * r:,} in place of\n{n * n:,} parameters", anchor="start")


def _share(n: int, r: int) -> str:
    return f"B and A: {100 * 2 * r / n:.1f}% of W"

"""Inside the U-Net: its levels and skip connections, and one of its transformer blocks."""

from __future__ import annotations

from helpers.diagrams.canvas import Canvas, Picture
from helpers.diagrams.sizes import Level, sizes

_SHEET = 48  # channels that one sheet of a stack of feature maps stands for


# ---------------------------------------------------------------------------------------------------- the U-Net
def unet() -> Picture:
    """MiniSD's U-Net: resolutions, channels, skip connections, and where timestep and text enter."""
    size = sizes()
    canvas = Canvas("unet", 604)
    latent = " × ".join(map(str, size.latent))
    width, inset, tops, heights = 240, 16, (80, 208, 336), (90, 90, 66)
    canvas.box(20, 16, 222, 34, f"noisy latents {latent}", "data", size=13)
    canvas.box(458, 16, 222, 34, f"prediction {latent}", "data", size=13)
    first, last = size.levels[0], size.levels[-1]
    canvas.arrow((48, 50), (48, 80))
    canvas.label(60, 69, f"convolution, {size.latent[0]} to {first.channels} channels", anchor="start")
    canvas.arrow((652, 80), (652, 50))
    canvas.label(640, 69, f"convolution, {first.channels} to {size.latent[0]} channels", anchor="end")
    for number, (level, top, height) in enumerate(zip(size.levels, tops, heights, strict=True)):
        left, right = 20 + number * inset, 680 - width - number * inset
        title = f"{level.side} × {level.side}, {level.channels} channels"
        for x, layers in ((left, level.down_layers), (right, level.up_layers)):
            _level(canvas, (x, top, width, height), title, level, layers, layers * level.transformer)
        middle = top + height / 2
        canvas.arrow((left + width, middle), (right, middle), colour="unet", width=3)
        canvas.label(350, middle - 12, f"{len(level.skips)} skips", bold=True, size=13)
        canvas.label(350, middle + 21, " + ".join(map(str, level.skips)))
        if level is last:
            continue
        x, below = 64 + number * inset, top + height
        canvas.arrow((x, below), (x, tops[number + 1]))
        canvas.label(x + 12, below + 24, "half the width and height", anchor="start")
        canvas.arrow((700 - x, tops[number + 1]), (700 - x, below))
        canvas.label(688 - x, below + 24, "twice the width and height", anchor="end")
    bottom = tops[-1] + heights[-1]
    canvas.arrow((110, bottom), (110, 478), (222, 478))
    canvas.arrow((478, 478), (590, 478), (590, bottom))
    title = f"middle: {last.side} × {last.side}, {last.channels} channels"
    _level(canvas, (222, 432, 256, 90), title, last, 2, 1)
    _chip(canvas, 20, 561, "t")
    canvas.label(50, 561, "the timestep, to every residual block", anchor="start")
    _chip(canvas, 20, 584, "text")
    prompt = f"the prompt, {size.tokens} × {size.text_width}, to every transformer block"
    canvas.label(68, 584, prompt, anchor="start")
    canvas.arrow((410, 556), (446, 556), colour="unet", width=3)
    canvas.label(456, 561, "skip connection: joined as channels", anchor="start")
    canvas.rectangle(420, 570, 18, 18, "ground", "unet", r=1)
    canvas.label(456, 584, f"feature maps: a sheet is {_SHEET} channels", anchor="start")
    return canvas.picture(
        "MiniSD's U-Net",
        f"The U-Net of MiniSD. Noisy latents {latent} go down through levels of "
        + ", ".join(f"{level.side} by {level.side} with {level.channels} channels" for level in size.levels)
        + f", through a middle, and up through the same levels to a prediction {latent}. Arrows across, the skip"
        f" connections, carry {len(last.skips)} results of each level's way down to its way up. The timestep enters"
        " every residual block, the prompt's embeddings every transformer block; the lowest level has a transformer"
        " block in the middle only.",
    )


def _level(
    canvas: Canvas, place: tuple[float, float, float, float], title: str, level: Level, residual: int, transformer: int
) -> None:
    """A level's box on one side of the U: its blocks, what enters them, and its feature maps as a stack of sheets."""
    x, y, w, h = place
    canvas.box(x, y, w, h, "", "unet")
    canvas.label(x + w / 2, y + 23, title, size=14, bold=True)
    rows = [(residual, "residual block", "t"), (transformer, "transformer block", "text")]
    for number, (count, block, enters) in enumerate(rows[: 2 if transformer else 1]):
        canvas.label(x + 12, y + 48 + 25 * number, f"{count} × {block}", anchor="start")
        _chip(canvas, x + 152, y + 48 + 25 * number, enters)
    side, sheets = 1.9 * level.side, round(level.channels / _SHEET)
    for sheet in reversed(range(sheets)):
        shift = 3 * (sheet - (sheets - 1) / 2)
        corner = x + 217 - side / 2 + shift, y + h - 33 - side / 2 - shift
        canvas.rectangle(*corner, side, side, "ground", "unet", r=1)


def _chip(canvas: Canvas, x: float, y: float, enters: str) -> None:
    part, width = ("scheduler", 22) if enters == "t" else ("text_encoder", 40)
    canvas.rectangle(x, y - 14, width, 19, part, r=5)
    canvas.label(x + width / 2, y, enters, bold=True, ink="solid-ink")


# ------------------------------------------------------------------------------------------- a transformer block
_COLUMNS, _COLUMN = (76, 257, 438), 175
_TOP, _FOOT, _STREAM = 12, 332, 82  # of the columns, and the height of the residual stream


def transformer_block() -> Picture:
    """One transformer block of the U-Net: two attentions and a feed-forward network, and where LoRA sits."""
    size = sizes()
    canvas = Canvas("transformer_block", 530)
    words = {
        "self-attention": "positions read each other",
        "cross-attention": "positions read the prompt",
        "feed-forward": "each position by itself",
    }
    for x, (title, said) in zip(_COLUMNS, words.items(), strict=True):
        canvas.rectangle(x, _TOP, _COLUMN, _FOOT - _TOP, "group-pale", "edge", r=10)
        canvas.label(x + _COLUMN / 2, _TOP + 21, title, size=14, bold=True)
        canvas.label(x + _COLUMN / 2, _TOP + 39, said)
    _residuals(canvas)
    canvas.box(264, 354, 162, 32, f"prompt, {size.tokens} × {size.text_width}", "text_encoder")
    for column in _COLUMNS[:2]:
        _attention(canvas, column)
    self_attention, cross_attention, feed_forward = _COLUMNS
    for key in (self_attention + 36, self_attention + 84):
        canvas.arrow((self_attention + 16, 119), (self_attention + 7, 119), (self_attention + 7, 318), (key, 318),
                     (key, 294))  # fmt: skip
    for key in (cross_attention + 36, cross_attention + 84):
        canvas.arrow((key, 354), (key, 294), colour="text_encoder", width=2.4)
    _feed_forward(canvas, feed_forward)
    adapted = sum(2 if target in size.attention else 1 for target in size.targets)
    _linear(canvas, 12, 484, 64, 28, "linear")
    canvas.label(90, 493, "The orange edge is an adapter: LoRA's A and B beside a linear layer.", anchor="start")
    others = f"Stable Diffusion's usual choice: the {2 * len(size.attention)} of the attentions."
    canvas.label(90, 512, f"MiniSD: {adapted} in each block, {adapted * size.transformer_blocks} in all. {others}",
                 anchor="start")  # fmt: skip
    return canvas.picture(
        "A transformer block of the U-Net",
        "A transformer block. proj_in leads into a residual stream, to which three parts add: self-attention, whose"
        " queries, keys and values all come from the image; cross-attention, whose keys and values come from the"
        f" prompt's {size.tokens} embeddings; and a feed-forward network. proj_out leads out, and the block's input is"
        f" added again. LoRA sits on each of the {adapted} linear layers: proj_in, to_q, to_k, to_v and to_out of both"
        " attentions, both layers of the feed-forward network, and proj_out.",
    )


def _residuals(canvas: Canvas) -> None:
    """The stream through the columns, and the connection around the whole block."""
    start = 68.0
    canvas.box(12, 430, 190, 32, "from a residual block", "data", size=13)
    canvas.arrow((40, 430), (40, 102))
    _linear(canvas, 12, _STREAM - 20, 56, 40, "proj_in")
    for x in _COLUMNS:
        canvas.line((start, _STREAM), (x + 134, _STREAM), colour="unet", width=3)
        canvas.plus(x + 144, _STREAM)
        start = x + 154
    canvas.arrow((start, _STREAM), (624, _STREAM), colour="unet", width=3)
    _linear(canvas, 624, _STREAM - 20, 64, 40, "proj_out")
    canvas.arrow((656, 102), (656, 393))
    canvas.line((40, 403), (646, 403), colour="unet", width=3)
    canvas.plus(656, 403)
    canvas.arrow((656, 413), (656, 430))
    canvas.box(512, 430, 176, 32, "to the next block", "data", size=13)
    canvas.label(357, 424, "the block's input is added again")


def _attention(canvas: Canvas, x: float) -> None:
    """Norm and queries from above, keys and values from below, the result back up to the stream."""
    canvas.arrow((x + 60, _STREAM), (x + 60, 106))
    canvas.box(x + 16, 106, 88, 26, note="norm")
    canvas.arrow((x + 60, 132), (x + 60, 152))
    _linear(canvas, x + 16, 152, 88, 28, "to_q")
    canvas.arrow((x + 60, 180), (x + 60, 204))
    canvas.box(x + 16, 204, 88, 36, note="attention")
    for left, name in ((16, "to_k"), (64, "to_v")):
        _linear(canvas, x + left, 266, 40, 28, name)
        canvas.arrow((x + left + 20, 266), (x + left + 20, 240))
    canvas.arrow((x + 104, 222), (x + 118, 222))
    _linear(canvas, x + 118, 204, 52, 36, "to_out")
    canvas.arrow((x + 144, 204), (x + 144, _STREAM + 10))


def _feed_forward(canvas: Canvas, x: float) -> None:
    canvas.arrow((x + 60, _STREAM), (x + 60, 106))
    canvas.box(x + 16, 106, 88, 26, note="norm")
    canvas.arrow((x + 60, 132), (x + 60, 152))
    _linear(canvas, x + 12, 152, 96, 28, "ff.net.0.proj")
    canvas.arrow((x + 60, 180), (x + 60, 204))
    canvas.box(x + 16, 204, 88, 36, note="GEGLU")
    canvas.arrow((x + 60, 240), (x + 60, 266))
    _linear(canvas, x + 12, 266, 96, 28, "ff.net.2")
    canvas.arrow((x + 108, 280), (x + 144, 280), (x + 144, _STREAM + 10))


def _linear(canvas: Canvas, x: float, y: float, w: float, h: float, text: str) -> None:
    """A linear layer, and its adapter as a solid edge."""
    canvas.rectangle(x, y, w, h, "unet-pale", "unet", r=4)
    canvas.rectangle(x + w - 7, y, 7, h, "lora", "lora", r=2)
    canvas.label(x + (w - 7) / 2, y + h / 2 + 4.3, text)

"""One colour per part of Stable Diffusion, the same in every diagram, each for a light and a dark ground.

The hues are those of the course's figures (Okabe and Ito's palette, which colour-blind readers can tell apart). A
frozen part has a pale face and a strong frame; what trains has a solid face.
"""

from __future__ import annotations

from typing import NamedTuple


class Colour(NamedTuple):
    """The same role on a light and on a dark ground, as #RRGGBB."""

    light: str
    dark: str


PARTS = ("data", "vae", "text_encoder", "unet", "scheduler", "lora")

COLOURS = {
    "ground": Colour("#FFFFFF", "#1B1F26"),
    "edge": Colour("#D0D5DB", "#434A55"),
    "ink": Colour("#1F2328", "#EEF1F4"),
    "wire": Colour("#57606A", "#AEB6C2"),
    "plain": Colour("#57606A", "#AEB6C2"),  # a box that is no part: arithmetic
    "plain-pale": Colour("#FFFFFF", "#1B1F26"),
    "group-pale": Colour("#F6F7F9", "#232830"),
    "solid-ink": Colour("#FFFFFF", "#1F1206"),  # on a solid face
    "data": Colour("#57606A", "#AEB6C2"),
    "data-pale": Colour("#E7EAEE", "#3A414C"),
    "vae": Colour("#966500", "#F2B632"),
    "vae-pale": Colour("#FBE6B5", "#4B3A0C"),
    "text_encoder": Colour("#00724E", "#45CFA0"),
    "text_encoder-pale": Colour("#C9EEE0", "#0D4635"),
    "unet": Colour("#0064A1", "#67B7F0"),
    "unet-pale": Colour("#D0E5F5", "#103C5E"),
    "scheduler": Colour("#9B3F73", "#E8A3CA"),
    "scheduler-pale": Colour("#F6DCEA", "#552D46"),
    "lora": Colour("#C04D00", "#FF9A5C"),
    "lora-pale": Colour("#FCE0CE", "#5A2E10"),
}

"""Diagrams of the course: eight drawings of the model and of LoRA, as vectors, with sizes read from the model.

Each call, `diagrams.unet()`, returns a picture that Jupyter shows. canvas.py is the whole drawing program.
"""

from helpers.diagrams.canvas import Picture
from helpers.diagrams.loops import sampling_step, training_step
from helpers.diagrams.model import stable_diffusion
from helpers.diagrams.network import transformer_block, unet
from helpers.diagrams.rectangles import lora
from helpers.diagrams.vectors import guidance, velocity

__all__ = [
    "Picture",
    "guidance",
    "lora",
    "sampling_step",
    "stable_diffusion",
    "training_step",
    "transformer_block",
    "unet",
    "velocity",
]

"""How much memory training a preset takes, by counted bytes, and the settings that bring it into a given GPU.

Autograd keeps some bytes of each picture that a step computes at once; they grow with the picture's area. A test counts
them from Stable Diffusion's shapes (tests/presets/test_memory.py) and holds this table to it. What lies there besides
is the model itself, and room for what a kernel needs for a moment.
"""

from __future__ import annotations

import math
from dataclasses import replace

from helpers.presets.configuration import ATTENTION, Preset

GB, GIB = 1e9, 2**30
# GiB that a GPU with so much memory tells of at least; a "16 GB" T4 tells of 14.6.
MEMORY: dict[str, float] = {"24gb": 21.0, "16gb": 14.0, "12gb": 10.5, "8gb": 7.0}
KEPT_SIDE = 512  # pixels on a side of the pictures that KEPT_GB is for

# GB that a step keeps of a picture of KEPT_SIDE: (U-Net in half precision, or float32), whether checkpointed
KEPT_GB = {("half", False): 1.15, ("half", True): 0.14, ("full", False): 1.55, ("full", True): 0.22}
MORE_TARGETS = 1.17  # times as much where all linear layers are adapted, not attention alone
LARGEST_BLOCK = 0.3  # of what is kept without checkpointing: the block that checkpointing computes again at a time
TEXT_ENCODER_GB = 0.2  # of a caption, where the text encoder trains too: 23 layers of 77 tokens; estimated, not counted
MODEL_GB = {"half": 3.5, "full": 5.3}  # U-Net, and VAE and text encoder in float32, of version 2.1; 1.5 has 0.9 less
FOR_A_MOMENT_GB = 2.0  # CUDA's own, the workspaces of convolutions, what lies between two blocks of memory
MARGIN = 1.15  # times what is kept: gradients on their way back


def kept_gb(preset: Preset, precision: str) -> float:
    """GB that a step keeps of one picture. precision: "half" or "full"."""
    area = (preset.resolution / KEPT_SIDE) ** 2
    more = 1.0 if preset.train.targets == ATTENTION else MORE_TARGETS
    kept = {again: KEPT_GB[precision, again] * area * more for again in (False, True)}
    text = TEXT_ENCODER_GB if preset.train.train_text_encoder else 0.0
    if not preset.train.gradient_checkpointing:
        return kept[False] + text
    return kept[True] + LARGEST_BLOCK * kept[False] + text


def training_gib(preset: Preset, on_gpu: bool = True) -> float:
    """GiB that training a preset of Stable Diffusion takes. on_gpu: False for a CPU or an Apple GPU, in float32."""
    half = on_gpu and preset.dtype != "float32"
    precision = "half" if half else "full"
    at_once = math.ceil(preset.train.batch_size / preset.train.gradient_accumulation_steps)
    return (MODEL_GB[precision] + FOR_A_MOMENT_GB + MARGIN * at_once * kept_gb(preset, precision)) * GB / GIB


def cut_to_fit(preset: Preset, gib: float) -> Preset:
    """The preset in the largest parts of a batch that fit into so many GiB.

    Checkpointed only where not even one picture fits without, since it costs a third more time. Where nothing fits, the
    least.
    """
    parts = [2**k for k in range(preset.train.batch_size.bit_length()) if 2**k <= preset.train.batch_size]
    for again in (False, True):
        for count in parts:
            settings = {"gradient_accumulation_steps": count, "gradient_checkpointing": again}
            smaller = replace(preset, train=replace(preset.train, **settings))
            if training_gib(smaller) <= gib:
                return smaller
    return smaller


def rungs(preset: Preset) -> dict[str, dict]:
    """{variant: settings} of the GPU sizes in MEMORY that ask for other settings than the larger one before them."""
    found: dict[str, dict] = {}
    before = preset.train
    for variant, gib in MEMORY.items():
        train = cut_to_fit(preset, gib).train
        if train != before:
            names = ("gradient_accumulation_steps", "gradient_checkpointing")
            found[variant] = {name: getattr(train, name) for name in names}
        before = train
    return found

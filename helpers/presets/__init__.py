"""What runs: base model, datasets, budgets and prompts as frozen presets, and what this machine takes of them.

`get_preset("mini")` is the default; `get_preset("sd21-base@8gb@trial")` is Stable Diffusion on a small GPU, tried out.
"""

from helpers.presets.catalogue import PRESETS
from helpers.presets.configuration import ATTENTION, LINEAR, TEXT_ATTENTION, Datasets, DatasetSpec, Preset, TrainConfig
from helpers.presets.memory import MEMORY
from helpers.presets.variants import get_preset

__all__ = [
    "ATTENTION",
    "DatasetSpec",
    "Datasets",
    "LINEAR",
    "MEMORY",
    "PRESETS",
    "Preset",
    "TEXT_ATTENTION",
    "TrainConfig",
    "get_preset",
]

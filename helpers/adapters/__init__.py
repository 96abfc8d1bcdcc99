"""Adapter files: read, checked, loaded, written and described, in the layouts of diffusers, PEFT and kohya's tools.

What is saved here other software loads to the same pictures, and the other way round.
"""

from helpers.adapters.cards import inspect, write_card
from helpers.adapters.configuration import Adapter, AdapterError
from helpers.adapters.loading import load_adapter
from helpers.adapters.reading import read_adapter
from helpers.adapters.writing import save_adapter, write_adapter

__all__ = [
    "Adapter",
    "AdapterError",
    "inspect",
    "load_adapter",
    "read_adapter",
    "save_adapter",
    "write_adapter",
    "write_card",
]

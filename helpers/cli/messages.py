"""What a command says when something is wrong, or will take long."""

from __future__ import annotations

import sys

from helpers.base.errors import CourseError, is_out_of_memory
from helpers.presets.configuration import Preset

DEFAULT = "mini"


def is_readers(error: Exception) -> bool:
    """Whether the reader can mend it. ComponentsError, DataError and AdapterError are ValueErrors."""
    expected = (CourseError, ValueError, OSError)
    # A module that a command has not imported cannot have raised its error.
    own = {
        "helpers.training.runs": "TrainingError",
        "helpers.course.report": "ReportError",
        "helpers.studies.sweep": "SweepError",
    }
    own_errors = tuple(getattr(sys.modules.get(module), name, CourseError) for module, name in own.items())
    return isinstance(error, expected + own_errors) or is_out_of_memory(type(error).__name__, str(error))


def warn_without_gpu(preset: Preset) -> None:
    """Stable Diffusion on a CPU works, and takes a patience that one should know of before."""
    if preset.on_hub:
        from helpers.presets.machine import notes_without_gpu

        for note in notes_without_gpu(preset):
            print(f"note: {note}")


def sentence_of(error: Exception, preset: str = DEFAULT) -> str:
    """The error's message on one line, or its kind where it has none; without memory, which preset takes less."""
    if is_out_of_memory(type(error).__name__, str(error)):
        from helpers.presets.machine import out_of_memory

        return out_of_memory(preset)
    return " ".join(str(error).split()) or type(error).__name__

"""What a command says when something is wrong, or will take long."""

from __future__ import annotations

import sys

from helpers.presets.configuration import Preset

DEFAULT = "mini"


def is_readers(error: Exception) -> bool:
    """Whether the reader can mend it. ComponentsError, DataError and AdapterError are ValueErrors."""
    from helpers.base.errors import CourseError

    expected = (CourseError, ValueError, OSError)
    # A module that a command has not imported cannot have raised its error.
    own = {
        "helpers.training.runs": "TrainingError",
        "helpers.course.report": "ReportError",
        "helpers.studies.sweep": "SweepError",
    }
    own_errors = tuple(getattr(sys.modules.get(module), name, CourseError) for module, name in own.items())
    return isinstance(error, expected + own_errors) or is_out_of_memory(error)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU had no memory left."""
    return type(error).__name__ == "OutOfMemoryError"  # torch's, which may not have been imported


def memory_advice(preset: str) -> str:
    """The sentence for a GPU without memory left: which settings of the preset take less."""
    from helpers.presets.machine import out_of_memory

    return out_of_memory(preset)


def warn_without_gpu(preset: Preset) -> None:
    """Stable Diffusion on a CPU works, and takes a patience that one should know of before."""
    if preset.on_hub:
        from helpers.presets.machine import notes_without_gpu

        for note in notes_without_gpu(preset):
            print(f"note: {note}")


def sentence_of(error: Exception) -> str:
    """The error's message on one line, or its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__

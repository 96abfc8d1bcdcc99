"""Errors that several rooms raise and that a reader can mend, each in one sentence."""

from __future__ import annotations

from PIL import Image, UnidentifiedImageError


class CourseError(Exception):
    """Something the reader can mend; the message is one sentence that says what."""


class DataError(ValueError):
    """A dataset cannot be used; the message names the file, column or row."""


# What a plain RuntimeError says that means no memory: of an Apple GPU, of main memory on Linux and macOS, on Windows
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(kind: str, message: str) -> bool:
    """Whether an error of that class name and message says that a GPU, or the machine, had no memory left."""
    # By name: torch may not have been imported, and a notebook's kernel sends names only
    return kind == "OutOfMemoryError" or (kind == "RuntimeError" and any(words in message for words in _NO_MEMORY))


def unreadable(name: str, error: Exception) -> DataError:
    """What to say of a picture, given what Pillow raised."""
    reason = str(error)
    if isinstance(error, UnidentifiedImageError):
        reason = "it is empty, or not a picture of a format that Pillow knows"
    elif isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # never 0 here: without a limit Pillow does not raise this
        reason = f"it has more than the {limit:,} pixels that are safe to open; make it smaller"
    return DataError(f"cannot read the picture {name}: {reason}")

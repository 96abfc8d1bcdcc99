"""Exercises: what a reader writes is checked where it stands, and the notebook goes on whatever comes out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exercise(number: str) -> Iterator[None]:
    """Print how the checks in the block end: solved, not right yet (with the reason), or not solved yet.

    number: of the exercise, "2.3" for the third of notebook 02. A stub raises NotImplementedError. No error leaves the
    block, so that a notebook with open exercises runs to its end; an interrupt does.
    """
    try:
        yield
    except NotImplementedError:
        print(f"exercise {number}: not solved yet")
    except AssertionError as error:
        print(f"exercise {number}: not right yet: {str(error) or 'the check failed'}")
    except Exception as error:  # of the reader's code, whatever it is
        print(f"exercise {number}: not right yet: {type(error).__name__}: {error}")
    else:
        print(f"exercise {number}: solved")

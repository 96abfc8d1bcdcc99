"""Exercises, which readers solve, and claims, which a lesson makes of the model that it runs on.

What a reader writes is checked where it stands, and the notebook goes on whatever comes out. On MiniSD, which comes
with the course, a claim that does not hold is a fault, and stops the notebook. On another model nobody has tried it
before, and the hours of its training are paid for: there the lesson records what it measured, warns, and goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from helpers.course.results import Results, approx, slug
from helpers.presets.configuration import Preset

RECORDED = "claims/"  # how the names of recorded claims begin


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


# --- claims ------------------------------------------------------------------------------------------------------
def stops(preset: Preset) -> bool:
    """Whether a claim that fails stops the notebook: on MiniSD, and in a trial, which costs minutes only.

    A trial `@gates` goes on too: it is there to see all of them.
    """
    return not preset.on_hub or (preset.trial and not preset.gates)


def claim(results: Results, what: str, holds: object, measured: float | None = None, enough: bool = True) -> bool:
    """Print that the claim holds; where it does not, stop the notebook on MiniSD, record and warn on another model.

    what: the claim in words. holds: whether it is true. measured: the number that it is about, finite.
    enough: False where too little was done to say anything, as in a trial; that is then printed.
    Returns whether it holds. Raises AssertionError on MiniSD when it does not.
    """
    if not enough:
        print(f"(a trial does not say whether {what})")
        return bool(holds)
    found = "" if measured is None else f", measured {approx(measured, 4)}"
    if not holds and stops(results.preset):
        raise AssertionError(what + found)
    if results.preset.on_hub:
        results.record(f"{RECORDED}{slug(what)}", bool(holds), varies=True, claim=what, measured=measured)
    if holds:
        print("PASS", what)
    else:
        warnings.warn(f"not so on {results.preset.title}: {what}{found}", stacklevel=2)
    return bool(holds)


def failed_claims(results: Results) -> list[str]:
    """What lessons claimed and this model did not keep, one sentence each."""
    entries = [results.entry(name) for name in results.names if name.startswith(RECORDED)]
    return [
        entry["claim"] + (f" (measured {entry['measured']:.4g})" if "measured" in entry else "")
        for entry in entries
        if not entry["value"]
    ]

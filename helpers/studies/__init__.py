"""Studies: which settings are compared, how all of a grid is trained and measured, and how a finished one is read.

questions.py says what is asked and is the place for questions of your own; `course sweep --study NAME` answers them.
"""

from helpers.studies.effects import Findings, rank_correlation
from helpers.studies.questions import CENTRE, FOLDER, Point, Study, get_study
from helpers.studies.slices import disagreements, rerun
from helpers.studies.trials import SAMPLING, latents, references, rows_of

__all__ = [
    "CENTRE",
    "FOLDER",
    "Findings",
    "Point",
    "SAMPLING",
    "Study",
    "disagreements",
    "get_study",
    "latents",
    "rank_correlation",
    "references",
    "rerun",
    "rows_of",
]

"""Reading a finished study: means with intervals, differences from the centre, copies and gaps.

Every trial keeps one value for each prompt, and the prompts are the same in all trials. So values form a table of seeds
and prompts, and two points of a study can be compared prompt by prompt and seed by seed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from helpers.evaluation.distances import shuffled_shares
from helpers.evaluation.measures import Measure
from helpers.studies.questions import CENTRE, FOLDER

DRAWS = 2000


def crossed_bootstrap(values: np.ndarray, seed: int = 0, draws: int = DRAWS) -> Measure:
    """Mean of values [S, N] with its 95% percentile interval, seeds and prompts resampled independently of each other.

    The pigeonhole bootstrap (Owen 2007, Annals of Applied Statistics 1): rows and columns both are samples of what
    could have been taken. The mean of S seeds, drawn with replacement, has (S - 1) / S of the variance that it should
    have, so their differences are widened first. One seed says nothing of others. n is the number of values.
    Raises ValueError unless the table is full and finite.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"the values of seeds and prompts should be a full table, not {values.shape}")
    seeds = len(values)
    if seeds > 1:
        wider = np.sqrt(seeds / (seeds - 1)) - 1
        values = values + wider * (values.mean(1, keepdims=True) - values.mean())
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, values.shape[0], (draws, values.shape[0]))
    columns = rng.integers(0, values.shape[1], (draws, values.shape[1]))
    # how often each seed and each prompt is in a resample; the mean is w_rows . values . w_columns
    w_rows, w_columns = (
        np.stack([np.bincount(draw, minlength=size) for draw in chosen]) / size
        for chosen, size in ((rows, values.shape[0]), (columns, values.shape[1]))
    )
    means = ((w_rows @ values) * w_columns).sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Measure(float(values.mean()), float(low), float(high), int(values.size))


def ranks_of(values: list[float]) -> np.ndarray:
    """Ranks 1 … N, equal values sharing the mean of theirs."""
    x = np.asarray(values, dtype=float)
    return np.array([(x < v).sum() + ((x == v).sum() + 1) / 2 for v in x])


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's rank correlation of two lists, -1 … 1. Raises ValueError for unequal lengths and for flat lists."""
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"two lists of one length are compared, not {len(a)} and {len(b)} values")
    ranks = ranks_of(a), ranks_of(b)
    if any(r.std() == 0 for r in ranks):
        raise ValueError("a list of equal values has no order to compare")
    return float(np.corrcoef(*ranks)[0, 1])


@dataclass(frozen=True)
class Findings:
    """A study's results. about: question, command, hashes, versions; trials: by (point, seed)."""

    about: dict[str, Any]
    trials: dict[tuple[str, int], dict[str, Any]]

    @classmethod
    def load(cls, study: str, folder: Path = FOLDER) -> Findings:
        """Those of a finished study. Raises ValueError when it is not there, with the command that makes it."""
        path = folder / f"{study}.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"there is no study {study!r} yet; `course sweep --study {study}` runs it") from None
        return cls(data, {(trial["point"], trial["seed"]): trial for trial in data.pop("trials")})

    @property
    def steps(self) -> int:
        """After how many steps the runs end."""
        return self.about["measured_at"][-1]

    @property
    def points(self) -> list[str]:
        """Names of the points that were trained; the controls are left out."""
        return [name for name in self.about["points"] if not name.startswith("control=")]

    def seeds(self, point: str) -> list[int]:
        """The seeds of a point. Raises ValueError for an unknown one."""
        found = [seed for name, seed in self.trials if name == point]
        if not found:
            raise ValueError(f"the study has no point {point!r}; it has {', '.join(self.about['points'])}")
        return found

    def of_factor(self, factor: str) -> list[str]:
        """The points of one factor, in the study's order; the centre is not among them."""
        return [name for name in self.about["points"] if name.startswith(f"{factor}=")]

    def measured(self, point: str, key: str, step: int | None = None) -> list[Any]:
        """What was kept under a key, seed by seed, after a step (default: the last one)."""
        step = step or self.steps
        return [self.trials[point, seed]["measures"][str(step)][key] for seed in self.seeds(point)]

    def values(self, point: str, key: str, step: int | None = None) -> np.ndarray:
        """The values [seeds, prompts] kept under a key such as "style.world"."""
        return np.array(self.measured(point, key, step), dtype=float)

    def mean(self, point: str, key: str, step: int | None = None) -> Measure:
        """The mean over seeds and prompts, with its interval."""
        return crossed_bootstrap(self.values(point, key, step))

    def effect(self, point: str, key: str, other: str = CENTRE, step: int | None = None) -> Measure:
        """Mean difference from another point (default: the centre), prompt by prompt, with its interval.

        Where both have the same seeds they are paired too; the base model, which has one, stands beside each of them.
        """
        a, b = self.values(point, key, step), self.values(other, key, step)
        if len(a) != len(b) and 1 not in (len(a), len(b)):
            raise ValueError(f"{point!r} has {len(a)} seeds and {other!r} has {len(b)}: they cannot be paired")
        return crossed_bootstrap(a - b)

    def chance(self, point: str, judge: str = "world", step: int | None = None) -> tuple[float, float]:
        """(low, high): the share of copies that a model which copies nothing has, 95 times in 100.

        "Training" and "held-out" are dealt out anew among the real pictures (`shuffled_shares`).
        """
        found = self.measured(point, f"nearest.{judge}", step)
        chosen = [picture for trial in found for picture in trial["chosen"]]
        low, high = np.quantile(shuffled_shares(chosen, found[0]["pool"]), (0.025, 0.975))
        return float(low), float(high)

    def copies(self, point: str, judge: str = "world", step: int | None = None) -> Measure:
        """Share of the pictures nearer to a training than to a held-out one, all seeds together.

        Its interval is as wide as the range of `chance`, so that it leaves one half out when chance leaves it out.
        """
        nearer, total = np.sum(self.measured(point, f"copies.{judge}", step), axis=0)
        share, (low, high) = float(nearer / total), self.chance(point, judge, step)
        return Measure(share, max(0.0, share - (high - 0.5)), min(1.0, share + (0.5 - low)), int(total))

    def gap(self, point: str, step: int | None = None) -> Measure:
        """Held-out loss minus training loss, with an interval over seeds and pictures of both sets.

        The two sets hold different pictures, so that each is resampled by itself: the interval's half-widths add up as
        those of independent means do.
        """
        held_out, training = (self.mean(point, f"loss.{split}", step) for split in ("held_out", "train"))
        value = held_out.value - training.value
        below = np.hypot(held_out.value - held_out.low, training.high - training.value)
        above = np.hypot(held_out.high - held_out.value, training.value - training.low)
        return Measure(value, float(value - below), float(value + above), held_out.n + training.n)

    def gap_by_timestep(self, point: str, step: int | None = None) -> np.ndarray:
        """Held-out minus training loss at each timestep of the grid, mean over seeds [T]."""
        held_out, training = (self.values(point, f"loss_by_timestep.{s}", step) for s in ("held_out", "train"))
        return (held_out - training).mean(0)

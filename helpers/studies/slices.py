"""Running a slice of a study again, here and now, to see that its committed numbers are what its settings give."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from helpers.studies.effects import Findings
from helpers.studies.questions import Point, Study
from helpers.studies.trials import fill_caches, measure
from helpers.training.loop import prepare
from helpers.training.runs import Run
from helpers.training.steps import injected

# Another number of threads, or another processor, sums in another order, and training makes more of the difference.
TOLERANCE = {"style.world": 0.05, "content.world": 0.05, "style.imagenet": 0.08, "content.imagenet": 0.08}
LOSS_TOLERANCE = 0.02  # of the loss itself


def rerun(study: Study, point: Point, seed: int, step: int | None = None) -> dict[str, Any]:
    """Train one run of a study anew as far as a step (default: the first measured one), and measure it there.

    Nothing is looked up and nothing is kept. Raises ValueError for a control and for full fine-tuning, which are no
    runs of this loop, and for a step at which the study does not measure.
    """
    step = step or study.measured_at[0]
    if step not in study.measured_at:
        raise ValueError(f"the study {study.name!r} measures after {study.measured_at} steps, not after {step}")
    if point.settings.get("control") or point.settings.get("method"):
        raise ValueError(f"{point.name!r} is not a run of the training loop")
    preset, spec = study.preset(point, seed)
    fill_caches(study, spec, preset)
    with tempfile.TemporaryDirectory() as folder:
        loop = prepare(Run(Path(folder), preset.name, spec.name, "slice"), preset, None, None)
        with injected(loop.components, loop.config, loop.accelerator) as optimizer:
            for number in range(step):
                loop.step(optimizer, number)
            loop.components.unet.eval()
            return measure(study, spec, preset, loop.components)


def differences(found: dict[str, Any], committed: Findings, point: str, seed: int, step: int) -> dict[str, float]:
    """{key: mean found now minus mean committed} for what `TOLERANCE` names, and for both losses."""
    kept = committed.trials[point, seed]["measures"][str(step)]
    keys = [*TOLERANCE, "loss.train", "loss.held_out"]
    return {key: float(np.mean(found[key]) - np.mean(kept[key])) for key in keys}


def disagreements(found: dict[str, Any], committed: Findings, point: str, seed: int, step: int) -> list[str]:
    """What lies further from the committed study than TOLERANCE, one sentence each; an empty list when all is well."""
    kept = committed.trials[point, seed]["measures"][str(step)]
    problems = []
    for key, apart in differences(found, committed, point, seed, step).items():
        allowed = TOLERANCE.get(key, LOSS_TOLERANCE * float(np.mean(kept[key])))
        if abs(apart) > allowed:
            problems.append(f"{key}: {apart:+.4f} from the committed study, and {allowed:.4f} is allowed")
    return problems

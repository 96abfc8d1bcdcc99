"""A slice of a study run again: the same numbers, and a difference that is noticed."""

import copy

import pytest

from helpers.studies.effects import Findings
from helpers.studies.questions import get_study
from helpers.studies.slices import TOLERANCE, differences, disagreements, rerun
from helpers.studies.trials import run_trial

STUDY = get_study("overfitting", measured_at=(2, 4), prompts=2, loss_rows=2)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What a trial measured, and the same run again as far as its first measured step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_RUNS", str(tmp_path_factory.mktemp("runs")))
        trial = run_trial(STUDY, STUDY.point("rows=16"), seed=1)
        return trial, rerun(STUDY, STUDY.point("rows=16"), seed=1)


def committed(trial):
    return Findings({"measured_at": [2, 4]}, {("rows=16", 1): {"point": "rows=16", "seed": 1, **trial}})


def test_a_slice_measures_what_the_trial_measured(both):
    trial, again = both
    assert again == trial["measures"]["2"] != trial["measures"]["4"]
    assert disagreements(again, committed(trial), "rows=16", 1, 2) == []
    assert set(differences(again, committed(trial), "rows=16", 1, 2).values()) == {0.0}


@pytest.mark.parametrize("key", [*TOLERANCE, "loss.train", "loss.held_out"])
def test_a_difference_is_noticed_and_named(both, key):
    trial, again = both
    other = copy.deepcopy(again)
    other[key] = [value + 0.1 for value in other[key]]
    [problem] = disagreements(other, committed(trial), "rows=16", 1, 2)
    assert problem.startswith(f"{key}: +0.1")


@pytest.mark.parametrize("name", ["control=base", "full fine-tuning=64"])
def test_only_runs_of_the_loop_can_be_run_again(name):
    with pytest.raises(ValueError, match=f"'{name}' is not a run"):
        rerun(STUDY, STUDY.point(name), seed=0)


def test_only_measured_steps_can_be_compared():
    with pytest.raises(ValueError, match=r"measures after \(2, 4\) steps, not after 3"):
        rerun(STUDY, STUDY.point("rows=16"), seed=0, step=3)

"""The committed studies are what `helpers.studies.questions` asks for today: complete, of these weights and these
pictures."""

import json

import numpy as np
import pytest
from safetensors.torch import load_file

from helpers.base import provenance
from helpers.base.paths import ROOT
from helpers.presets.catalogue import MINISD
from helpers.studies.questions import CONTROLS, FOLDER, STUDIES, Point, get_study
from helpers.studies.sweep import grid
from helpers.world.datasets import fingerprint

ADAPTERS = sorted((FOLDER / "adapters").glob("*.safetensors"))


def kept(name):
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def test_every_study_is_kept_and_nothing_else_is():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(STUDIES)


@pytest.mark.parametrize("name", STUDIES)
def test_a_kept_study_has_every_trial_of_its_grid_once(name):
    trials = [(trial["point"], trial["seed"]) for trial in kept(name)["trials"]]
    assert sorted(trials) == sorted(grid(get_study(name)))


@pytest.mark.parametrize("name", STUDIES)
def test_a_kept_study_was_asked_what_is_asked_today(name):
    study, found = get_study(name), kept(name)
    asked = {point.name: dict(point.settings) for point in study.points}
    assert found["points"] == json.loads(json.dumps(asked)) and found["base"] == dict(study.base)
    assert found["measured_at"] == list(study.measured_at) and found["prompts"] == study.prompts
    assert found["question"] == study.question and found["style"] == study.style
    assert found["weights"] == provenance.folder_weights_hash(ROOT / MINISD)[:12]
    assert found["data"] == fingerprint(study.style, "train")[:12]


@pytest.mark.parametrize("name", STUDIES)
def test_every_trial_is_measured_after_every_step_and_on_every_prompt(name):
    study = get_study(name)
    for trial in kept(name)["trials"]:
        control = trial["point"].removeprefix("control=") in CONTROLS
        steps = study.measured_at[-1:] if control else study.measured_at
        assert [int(step) for step in trial["measures"]] == list(steps)
        for found in trial["measures"].values():
            for key in ("style.world", "style.imagenet", "content.world", "content.imagenet"):
                values = np.array(found[key])
                assert len(values) == study.prompts and (0 <= values).all() and (values <= 1).all()


@pytest.mark.parametrize("name", STUDIES)
def test_the_controls_fail_as_they_should(name):
    """No adapter, a random one and another style's show nothing of the style; real drawings show it."""
    last = str(get_study(name).steps)
    for trial in kept(name)["trials"]:
        control = trial["point"].removeprefix("control=")
        if control in CONTROLS:
            mean = np.mean(trial["measures"][last]["style.world"])
            assert mean > 0.95 if control == "drawn" else mean < 0.05, trial["point"]


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.stem)
def test_a_kept_adapter_is_the_one_that_its_study_measured(path):
    found = provenance.tensor_hash(load_file(path))[:16]
    assert found in {trial.get("adapter") for name in STUDIES for trial in kept(name)["trials"]}


def test_a_study_knows_its_points_and_its_name():
    assert get_study("overfitting").point("rows=16") == Point("rows", "16", {"rows": 16})
    with pytest.raises(ValueError, match="has no point 'rows=17'; it has centre"):
        get_study("overfitting").point("rows=17")
    with pytest.raises(ValueError, match="unknown study 'x'; known: hyperparameters"):
        get_study("x")

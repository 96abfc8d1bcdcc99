"""Claims of the lessons: what stops a notebook on MiniSD is recorded on another model, which goes on."""

import pytest

from helpers.course.exercises import claim, failed_claims, stops
from helpers.course.results import Results
from helpers.presets.variants import get_preset


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Of the preset asked for, in a folder of the test's own; provenance would read a model."""
    monkeypatch.setattr(Results, "_provenance", lambda self: "none")
    return lambda name: Results(get_preset(name), tmp_path / "results.json")


@pytest.mark.parametrize("name", ["mini", "smoke", "sd21-base@trial", "sd15@8gb@trial"])
def test_a_claim_that_fails_stops_minisd_and_a_trial(results, name):
    with pytest.raises(AssertionError, match=r"the loop can learn one batch, measured ≈0.9000"):
        claim(results(name), "the loop can learn one batch", False, 0.9)
    assert results(name).names == []


@pytest.mark.parametrize("name", ["sd21-base", "sd21@8gb", "sd15@trial@gates"])
def test_on_another_model_it_is_recorded_and_the_notebook_goes_on(results, name, capsys):
    with pytest.warns(UserWarning, match="not so on Stable Diffusion .*: the loop can learn one batch, measured ≈0.90"):
        assert claim(results(name), "the loop can learn one batch", False, 0.9) is False
    assert claim(results(name), "another seed gives another loss", True) is True
    assert capsys.readouterr().out == "PASS another seed gives another loss\n"
    kept = results(name).entry("claims/the_loop_can_learn_one_batch")
    assert kept["value"] is False and kept["measured"] == 0.9 and kept["varies"]
    assert failed_claims(results(name)) == ["the loop can learn one batch (measured 0.9)"]


def test_on_minisd_a_claim_that_holds_is_one_line_and_nothing_is_recorded(results, capsys):
    assert claim(results("mini"), "steps 0-5 replay", True, 0.0)
    assert capsys.readouterr().out == "PASS steps 0-5 replay\n" and results("mini").names == []


@pytest.mark.parametrize("holds", [True, False])
def test_what_was_not_done_at_length_says_nothing(results, holds, capsys):
    claim(results("mini"), "the loop can learn one batch", holds, 0.9, enough=False)
    assert capsys.readouterr().out == "(a trial does not say whether the loop can learn one batch)\n"


def test_a_trial_with_gates_tries_them_at_full_length():
    assert get_preset("sd21-base@trial@gates").gates and get_preset("sd21-base@gates@trial").gates
    assert not get_preset("sd21-base@trial").gates and not stops(get_preset("sd21-base@trial@gates"))
    with pytest.raises(ValueError, match="'gates' is for Stable Diffusion"):
        get_preset("mini@gates")

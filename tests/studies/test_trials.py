"""One trial of a study, as small as they come: four steps on sixteen pictures, two prompts."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import lora
from helpers.base.provenance import tensor_hash
from helpers.diffusion.text import encode_tokens
from helpers.evaluation.measures import Verdict, evaluation_scenes
from helpers.studies import trials
from helpers.studies.effects import Findings
from helpers.studies.questions import CENTRE, Point, get_study
from helpers.studies.trials import adapter_after, bare_prompts, control_of, counts, run_trial
from helpers.training.runs import BusyError, Run
from helpers.world.captions import prompt
from helpers.world.scenes import STYLES, SUBJECTS

KEYS = {"style.world", "content.world", "style.imagenet", "content.imagenet", "attributes"}
DISTANCES = {f"{what}.{judge}" for what in ("distance", "copies", "nearest") for judge in ("world", "imagenet")}
LOSSES = {f"{what}.{split}" for what in ("loss", "loss_by_timestep") for split in ("train", "held_out")}


def test_a_run_that_another_worker_trains_is_waited_for(monkeypatch):
    busy = iter([True, True, False])

    def train(preset, dataset, **_):
        if next(busy):
            raise BusyError("another process")
        return dataset

    monkeypatch.setattr(trials, "train", train)
    monkeypatch.setattr(trials, "WAIT", 0.0)
    assert trials.trained(None, "doodles") == "doodles" and next(busy, None) is None


def tiny_study(**changes):
    points = (
        Point(CENTRE, "", {"rows": 16}),
        Point("control", "base", {"control": "base"}),
        Point("control", "random", {"control": "random"}),
        Point("control", "drawn", {"control": "drawn"}),
        Point("rows", "full", {"rows": 16, "method": "full", "learning_rate": 1e-4}),
    )
    settings = {"measured_at": (2, 4), "prompts": 2, "loss_rows": 2, "seeds": (0,), "points": points}
    return get_study("overfitting", **{**settings, "base": {"batch_size": 2, "rank": 2, "alpha": 2.0}, **changes})


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """A runs folder of this file's own; distances are taken to 8 pictures, and pictures from 3 steps."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trials")
        patch.setenv("COURSE_RUNS", str(folder))
        patch.setattr(trials, "FLOOR_ROWS", 8)
        patch.setattr(trials, "SAMPLING", {"num_inference_steps": 3, "guidance_scale": 4.0})
        yield folder
    trials.model.cache_clear()


@pytest.fixture(scope="module")
def study():
    return tiny_study()


@pytest.fixture(scope="module")
def centre(folder, study):
    return run_trial(study, study.point(CENTRE), 0)


@pytest.fixture(scope="module")
def controls(folder, study, centre):
    """The measures of each control."""
    names = ("base", "random", "drawn")
    return {name: run_trial(study, study.point(f"control={name}"), 0)["measures"] for name in names}


def run_of(found, folder):
    return folder / "mini" / found["run"]


# --- an adapter -------------------------------------------------------------------------------------------------------


def test_an_adapter_is_measured_after_each_measured_step(centre):
    assert list(centre["measures"]) == ["2", "4"]
    for found in centre["measures"].values():
        assert set(found) == KEYS | DISTANCES | LOSSES


def test_there_is_a_value_for_each_prompt_and_picture(centre):
    for found in centre["measures"].values():
        for key in ("style.world", "style.imagenet", "content.world", "content.imagenet"):
            assert len(found[key]) == 2 and all(0 <= value <= 1 for value in found[key]), key
        for split in ("train", "held_out"):
            assert len(found[f"loss.{split}"]) == 2 and len(found[f"loss_by_timestep.{split}"]) == 8
            means = np.mean(found[f"loss.{split}"]), np.mean(found[f"loss_by_timestep.{split}"])
            assert means[0] == pytest.approx(means[1], abs=2e-5), "the same losses, summed by row or by column"
        assert all(
            total == 2 and 0 <= nearer <= 2 for nearer, total in (found["copies.world"], found["copies.imagenet"])
        )
        for nearest in (found["nearest.world"], found["nearest.imagenet"]):
            assert nearest["pool"] == 32 and len(nearest["chosen"]) == 2 and 0 <= min(nearest["chosen"])
        assert all(0 <= right <= total <= 2 for right, total in found["attributes"].values())


def test_the_steps_differ(centre):
    early, late = centre["measures"]["2"], centre["measures"]["4"]
    assert early["loss.train"] != late["loss.train"] and early["loss.held_out"] != late["loss.held_out"]


def test_a_trial_is_json_that_findings_read(centre, study):
    assert json.loads(json.dumps(centre)) == centre
    findings = Findings({"measured_at": [2, 4], "points": {CENTRE: {}}}, {(CENTRE, 0): centre})
    assert findings.values(CENTRE, "style.world").shape == (1, 2) and findings.copies(CENTRE).n == 2
    assert findings.gap(CENTRE).n == 4 and findings.gap_by_timestep(CENTRE).shape == (8,)


def test_a_trial_says_what_was_trained_and_leaves_no_checkpoints(centre, folder):
    run = run_of(centre, folder)
    assert not (run / "checkpoints").exists() and (run / "done.json").exists()
    file = run / "adapter" / "pytorch_lora_weights.safetensors"
    assert centre["bytes"] == file.stat().st_size and 4 * centre["trained"] < centre["bytes"]
    assert len(centre["adapter"]) == 16


def test_the_model_is_the_base_model_again(centre):
    assert not lora.lora_layers(trials.model().unet) and not lora.lora_layers(trials.model().text_encoder)


def test_a_trial_measured_again_is_the_same(centre, study):
    """Its checkpoints are gone by then: the run is trained anew."""
    assert run_trial(study, study.point(CENTRE), 0) == centre


def test_captions_are_cached_by_the_base_model(study, tmp_path, monkeypatch):
    """A point whose text encoder is adapted, measured first, must not leave its own captions to the others."""
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path))
    point = Point("text encoder", "", {"train_text_encoder": True, "learning_rate": 1.0})
    run_trial(study, point, 0)
    preset, spec = study.preset(point, 0)
    cache = trials.latents(trials.model(), preset, spec, "held_out", 2)
    ids = cache.caption_ids
    assert torch.equal(cache.caption_embeddings, encode_tokens(trials.model(), ids).float())


def test_adapter_after_is_the_run_s_own_at_the_end_and_a_checkpoint_s_before(centre, folder):
    run = Run(run_of(centre, folder), "mini", "doodles", "")
    assert adapter_after(run, 4) == run.adapter
    assert adapter_after(run, 2) == run.checkpoint_dir(2) / "adapter.safetensors"


def test_a_second_call_finds_the_run_and_gives_the_same_numbers(centre, study, monkeypatch):
    """Measured at the end alone, nothing but the adapter is needed."""
    from helpers.training import loop as training

    once = replace(study, measured_at=(4,), base={**study.base, "checkpoint_every": 2, "keep_checkpoints": 2})
    monkeypatch.setattr(training, "draw_step", lambda *_: pytest.fail("it was trained again"))
    again = run_trial(once, once.point(CENTRE), 0)
    assert again["measures"]["4"] == centre["measures"]["4"]
    assert {**again, "measures": None} == {**centre, "measures": None}


# --- controls ---------------------------------------------------------------------------------------------------------


def test_controls_are_measured_once_as_of_the_last_step(controls):
    assert all(list(measures) == ["4"] for measures in controls.values())
    assert set(controls["base"]["4"]) == set(controls["random"]["4"]) == KEYS | DISTANCES | LOSSES
    assert set(controls["drawn"]["4"]) == KEYS | DISTANCES, "the renderer's pictures have no loss"


def test_the_random_control_is_not_the_base_model(controls, centre):
    base, random = controls["base"]["4"], controls["random"]["4"]
    assert base["loss.train"] != random["loss.train"] and base["loss.held_out"] != random["loss.held_out"]
    assert centre["measures"]["4"]["loss.train"] not in (base["loss.train"], random["loss.train"])


def test_the_renderer_s_own_pictures_are_in_style_and_as_asked(controls):
    drawn = controls["drawn"]["4"]
    assert min(drawn["style.world"]) > 0.9 and min(drawn["style.imagenet"]) > 0.5
    assert np.mean(drawn["content.world"]) > 0.8


def test_controls_take_their_adapter_out_again(study, centre):
    unet = trials.model().unet
    before = tensor_hash(unet.state_dict())
    with control_of(study, "base", 0):
        assert not lora.lora_layers(unet)
    with control_of(study, "random", 0):
        layers = lora.lora_layers(unet)
        random = [lora.delta_weight(layer).detach().clone() for layer in layers.values()]
        assert layers
    assert not lora.lora_layers(unet) and tensor_hash(unet.state_dict()) == before
    with control_of(study, "random", 1), pytest.raises(KeyError):
        raise KeyError
    with trials.adapted(trials.model(), trials.runs_folder() / "mini" / centre["run"] / "adapter"):
        trained = [lora.delta_weight(layer).detach().clone() for layer in lora.lora_layers(unet).values()]
    for a, b in zip(random, trained, strict=True):
        assert a.norm().item() == pytest.approx(b.norm().item(), rel=1e-4) and not torch.allclose(a, b)


# --- full fine-tuning -------------------------------------------------------------------------------------------------


def test_a_full_trial_measures_every_weight_s_training(study, centre, controls):
    found = run_trial(study, study.point("rows=full"), 0)
    unet = trials.model().unet
    count = sum(p.numel() for p in unet.parameters())
    assert found["trained"] == count and found["bytes"] == 4 * count and list(found["measures"]) == ["2", "4"]
    assert all(set(measures) == KEYS | DISTANCES | LOSSES for measures in found["measures"].values())
    assert found["measures"]["4"]["loss.train"] != controls["base"]["4"]["loss.train"]
    with control_of(study, "base", 0):
        assert (
            trials.losses(study, *reversed(study.preset(study.points[0], 0)), trials.model())["loss.train"]
            == controls["base"]["4"]["loss.train"]
        ), "the shared model was left alone"


# --- prompts that ask for nothing -------------------------------------------------------------------------------------


def test_bare_prompts_name_all_subjects_in_turn():
    found = bare_prompts("doodles", 12)
    assert found[:3] == ["a drawing of a man", "a drawing of a woman", "a drawing of a cat"]
    assert found[7] == "a drawing of an alien" and found[9] == "a drawing of a bat hero"
    assert found[10:] == found[:2] and len(set(found)) == len(SUBJECTS)
    assert bare_prompts("vintage", 1) == ["a portrait of a man, vintage style"]


@pytest.mark.parametrize("style", STYLES)
def test_bare_prompts_begin_and_end_as_the_style_s_prompts_do(style):
    [bare] = bare_prompts(style, 1)
    whole = prompt(evaluation_scenes(1)[0], style)
    assert bare.split(" of ")[0].split(" icon")[0] == whole.split(" of ")[0].split(" icon")[0]
    assert bare.endswith(", vintage style") is whole.endswith(", vintage style")


def test_counts_are_of_what_no_prompt_asked_for():
    names = {
        "headwear": ["none", "crown", "none"],
        "eyewear": ["glasses"] * 3,
        "neckwear": ["tie", "scarf", "none"],
        "background": ["pink", "blue", "pink"],
        "expression": ["smile"] * 3,
        "subject": ["cat", "dog", "man"],
    }
    assert counts(Verdict(names, np.zeros((3, len(STYLES))))) == {
        "headwear": {"crown": 1, "none": 2},
        "eyewear": {"glasses": 3},
        "neckwear": {"none": 1, "scarf": 1, "tie": 1},
        "background": {"blue": 1, "pink": 2},
        "expression": {"smile": 3},
    }


def test_a_study_may_count_what_is_drawn_unasked_and_leave_copies_out(centre):
    study = tiny_study(copies=False, unprompted=True)
    preset, spec = study.preset(study.points[0], 0)
    found = trials.measure(study, spec, preset)
    assert set(found) == KEYS | LOSSES | {"distance.world", "distance.imagenet", "unprompted"}
    assert set(found["unprompted"]) == set(trials.UNPROMPTED)
    assert all(sum(seen.values()) == 2 for seen in found["unprompted"].values())


# --- what measures are compared with ----------------------------------------------------------------------------------


def test_references_are_computed_once(study, centre, monkeypatch):
    preset, spec = study.preset(study.points[0], 0)
    encoder = trials.judges(study.style).encoders["world"]
    kept = trials.references(encoder, spec, preset, "train", 16)
    assert kept.shape[0] == 16
    monkeypatch.setattr(trials.data, "load_pictures", lambda *_: pytest.fail("drawn again"))
    assert torch.equal(trials.references(encoder, spec, preset, "train", 16), kept)


def test_values_are_rounded_to_what_is_kept():
    assert trials.rounded(np.array([0.123456, 1.0])) == [0.1235, 1.0]
    assert trials.rounded(torch.tensor([0.123456]), 5) == [0.12346]

"""Presets: what they promise to notebooks, and what they refuse."""

import dataclasses
import json
import math
import re

import pytest

from helpers import lora
from helpers.base import paths
from helpers.presets import catalogue as presets
from helpers.presets import configuration
from helpers.presets.catalogue import PRESETS
from helpers.presets.configuration import Datasets, DatasetSpec, TrainConfig
from helpers.presets.variants import get_preset


def test_the_five_presets_by_name():
    assert list(PRESETS) == ["mini", "smoke", "sd21-base", "sd21", "sd15"]
    assert all(get_preset(name).name == name for name in PRESETS)


def test_unknown_preset_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown preset 'maxi'; known: mini, smoke, sd21-base, sd21, sd15"):
        get_preset("maxi")


def test_overrides_reach_the_preset_and_its_training():
    changed = get_preset("mini", steps=3, guidance_scale=2.0)
    assert (changed.train.steps, changed.guidance_scale) == (3, 2.0)
    assert get_preset("mini").train.steps == 1000 and get_preset("mini").guidance_scale == 4.0
    with pytest.raises(ValueError, match="unknown setting 'step'"):
        get_preset("mini", step=3)


@pytest.mark.parametrize(
    "bad", [{"steps": 0}, {"rank": 0}, {"learning_rate": 0.0}, {"caption_dropout": 1.5}, {"lora_dropout": 1.0},
            {"lr_schedule": "step"}, {"snr_gamma": 0.0}]
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        get_preset("mini", **bad)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_cannot_be_changed_and_can_be_written_down(name):
    preset = get_preset(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset.train.steps = 1
    as_json = json.loads(json.dumps(dataclasses.asdict(preset)))
    assert as_json["train"]["rank"] == 16 and [d["name"] for d in as_json["datasets"]] == ["doodles", "vintage"]


def test_the_settings_of_the_homework_are_the_same_for_both_datasets():
    mini = get_preset("mini")
    assert (mini.train.steps, mini.train.batch_size, mini.train.rank, mini.train.alpha) == (1000, 8, 16, 16.0)
    batches = [math.ceil(spec.train_rows / mini.train.batch_size) for spec in mini.datasets]
    assert batches == [125, 86]
    assert mini.train.steps % mini.train.checkpoint_every == 0 and mini.train.keep_checkpoints >= 2  # step 950 is kept


def test_smoke_is_mini_with_small_budgets():
    mini, smoke = get_preset("mini"), get_preset("smoke")
    for same in ("model", "resolution", "prediction_type", "validation_prompts", "figure_prompts", "guidance_scale"):
        assert getattr(smoke, same) == getattr(mini, same)
    assert [(d.train_rows, d.held_out_rows) for d in smoke.datasets] == [(64, 32), (64, 32)]
    assert (smoke.train.steps, smoke.eval_prompts, smoke.control_prompts, smoke.num_inference_steps) == (20, 8, 4, 6)


def test_datasets_by_name_and_by_position():
    datasets = get_preset("mini").datasets
    assert datasets["vintage"] is datasets[1] and datasets.names == ("doodles", "vintage")
    with pytest.raises(ValueError, match="unknown dataset 'photos'; known: doodles, vintage"):
        datasets["photos"]


@pytest.mark.parametrize("name", PRESETS)
def test_figures_6_and_7_follow_prompts_that_the_runs_validate(name):
    preset = get_preset(name)
    (portrait,), (sheriff,) = preset.figure_prompts["fig06"], preset.figure_prompts["fig07"]
    assert all(portrait in preset.validation_prompts[dataset] for dataset in preset.datasets.names)
    assert sheriff in preset.validation_prompts["vintage"]
    assert set(preset.figure_prompts) == {f"fig0{i}" for i in range(3, 10)}
    assert all(len(prompts) == 4 == len(set(prompts)) for prompts in preset.validation_prompts.values())


def test_minisd_is_asked_only_for_words_that_its_captions_have():
    """Or that those of the dataset have which it is trained on."""
    from helpers.data import lorelei
    from helpers.world.captions import vocabulary_corpus

    known = set(re.findall(r"[a-z0-9]+", " ".join(vocabulary_corpus(3000))))
    mini = get_preset("mini")
    taught = set(" ".join(lorelei.portrait(row)[1] for row in range(lorelei.ROWS)).replace(",", "").split())
    for name, prompts in {**mini.validation_prompts, **mini.figure_prompts}.items():
        for prompt in prompts:
            words = set(re.findall(r"[a-z0-9]+", prompt))
            assert words <= (known | taught if name == "lorelei" else known), prompt
    assert "trump" not in known  # the check can fail


def test_minisd_adapts_every_linear_layer_of_its_transformers(tiny):
    from torch import nn

    names = lora.find_targets(tiny.unet, get_preset("mini").train.targets)
    linear = {name for name, module in tiny.unet.named_modules() if isinstance(module, nn.Linear)}
    assert set(names) == {name for name in linear if ".attentions." in name} < linear
    assert get_preset("smoke").train.targets == configuration.LINEAR
    assert get_preset("sd21").train.targets == configuration.ATTENTION


def test_hub_models_are_pinned_and_local_ones_are_in_the_repository():
    for preset in PRESETS.values():
        if preset.revision is None:
            assert preset.model_folder == paths.ROOT / "helpers/minisd/weights"
        else:
            assert preset.model_folder is None
            assert all(re.fullmatch("[0-9a-f]{40}", r) for r in (preset.revision, *(r for _, r in preset.mirrors)))


def test_an_absolute_model_folder_stays_as_it_is(tmp_path):
    assert get_preset("sd15", model=str(tmp_path), revision=None).model_folder == tmp_path


def test_course_runs_moves_the_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "elsewhere"))
    assert paths.runs_folder() == (tmp_path / "elsewhere").resolve()
    monkeypatch.delenv("COURSE_RUNS")
    assert paths.runs_folder() == paths.ROOT / "runs"


def test_presets_can_be_made_by_hand():
    own = dataclasses.replace(
        get_preset("mini"), datasets=Datasets((DatasetSpec("mine", "folder:pictures"),)), train=TrainConfig(steps=5)
    )
    assert own.datasets["mine"].text_column == "text" and hash(own) == hash(dataclasses.replace(own))


# --- Stable Diffusion --------------------------------------------------------------------------------------------

REAL = ("sd21-base", "sd21", "sd15")


@pytest.mark.parametrize("name", REAL)
def test_real_models_are_pinned_with_mirrors_and_a_licence(name):
    preset = get_preset(name)
    assert len(preset.repositories) >= 2 and preset.repositories[0] == (preset.model, preset.revision)
    assert all(re.fullmatch("[0-9a-f]{40}", revision) for _, revision in (*preset.repositories, *presets.CLIP))
    assert preset.licence and preset.download_gb > 4
    assert all(spec.licence and spec.download_gb > 0 for spec in preset.datasets)


@pytest.mark.parametrize("name", REAL)
def test_the_homeworks_settings(name):
    preset = get_preset(name)
    assert (preset.train.steps, preset.train.batch_size, preset.train.validation_epochs) == (1000, 8, 2)
    assert [spec.train_rows for spec in preset.datasets] == [1000, 685]
    portrait, sheriff = "a drawing of Donald Trump with a scarf", "Batman as a sheriff in a vintage style"
    figures = preset.figure_prompts
    assert all(figures[f"fig{number:02d}"][0] == portrait for number in (5, 6, 8))
    assert all(figures[f"fig{number:02d}"][0] == sheriff for number in (4, 7, 9))
    assert preset.validation_prompts["doodles"][0] == portrait and preset.validation_prompts["vintage"][0] == sheriff


def test_a_variant_changes_memory_and_precision_and_nothing_else():
    plain, variant = get_preset("sd21-base"), get_preset("sd21-base@8gb@fp16")
    assert variant.name == "sd21-base@8gb@fp16" and plain.train.mixed_precision == plain.dtype == "auto"
    assert (variant.dtype, variant.train.mixed_precision) == ("float16", "fp16")
    assert variant.train.gradient_accumulation_steps == 8 and plain.train.gradient_accumulation_steps == 1
    assert not variant.train.gradient_checkpointing, "at 512 pixels a picture at a time fits without it"
    assert get_preset("sd21@8gb").train.gradient_checkpointing
    own = {"name": plain.name, "dtype": plain.dtype}
    settings = {"mixed_precision": "auto", "gradient_checkpointing": False, "gradient_accumulation_steps": 1}
    assert dataclasses.replace(variant, train=dataclasses.replace(variant.train, **settings), **own) == plain


def test_the_order_of_variants_does_not_matter():
    one, other = get_preset("sd21-base@trial@8gb"), get_preset("sd21-base@8gb@trial")
    assert dataclasses.replace(one, name=other.name) == other and one.train.gradient_accumulation_steps == 2


def test_another_size_is_a_variant_too():
    plain, small = get_preset("sd21-base"), get_preset("sd21-base@256px")
    assert dataclasses.replace(small, resolution=512, name=plain.name) == plain and small.resolution == 256


def test_a_trial_is_the_same_in_two_steps():
    plain, trial = get_preset("sd21-base"), get_preset("sd21-base@trial")
    assert trial.trial and get_preset("smoke").trial and not plain.trial and not get_preset("mini").trial
    assert trial.train.steps == 2 and max(spec.train_rows for spec in trial.datasets) <= 8
    for same in ("model", "revision", "mirrors", "resolution", "prediction_type", "figure_prompts", "dtype"):
        assert getattr(trial, same) == getattr(plain, same)
    assert (trial.train.rank, trial.train.targets) == (plain.train.rank, plain.train.targets)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "sd21-base@10gb",
            "unknown variant '10gb' of a preset; known: 24gb, .*hf, kohya, trial, gates, and sizes",
        ),
        ("sd21-base@100px", "unknown variant '100px'"),
        ("sd21-base@px", "unknown variant 'px'"),
        ("sd21-base@8gb@24gb", "the variants 8gb and 24gb of 'sd21-base@8gb@24gb' contradict each other"),
        ("sd21-base@fp32@trial@bf16", "fp32 and bf16"),
        ("sd21-base@256px@128px", "256px and 128px"),
        ("mini@8gb", "'8gb' is for Stable Diffusion"),
        ("mini@trial", "its trial is the preset 'smoke'"),
        ("sd22@8gb", "unknown preset 'sd22'"),
    ],
)
def test_variants_that_are_not_there_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        get_preset(name)


@pytest.mark.parametrize(("trainer", "seen"), [("hf", 60_000), ("kohya", 1600)])
def test_the_settings_of_other_trainers_by_name(trainer, seen):
    plain, other = get_preset("sd15"), get_preset(f"sd15@{trainer}")
    assert other.train.steps * other.train.batch_size == seen and other.train.rank == 4
    assert dataclasses.replace(other, train=plain.train, name=plain.name) == plain, "only the training differs"
    assert other.train.caption_dropout == 0.0 and other.train.alpha == {"hf": 4.0, "kohya": 1.0}[trainer]
    assert get_preset(f"sd15@8gb@{trainer}").train == get_preset(f"sd15@{trainer}@8gb").train
    with pytest.raises(ValueError, match="hf and kohya of .* contradict each other"):
        get_preset("sd15@hf@kohya")
    with pytest.raises(ValueError, match="is for Stable Diffusion"):
        get_preset(f"mini@{trainer}")


@pytest.mark.parametrize(
    "bad", [{"lora_plus": 0.0}, {"ema_decay": 1.0}, {"noise_offset": -0.1}, {"caption_orders": 0}], ids=str
)
def test_more_settings_that_make_no_sense(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        get_preset("mini", **bad)

"""The artist's style that comes with the course: what is in the file, whose it is, and that its script makes it."""

import json
import re
from collections import Counter
from importlib.resources import files

import pyarrow.parquet as pq
import pytest

from helpers.base.paths import ROOT
from helpers.data import lorelei
from helpers.data.loading import load_pictures
from helpers.presets.variants import get_preset

FILE = lorelei.FILE


@pytest.fixture(scope="module")
def rows():
    return pq.read_table(FILE).to_pylist()


def test_the_file_is_small_and_says_whose_it_is():
    assert FILE.stat().st_size < 3e6
    said = pq.read_schema(FILE).metadata
    assert said[b"artist"].decode() == "Lisa Wischofsky" and "CC0 1.0" in said[b"licence"].decode()
    assert said[b"source"].startswith(b"https://") and (ROOT / said[b"made by"].decode()).is_file()
    note = FILE.with_suffix(".md").read_text(encoding="utf-8")
    assert "Lisa Wischofsky" in note and "CC0 1.0" in note


def test_captions_are_those_of_the_script_and_guess_no_gender(rows):
    assert [row["text"] for row in rows] == [lorelei.portrait(number)[1] for number in range(lorelei.ROWS)]
    words = Counter(word for row in rows for word in re.findall(r"\w+", row["text"]))
    assert words["person"] == len(rows) == 300
    assert not set(words) & {"man", "woman", "boy", "girl", "he", "she", "his", "her", "male", "female"}
    for word in (*lorelei.GROUNDS, "glasses", "sunglasses", "beard", "flowers", "smiling", "frowning"):
        assert words[word] >= 15, f"too few pictures have {word} in their caption"


def test_every_part_is_named_once():
    named = [number for numbers in lorelei.HAIR.values() for number in numbers.split()]
    assert sorted(named) == [f"{number:02d}" for number in range(1, 49)]


def test_a_caption_says_what_is_drawn():
    for number in range(lorelei.ROWS):
        options, text = lorelei.portrait(number)
        hair = next(name for name, numbers in lorelei.HAIR.items() if options["hairVariant"][0][-2:] in numbers.split())
        ground = next(name for name, value in lorelei.GROUNDS.items() if [value] == options["backgroundColor"])
        assert f" {hair}" in text and text.endswith(f" {ground} background")
        assert ("a beard" in text) == (options["beardProbability"] == 100)
        assert ("flowers" in text) == (options["hairAccessoriesProbability"] == 100)
        assert ("glasses" in text) == (options["glassesProbability"] == 100)
        assert ("sunglasses" in text) == (
            options["glassesProbability"] == 100 and options["glassesVariant"] == ["variant02"]
        )


def test_the_script_makes_the_pictures(rows):
    dicebear = pytest.importorskip("dicebear")
    pytest.importorskip("dicebear_styles")
    definition = json.loads(files("dicebear_styles").joinpath("lorelei.json").read_text("utf-8"))
    assert definition["meta"]["license"]["name"] == "CC0 1.0"
    style = dicebear.Style(definition)
    for number in (0, 7, 150, 299):
        assert lorelei.render(style, lorelei.portrait(number)[0]) == rows[number]["image"]["bytes"]


@pytest.mark.parametrize("name", ["mini", "smoke"])
def test_it_is_a_dataset_of_the_preset(name, tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path))
    preset = get_preset(name)
    spec = preset.datasets["lorelei"]
    assert spec.licence.startswith("CC0") and "lorelei" in preset.datasets.known
    assert "lorelei" not in preset.datasets.names, "the notebooks' loops over the course's two datasets leave it out"
    train, held_out = (load_pictures(spec, split) for split in ("train", "held_out"))
    assert (len(train), len(held_out)) == (spec.train_rows, spec.held_out_rows)
    assert train[0]["image"].size == (128, 128)
    assert len(preset.validation_prompts["lorelei"]) == 4

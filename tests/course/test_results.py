"""results.json: what is recorded comes back with its provenance, and comparing finds what differs."""

import json
import shutil

import numpy as np
import pytest
import torch

from helpers.course import results as module
from helpers.course.results import Results, approx, comparable, compare, output_folder, shown, slug
from helpers.evaluation.measures import Measure
from helpers.presets.configuration import DatasetSpec


@pytest.fixture(autouse=True)
def quick_provenance(monkeypatch):
    """Hashing weights and data is other modules' business."""
    monkeypatch.setattr(module, "_weights_hash", lambda preset: "weights")
    monkeypatch.setattr(module, "_data_hashes", lambda preset: {"doodles": "data"})


@pytest.fixture
def results(tmp_path):
    return Results("mini", tmp_path / "results.json")


def test_recorded_values_survive(results):
    results.record("a/share", 0.5, interval=(0.4, 0.6), n=20, tolerance=0.05, notebook="05_styled", unit="share")
    again = Results("mini", results.path)
    assert again.get("a/share") == 0.5
    entry = again.entry("a/share")
    assert (entry["interval"], entry["n"], entry["tolerance"]) == ([0.4, 0.6], 20, 0.05)
    assert (entry["notebook"], entry["unit"]) == ("05_styled", "share")


def test_two_instances_do_not_undo_each_other(results):
    other = Results("mini", results.path)
    other.record("theirs", 1)
    results.record("mine", 2)
    other.record_figure("fig", file="fig.png")
    assert Results("mini", results.path).names == ["mine", "theirs"]
    assert list(Results("mini", results.path).figures) == ["fig"]


def test_provenance_is_complete_and_noted_once(results):
    results.record("a", 1)
    results.record("b", 2)
    [note] = results.data["provenance"].values()
    assert results.entry("a")["provenance"] == results.entry("b")["provenance"]
    wanted = "preset model seed device python torch diffusers transformers code weights data"
    assert set(wanted.split()) <= note.keys()
    assert note["preset"] == "mini" and note["model"] == "MiniSD"


def test_provenance_follows_the_code(results, monkeypatch):
    results.record("a", 1)
    monkeypatch.setattr(module, "measuring_code_hash", lambda: "changed")
    results.record("b", 2)
    assert results.entry("a")["provenance"] != results.entry("b")["provenance"]
    results.record("a", 1)
    assert len(results.data["provenance"]) == 1, "a note that no value refers to must go"


@pytest.fixture
def own_helpers(tmp_path, monkeypatch):
    """A copy of helpers' code, which the hash is made of instead."""
    source = module.ROOT / "helpers"
    for file in source.rglob("*.py"):
        copy = tmp_path / "helpers" / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path / "helpers"


def test_only_what_measures_is_in_the_code_hash(own_helpers):
    """`measuring_code_hash` without its cache, after edits of one file each."""
    hash_now = module.measuring_code_hash.__wrapped__
    unedited = hash_now()

    def changes_with(name):
        before = (own_helpers / name).read_text()
        (own_helpers / name).write_text(f"{before}\nx = 1\n")
        changed = hash_now() != unedited
        (own_helpers / name).write_text(before)
        return changed

    for name in module._NOT_MEASURING:
        path = own_helpers / name
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        assert files and not any(changes_with(file.relative_to(own_helpers)) for file in files), name
    for name in ("training/steps.py", "world/drawing.py", "minisd/architecture.py", "__init__.py", "world/__init__.py"):
        assert changes_with(name), name


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (3, 3),
        ("yes", "yes"),
        ([1.5, "x"], [1.5, "x"]),
        (np.float32(0.5), 0.5),
        (np.arange(3), [0, 1, 2]),
        (torch.tensor(2.5), 2.5),
        ({"a": (1, 2)}, {"a": [1, 2]}),
    ],
)
def test_values_become_json(results, value, kept):
    results.record("x", value)
    assert json.loads(results.path.read_text())["values"]["x"]["value"] == kept


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), [1.0, float("nan")]])
def test_what_json_cannot_hold_is_refused(results, value):
    with pytest.raises(ValueError, match="'x'"):
        results.record("x", value)
    assert not results.path.exists()


def test_wrong_interval_and_tolerance_are_refused(results):
    with pytest.raises(ValueError, match="low, high"):
        results.record("x", 1.0, interval=(2, 1))
    with pytest.raises(ValueError, match="tolerance"):
        results.record("x", 1.0, tolerance=-1)


def test_missing_value_is_named(results):
    results.record("doodles/style", 1)
    with pytest.raises(ValueError, match="'doodles/content'.*doodles/style"):
        results.get("doodles/content")


def test_damaged_file_is_one_sentence(tmp_path):
    (tmp_path / "results.json").write_text('{"values": {')
    with pytest.raises(ValueError, match="not valid JSON"):
        Results("mini", tmp_path / "results.json")
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(ValueError, match="not a results.json"):
        Results("mini", tmp_path / "results.json")


def test_a_failed_write_keeps_the_file(results, monkeypatch):
    results.record("a", 1)
    before = results.path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        results.record("b", 2)
    assert results.path.read_bytes() == before
    assert [p.name for p in results.path.parent.iterdir()] == ["results.json"]


def test_forget_drops_one_notebook(results, monkeypatch):
    results.record("a", 1, notebook="05_x")
    monkeypatch.setenv("COURSE_NOTEBOOK", "06_y")
    results.record("b", 2)
    results.record_figure("fig01_x", file="figures/fig01_x.png", alt="some words in here", model="MiniSD")
    results.forget("06_y")
    assert results.names == ["a"] and results.figures == {}
    assert Results("mini", results.path).names == ["a"]


def test_output_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("COURSE_OUTPUT", raising=False)
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path))
    assert output_folder("smoke") == tmp_path / "smoke"
    monkeypatch.setenv("COURSE_OUTPUT", str(tmp_path / "aside"))
    assert output_folder("smoke") == tmp_path / "aside"


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(0.934, 2, "≈0.93"), (93.4, 0, "≈93"), (-0.001, 2, "≈0.00"), (-1.25, 1, "≈-1.2"), (torch.tensor(0.5), 1, "≈0.5")],
)
def test_approx(value, digits, text):
    assert approx(value, digits) == text


def test_a_measure_is_shown_with_its_interval_and_every_number_of_it_is_marked():
    assert shown(Measure(0.931, 0.9, 0.954, 20)) == "≈0.93 [≈0.90, ≈0.95]"
    assert shown(Measure(-0.001, -0.2, 1, 3), 1) == "≈0.0 [≈-0.2, ≈1.0]"


def test_a_slug_is_a_name_that_the_report_can_look_up():
    names = ["rank, alpha = r=4", "caption_dropout at 64 rows=0.5", "wrong captions=10%", "control=base"]
    assert [slug(n) for n in names] == [
        "rank_alpha_r_4",
        "caption_dropout_at_64_rows_0_5",
        "wrong_captions_10",
        "control_base",
    ]


def test_approx_refuses_what_is_no_measurement():
    with pytest.raises(ValueError, match="finite"):
        approx(float("nan"))


def recorded(path, **values):
    results = Results("mini", path)
    for name, (value, extra) in values.items():
        results.record(name, value, **extra)
    return path


@pytest.mark.parametrize(
    ("new", "old", "extra", "agrees"),
    [
        (0.93, 0.90, {"tolerance": 0.03}, True),
        (0.94, 0.90, {"tolerance": 0.03}, False),
        (0.94, 0.90, {"interval": (0.85, 0.95)}, True),
        (0.96, 0.90, {"interval": (0.85, 0.95)}, False),
        (1.0, 1.0, {"interval": (0.9, 1 - 2e-16)}, True),
        (0.96, 0.90, {"interval": (0.85, 0.99), "tolerance": 0.01}, False),
        (5, 5, {}, True),
        (6, 5, {}, False),
        (1.0000001, 1.0, {}, True),
        (1.001, 1.0, {}, False),
        ("a", "b", {}, False),
        ([1.0, 2.0], [1.0, 2.1], {"tolerance": 0.2}, True),
        ([1.0, 2.0], [1.0, 2.1], {"tolerance": 0.05}, False),
        ([1.0], [1.0, 1.0], {"tolerance": 0.05}, False),
        (True, 1.0, {"tolerance": 2}, False),
        ({"a": 1.0}, {"a": 1.1}, {"tolerance": 0.2}, True),
        ({"b": 1.0}, {"a": 1.0}, {"tolerance": 0.2}, False),
        (10.0, 500.0, {"varies": True}, True),
    ],
)
def test_compare(tmp_path, new, old, extra, agrees):
    measured = recorded(tmp_path / "new.json", x=(new, extra))
    committed = recorded(tmp_path / "old.json", x=(old, extra))
    assert (compare(measured, committed) == []) is agrees


def test_compare_names_what_only_one_file_has(tmp_path):
    measured = recorded(tmp_path / "new.json", both=(1, {}), new=(1, {}), seconds_new=(1.0, {"varies": True}))
    committed = recorded(tmp_path / "old.json", both=(1, {}), old=(1, {}), seconds_old=(1.0, {"varies": True}))
    problems = compare(measured, committed)
    assert [p.split(":")[0] for p in problems] == ["new", "old"]
    assert sorted(comparable(committed)) == ["both", "old"]


def test_compare_needs_both_files(tmp_path):
    with pytest.raises(ValueError, match="course run"):
        compare(tmp_path / "none.json", tmp_path / "none.json")


def test_a_drawn_dataset_s_hash_knows_its_changes():
    places = ("doodles", "doodles?shuffled=0.5", "doodles?skew=background:pink:0.9")
    specs = [DatasetSpec("doodles", f"drawn:{place}") for place in places]
    assert len({module._data_hash(spec, 64) for spec in specs}) == 3

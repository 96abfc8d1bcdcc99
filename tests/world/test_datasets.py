"""Captioned datasets of the drawn world."""

import io
import json
import random
from dataclasses import asdict

import pytest
from PIL import Image as PILImage

from helpers.world import datasets as drawn
from helpers.world.datasets import default_rows, drawn_dataset, fingerprint, scene_from_json
from helpers.world.scenes import HELD_OUT_PAIRS, STYLES, Scene, sample_scene


def pixels(dataset):
    return [row["image"].tobytes() for row in dataset]


def test_columns_pictures_and_captions(tmp_path):
    from datasets import Dataset, Image, Value

    from helpers.world.styles import render

    dataset = drawn_dataset("vintage", "train", size=32, n=4, cache_dir=tmp_path)
    assert isinstance(dataset, Dataset)
    assert dataset.column_names == ["image", "text", "scene"] and len(dataset) == 4
    assert isinstance(dataset.features["image"], Image) and dataset.features["text"] == Value("string")
    for row in dataset:
        scene = scene_from_json(row["scene"])
        assert row["image"].mode == "RGB" and row["image"].size == (32, 32)
        assert row["image"].tobytes() == render(scene, "vintage", 32).tobytes()
        assert row["text"].endswith(", vintage style")
        assert ("bat hero" if scene.subject == "hero" else scene.subject) in row["text"]


def test_rows_repeat_from_their_seed(tmp_path):
    one = drawn_dataset("doodles", "train", size=24, n=5, cache_dir=tmp_path / "a")
    two = drawn_dataset("doodles", "train", size=24, n=3, cache_dir=tmp_path / "b")
    assert one["text"][:3] == two["text"][:] and pixels(one)[:3] == pixels(two)
    for split, seed in (("held_out", 0), ("train", 1)):
        other = drawn_dataset("doodles", split, size=24, n=3, seed=seed, cache_dir=tmp_path / "a")
        assert not set(other["scene"]) & set(one["scene"])


def test_second_call_reads_the_cache(tmp_path, monkeypatch):
    first = drawn_dataset("flat", "train", size=24, n=3, cache_dir=tmp_path)
    monkeypatch.setattr(drawn, "_draw", lambda *_: pytest.fail("drawn again"))
    second = drawn_dataset("flat", "train", size=24, n=3, cache_dir=tmp_path)
    assert pixels(first) == pixels(second) and first["text"][:] == second["text"][:]
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", [b"", b"PAR1 not a table", None])
def test_damaged_cache_is_drawn_again(tmp_path, damage):
    first = drawn_dataset("flat", "train", size=24, n=3, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert pixels(drawn_dataset("flat", "train", size=24, n=3, cache_dir=tmp_path)) == pixels(first)
    assert path.read_bytes() == whole


def test_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(dataset, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(drawn, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drawn_dataset("flat", "train", size=24, n=2, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cache_lies_beside_the_runs_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path))
    drawn_dataset("flat", "train", size=24, n=1)
    (path,) = (tmp_path / "cache").iterdir()
    assert path.name.startswith("drawn-flat-train-24px-1-") and path.suffix == ".parquet"


def test_default_rows_are_the_homeworks():
    assert [default_rows("doodles", s) for s in ("train", "held_out")] == [1000, 200]
    assert [default_rows("vintage", s) for s in ("train", "held_out")] == [685, 200]
    assert {default_rows(s, "train") for s in STYLES} == {1000, 685, 500}


def test_fingerprint_is_of_the_specification_and_the_code(monkeypatch):
    base = fingerprint("doodles", "train")
    assert base == fingerprint("doodles", "train", 128, 1000, 0) and len(base) == 64
    others = [
        fingerprint("vintage", "train", n=1000),
        fingerprint("doodles", "held_out", n=1000),
        fingerprint("doodles", "train", size=32),
        fingerprint("doodles", "train", n=999),
        fingerprint("doodles", "train", seed=1),
    ]
    monkeypatch.setattr(drawn, "code_hash", lambda *_: "other code")
    others.append(fingerprint("doodles", "train"))
    assert len({base, *others}) == 7


def test_scenes_survive_json_and_nonsense_is_refused():
    scene = sample_scene(random.Random(4))
    assert scene_from_json(json.dumps(asdict(scene))) == scene
    assert isinstance(scene_from_json(json.dumps(asdict(scene))), Scene)
    for text in ("", "[1]", '{"subject": "cat"}', '{"hat": 1}'):
        with pytest.raises(ValueError, match="not a scene"):
            scene_from_json(text)


def test_held_out_pairs_are_never_drawn(monkeypatch):
    from helpers.world import styles

    monkeypatch.setattr(styles, "render", lambda scene, style, size: PILImage.new("RGB", (size, size)))
    for split in ("train", "held_out"):
        rows = [drawn._row("doodles", split, 1, 0, index) for index in range(500)]
        scenes = [scene_from_json(row["scene"]) for row in rows]
        assert not {(s.subject, s.headwear) for s in scenes} & HELD_OUT_PAIRS


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown style 'oil'; known: render"):
        drawn_dataset("oil", "train", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="unknown split 'test'; known: train, held_out"):
        drawn_dataset("flat", "test", cache_dir=tmp_path)
    for wrong in ({"n": 0}, {"size": 0}):
        with pytest.raises(ValueError, match="at least one row"):
            drawn_dataset("flat", "train", cache_dir=tmp_path, **wrong)


def test_pictures_are_kept_without_loss(tmp_path):
    from datasets import Image

    dataset = drawn_dataset("flat", "train", size=24, n=2, cache_dir=tmp_path)
    stored = dataset.cast_column("image", Image(decode=False))
    assert all(PILImage.open(io.BytesIO(row["image"]["bytes"])).format == "PNG" for row in stored)

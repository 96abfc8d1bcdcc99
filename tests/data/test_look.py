"""A look at one's own pictures: every number of it, on folders whose contents are known."""

import pytest
from PIL import Image

from helpers.data.look import THUMBNAIL, look_at, spread
from helpers.presets.configuration import DatasetSpec


def spec_of(place, kind="folder"):
    return DatasetSpec("mine", f"{kind}:{place}", train_rows=1000, held_out_rows=0)


@pytest.fixture
def folder(tmp_path):
    """Four pictures that open, one that does not, one without its caption."""
    sizes = {"a": (20, 20), "b": (40, 10), "c": (20, 20), "d": (10, 30)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    (tmp_path / "e.png").write_text("<html>")
    for name, text in {"a": "a red cat", "b": "a red cat", "c": "a dog", "e": "lost"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    return tmp_path


def test_what_is_there_is_counted(folder):
    found = look_at(spec_of(folder), pictures=2)
    assert found.sizes == [(20, 20), (40, 10), (20, 20), (10, 30)]
    assert found.captions == ["a red cat", "a red cat", "a dog", None, "lost"]
    text = str(found)
    assert text.startswith("mine: 5 pictures\n")
    assert "10×30 to 20×20 pixels, most often 20×20 (2)" in text
    assert "2 square, 1 wide, 1 tall; the longest is 4.0 times" in text
    assert "4, 3 different; 1 to 3 words, half of them up to 3" in text
    assert "1 picture without one" in text and "2× 'a red cat'" in text
    assert "unreadable 1 picture:" in text and "e.png" in text


def test_what_is_kept_for_the_sheet_is_the_middle_square(folder):
    assert [picture.size for picture in look_at(spec_of(folder), pictures=9).shown] == [(THUMBNAIL,) * 2] * 4
    assert look_at(spec_of(folder)).shown == []


def test_a_picture_is_counted_as_its_camera_held_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert look_at(spec_of(tmp_path)).sizes == [(10, 30)]


@pytest.mark.parametrize("whole", [True, False])
def test_damage_inside_shows_where_all_of_it_is_read(tmp_path, whole):
    path = tmp_path / "a.jpg"
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[:-900])
    assert len(look_at(spec_of(tmp_path), whole).unreadable) == whole


def test_many_of_a_kind_are_shortened(tmp_path):
    for number in range(9):
        (tmp_path / f"{number}.png").write_text("no picture")
    text = str(look_at(spec_of(tmp_path)))
    assert text.count("cannot read") == 5 and "… and 4 more" in text


def test_a_parquet_file_is_looked_at_too(tmp_path, monkeypatch):
    from datasets import Dataset
    from datasets import Image as ImageColumn

    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    rows = {"image": [Image.new("RGB", (8, 6))] * 3, "text": ["a", "b", None]}
    Dataset.from_dict(rows).cast_column("image", ImageColumn()).to_parquet(tmp_path / "x.parquet")
    found = look_at(spec_of(tmp_path / "x.parquet", "parquet"), pictures=1)
    assert (found.sizes, found.captions, len(found.shown)) == ([(8, 6)] * 3, ["a", "b", None], 1)


def test_the_pictures_shown_are_spread():
    assert spread(10, 3) == {0, 3, 6} and spread(2, 9) == {0, 1} and spread(5, 0) == set()

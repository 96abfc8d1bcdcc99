"""Folders as people bring them: captions of other trainers, other tables, other encodings, and 60 that are broken."""

import io
import json
import random
import re
import zipfile

import numpy as np
import pytest
from PIL import Image

from helpers.base.errors import DataError
from helpers.data.loading import load_pictures, read_picture
from helpers.data.look import look_at
from helpers.presets.configuration import DatasetSpec


def spec_of(folder, **settings):
    return DatasetSpec(
        **{"name": "mine", "source": f"folder:{folder}", "train_rows": 1000, "held_out_rows": 0, **settings}
    )


def picture(path, colour=(200, 30, 30), size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def captions(folder):
    return load_pictures(spec_of(folder))["text"][:]


# ---- captions of other trainers ----


@pytest.mark.parametrize("name", ["cat.caption", "cat.txt", "cat.TXT", "cat.Caption", "cat.png.txt"])
def test_a_caption_file_by_any_of_its_names(tmp_path, name):
    picture(tmp_path / "cat.png")
    (tmp_path / name).write_text("a cat\r\n")
    assert captions(tmp_path) == ["a cat"]


def test_a_text_file_counts_more_than_a_caption_file(tmp_path):
    picture(tmp_path / "cat.png")
    (tmp_path / "cat.caption").write_text("two")
    (tmp_path / "cat.txt").write_text("one")
    assert captions(tmp_path) == ["one"]
    assert any(".txt counts" in note for note in look_at(spec_of(tmp_path)).notes)


def test_a_folder_without_captions_offers_to_write_them(tmp_path):
    picture(tmp_path / "cat.png")
    with pytest.raises(DataError, match=r"1 of 1 pictures .* no caption, cat\.png .*--caption"):
        captions(tmp_path)
    assert "--caption" in str(look_at(spec_of(tmp_path)))


def repeated(tmp_path, **folders):
    """Folders by name, with so many pictures each."""
    for name, count in folders.items():
        for number in range(count):
            path = picture(tmp_path / name / f"{number}.png")
            path.with_suffix(".txt").write_text(f"{name} {number}")
    return tmp_path


def test_repetitions_of_kohyas_folders_are_a_ratio(tmp_path):
    repeated(tmp_path, **{"10_cat": 1, "20_dog": 2, "2023_summer": 1, "free": 1})
    texts = captions(tmp_path)
    assert {text: texts.count(text) for text in texts} == {
        "10_cat 0": 10,
        "20_dog 0": 20,
        "20_dog 1": 20,
        "2023_summer 0": 1,
        "free 0": 1,
    }
    assert len(look_at(spec_of(tmp_path)).captions) == 5, "a look counts each picture once"


def test_repetitions_that_are_all_alike_are_none(tmp_path):
    repeated(tmp_path, **{"10_cat": 2, "10_dog": 1})
    assert captions(tmp_path) == ["10_cat 0", "10_cat 1", "10_dog 0"]
    (note,) = look_at(spec_of(tmp_path)).notes
    assert note.endswith("10_cat 1×, 10_dog 1×")


def test_repetitions_are_reported_and_hold_nothing_out(tmp_path):
    repeated(tmp_path, **{"1_cat": 1, "3_dog": 1})
    assert any("1_cat 1×, 3_dog 3×" in note for note in look_at(spec_of(tmp_path)).notes)
    with pytest.raises(DataError, match="held out"):
        load_pictures(spec_of(tmp_path, train_rows=3, held_out_rows=1))


def test_a_repeated_folders_name_is_its_caption(tmp_path):
    picture(tmp_path / "5_sks cat" / "a.png")
    assert captions(tmp_path) == ["sks cat"]
    assert any("5_sks cat" in note for note in look_at(spec_of(tmp_path)).notes)


def test_pictures_of_one_name_are_reported(tmp_path):
    for name in ("a.png", "a.jpg", "b.png"):
        picture(tmp_path / name).with_suffix(".txt").write_text("x")
    assert captions(tmp_path) == ["x", "x", "x"]
    (note,) = look_at(spec_of(tmp_path)).notes
    assert note.endswith("share one name and so one caption: a")


# ---- tables ----


@pytest.mark.parametrize(("mark", "word"), [(";", "semicolons"), ("\t", "tabs")])
def test_another_mark_between_the_cells_is_read_and_reported(tmp_path, mark, word):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(f'file_name{mark}text\na.png{mark}"a cat, red{mark} and {mark}"\n')
    assert captions(tmp_path) == [f"a cat, red{mark} and {mark}"]
    assert any(word in note for note in look_at(spec_of(tmp_path)).notes)


def test_a_semicolon_in_a_caption_is_no_mark(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a cat; a hat\n")
    assert captions(tmp_path) == ["a cat; a hat"]
    assert not look_at(spec_of(tmp_path)).notes


# ---- encodings ----

ENCODED = [
    ("cp1252", "ein Mädchen mit grünem Hut"),
    ("cp1252", "the cat’s hat"),
    ("cp1251", "кот в шляпе на синем фоне"),
    ("shift_jis", "青い帽子をかぶった猫"),
    ("euc_kr", "파란 모자를 쓴 고양이"),
    ("gb18030", "戴帽子的猫，蓝色背景"),
    ("utf-16", "a cat"),
]


@pytest.mark.parametrize("file", ["a.txt", "a.caption", "metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize(("encoding", "text"), ENCODED)
def test_the_encoding_that_fits_is_named(tmp_path, file, encoding, text):
    picture(tmp_path / "a.png")
    tables = {
        "metadata.csv": f"file_name,text\na.png,{text}\n",
        "metadata.jsonl": '{"file_name": "a.png", "text": "%s"}',
    }
    (tmp_path / file).write_bytes(tables.get(file, text).replace("%s", text).encode(encoding))
    with pytest.raises(DataError, match=rf"{re.escape(file)}: .*{encoding} fits.*iconv -f {encoding} -t utf-8"):
        captions(tmp_path)


def test_an_encoding_that_nobody_knows_is_said(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\x00\x81\x02")
    with pytest.raises(DataError, match="no encoding that is known"):
        captions(tmp_path)


# ---- 60 folders that are broken ----


def noise(rng, size=(9, 7)):
    pixels = np.random.default_rng(rng.randrange(10**6)).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, rng.choice(["png", "jpeg", "gif", "webp", "bmp", "tiff"]))
    return file.getvalue()


def cut(rng, folder):
    path = rng.choice(sorted(folder.glob("*.png")))
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def flip(rng, folder):
    path = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 20)):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def put(name, content):
    """Another file of that name; `content` may depend on the generator of random numbers."""

    def change(rng, folder):
        data = content(rng) if callable(content) else content
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())

    return change


def rename(rng, folder):
    path = rng.choice(sorted(folder.glob("*.*")))
    path.rename(
        folder / rng.choice(["x" * 200 + ".png", ".hidden.png", "é ü.png", "a\nb.png", "10_", "no_suffix", "-.txt"])
    )


def as_folder(rng, folder):
    (folder / rng.choice(["0.png", "0.txt", "metadata.csv", "metadata.jsonl", "x.parquet", "1.caption"])).unlink(
        missing_ok=True
    )
    (folder / rng.choice(["new.png", "new.txt", "metadata.csv", "metadata.jsonl", "x.parquet"])).mkdir(exist_ok=True)


def link(rng, folder):
    (folder / rng.choice(["loop", "gone.png", "gone.txt"])).symlink_to(
        rng.choice([folder, folder / "nothing", "/dev/null"])
    )


def archive(rng):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("a.png", b"x")
    return file.getvalue()


CHANGES = [
    cut,
    flip,
    flip,
    rename,
    as_folder,
    link,
    put("2.png", b""),
    put("2.png", "<html>404</html>"),
    put("2.png", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
    put("2.png", archive),
    put("0.txt", lambda rng: rng.randbytes(30)),
    put("0.txt", lambda rng: "\0" * rng.randint(1, 9)),
    put("metadata.csv", lambda rng: rng.randbytes(60)),
    put("metadata.csv", "file_name,text\n../../etc/passwd,x\n"),
    put("metadata.csv", "file_name,text\n/etc/passwd,x\n"),
    put("metadata.csv", 'file_name,text\n0.png,"never closed\n1.png,x\n'),
    put("metadata.csv", "file_name\n0.png\n"),
    put("metadata.csv", "file_name,text,text\n0.png,a,b\n"),
    put("metadata.csv", "file_name,text\n0.png\n\n1.png,x,y,z\n"),
    put("metadata.csv", "file_name,text\n" + "0.png," + "x" * 200_000 + "\n"),
    put("metadata.csv", "file_name,text\n\0.png,x\n"),
    put("metadata.csv", ""),
    put("metadata.jsonl", "[" * 100_000),
    put("metadata.jsonl", '{"file_name": 3, "text": "x"}'),
    put("metadata.jsonl", '{"file_name": "0.png", "text": {"a": 1}}'),
    put("metadata.jsonl", '{"file_name": "0.png", "text": "\\ud800"}'),
    put("metadata.jsonl", "null\n3\n"),
    put("metadata.jsonl", json.dumps({"file_name": "0.png" + "/x" * 3000, "text": "x"})),
    put("train.parquet", lambda rng: b"PAR1" + rng.randbytes(40) + b"PAR1"),
    put("train.parquet", b""),
]


@pytest.mark.parametrize("seed", range(60))
def test_a_broken_folder_is_read_or_refused_in_a_sentence(tmp_path, monkeypatch, seed):
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    rng = random.Random(f"broken folder {seed}")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(noise(rng))
        (folder / f"{number}.{rng.choice(['txt', 'caption'])}").write_text(f"picture {number}")
    for change in [CHANGES[seed % len(CHANGES)], *rng.choices(CHANGES, k=rng.randint(0, 2))]:
        try:
            change(rng, folder)
        except OSError:  # two changes that exclude each other
            continue
    try:
        rows = load_pictures(spec_of(folder))
        for row in range(len(rows)):
            read_picture(rows, row)
    except DataError as error:
        assert str(error).strip() and "Traceback" not in str(error)
    try:
        assert str(look_at(spec_of(folder), pictures=2))
    except DataError as error:
        assert str(error).strip()

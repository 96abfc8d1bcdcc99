"""Datasets from folders and the drawn world, and pictures of every mode."""

import csv
import io
import json
import logging
import struct
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image

from helpers.base import hub
from helpers.base.errors import DataError
from helpers.data import loading as data
from helpers.data.fingerprint import data_fingerprint
from helpers.data.loading import caption_sentence, describe_captions, load_pictures, read_picture, shape_sentence
from helpers.diffusion.pictures import to_tensor
from helpers.presets.configuration import DatasetSpec
from helpers.presets.variants import get_preset

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def spec_of(folder, **settings):
    return DatasetSpec(**{"name": "mine", "source": f"folder:{folder}", "train_rows": 100, **settings})


def save_pictures(folder, count=3):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (20, 16), (40 * i, 0, 0)).save(folder / f"{i}.png")
    return folder


def write_csv(folder, rows):
    with open(folder / "metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def folder(tmp_path):
    """Three pictures with a metadata.csv."""
    pictures = save_pictures(tmp_path / "pictures")
    write_csv(pictures, [{"file_name": f"{i}.png", "text": f"picture {i}"} for i in range(3)])
    return pictures


# Folders ---------------------------------------------------------------------------------------------------------


def test_folder_with_metadata_csv(folder):
    dataset = load_pictures(spec_of(folder))
    assert dataset.column_names == ["image", "text"]
    assert dataset["text"][:] == ["picture 0", "picture 1", "picture 2"]
    assert dataset[2]["image"].getpixel((0, 0)) == (80, 0, 0)


def test_folder_with_metadata_jsonl_and_another_column(tmp_path):
    pictures = save_pictures(tmp_path / "p", 2)
    rows = [{"file_name": f"{i}.png", "caption": f"né {i}"} for i in (1, 0)]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    (pictures / "metadata.jsonl").write_text(text, encoding="utf-8-sig")
    dataset = load_pictures(spec_of(pictures, text_column="caption"))
    assert dataset["text"][:] == ["né 1", "né 0"]
    assert dataset[0]["image"].getpixel((0, 0)) == (40, 0, 0)


def test_folder_with_text_files(tmp_path):
    pictures = save_pictures(tmp_path / "p", 2)
    for i in range(2):
        (pictures / f"{i}.txt").write_text(f"picture {i}\n")
    assert load_pictures(spec_of(pictures))["text"][:] == ["picture 0", "picture 1"]


def test_splits_do_not_overlap(folder):
    spec = spec_of(folder, train_rows=2, held_out_rows=5)
    assert load_pictures(spec, "train")["text"][:] == ["picture 0", "picture 1"]
    assert load_pictures(spec, "held_out")["text"][:] == ["picture 2"]
    assert len(load_pictures(replace(spec, train_rows=100), "held_out")) == 0
    with pytest.raises(ValueError, match="unknown split 'test'"):
        load_pictures(spec, "test")


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match="there is no folder or file .*nowhere"):
        load_pictures(spec_of(tmp_path / "nowhere"))


def test_empty_folder(tmp_path):
    with pytest.raises(DataError, match="there are no pictures"):
        load_pictures(spec_of(tmp_path))


def test_no_captions(tmp_path):
    pictures = save_pictures(tmp_path / "p", 2)
    (pictures / "0.txt").write_text("a cat")
    with pytest.raises(DataError, match=r"1 of 2 pictures in .* have no caption, 1\.png for one: put a \.txt file"):
        load_pictures(spec_of(pictures))


def test_missing_column_names_those_that_exist(folder):
    with pytest.raises(DataError, match="no column 'caption'; its columns are: file_name, text"):
        load_pictures(spec_of(folder, text_column="caption"))


def test_the_column_of_pictures_can_be_named(folder):
    write_csv(folder, [{"photo": "2.png", "file_name": "0.png", "text": "a"}])
    assert load_pictures(spec_of(folder))[0]["image"].getpixel((0, 0)) == (0, 0, 0)
    assert load_pictures(spec_of(folder, image_column="photo"))[0]["image"].getpixel((0, 0)) == (80, 0, 0)
    with pytest.raises(DataError, match=r"metadata\.csv has no column 'pic'; its columns are: photo, file_name, text"):
        load_pictures(spec_of(folder, image_column="pic"))


def test_a_missing_or_blank_caption_is_the_empty_one(folder):
    write_csv(folder, [{"file_name": "0.png", "text": "a"}, {"file_name": "1.png", "text": " "}])
    assert load_pictures(spec_of(folder))["text"][:] == ["a", ""]
    (folder / "metadata.csv").unlink()
    rows = [{"file_name": "0.png", "text": None}, {"file_name": "1.png"}, {"file_name": "2.png", "text": " b "}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"file_name": "0.png", "text": NaN}')
    assert load_pictures(spec_of(folder))["text"][:] == ["", "", " b ", ""]


def test_an_empty_text_file_is_an_empty_caption(tmp_path):
    pictures = save_pictures(tmp_path / "p", 2)
    (pictures / "0.txt").write_text("\n")
    (pictures / "1.txt").write_text("a cat")
    assert load_pictures(spec_of(pictures))["text"][:] == ["", "a cat"]
    (pictures / "1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"cannot read .*1\.txt: it is not text in UTF-8"):
        load_pictures(spec_of(pictures))


def test_captions_that_are_all_empty_are_refused(folder):
    write_csv(folder, [{"file_name": f"{i}.png", "words": text} for i, text in enumerate(["", " ", "a cat"])])
    spec = spec_of(folder, text_column="words")
    assert load_pictures(spec)["text"][:] == ["", "", "a cat"]
    with pytest.raises(DataError, match="all captions of mine are empty .column 'words'."):
        load_pictures(replace(spec, train_rows=2))


@pytest.mark.parametrize(("value", "kind"), [(3, "int"), (["a"], "list"), (1.5, "float")])
def test_a_caption_that_is_not_text_is_refused(folder, value, kind):
    (folder / "metadata.csv").unlink()
    rows = [{"file_name": "0.png", "text": "a"}, {"file_name": "1.png", "text": value}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = rf"row 1 of metadata\.jsonl has no text in the column 'text' but a value of type {kind}"
    with pytest.raises(DataError, match=expected):
        load_pictures(spec_of(folder))


def test_a_comma_in_a_caption_needs_quotes(folder):
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a cat\n1.png,a cat, black\n")
    with pytest.raises(DataError, match=r"row 1 of metadata\.csv has too many cells"):
        load_pictures(spec_of(folder))
    (folder / "metadata.csv").write_text('file_name,text\n1.png,"a cat, black"\n')
    assert load_pictures(spec_of(folder))["text"][:] == ["a cat, black"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../outside.png", r"row 1 of metadata\.jsonl names \.\./outside\.png, which is outside of"),
        (None, r"row 1 of metadata\.jsonl names no picture"),
        (7, r"row 1 of metadata\.jsonl names no picture"),
        ("inner", "inner is a folder, not a picture"),
    ],
)
def test_metadata_naming_what_is_no_picture_of_the_folder(folder, name, words):
    (folder / "metadata.csv").unlink()
    (folder / "inner").mkdir()
    Image.new("RGB", (8, 8)).save(folder.parent / "outside.png")
    rows = [{"file_name": "0.png", "text": "a"}, {"file_name": name, "text": "b"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=words):
        load_pictures(spec_of(folder))


def test_hidden_files_do_not_count(tmp_path):
    pictures = save_pictures(tmp_path / "p", 1)
    (pictures / "0.txt").write_text("a cat")
    (pictures / "._0.png").write_bytes(b"what a Mac leaves on a memory stick")
    save_pictures(pictures / ".ipynb_checkpoints")
    assert load_pictures(spec_of(pictures))["text"][:] == ["a cat"]


def test_metadata_naming_an_absent_picture(folder):
    write_csv(folder, [{"file_name": "lost.png", "text": "a"}])
    with pytest.raises(DataError, match=r"metadata\.csv names lost\.png, which is not in"):
        load_pictures(spec_of(folder))


@pytest.mark.parametrize("content", ['{"file_name": ', "[1]", "\xff\xfe"])
def test_unreadable_metadata(tmp_path, content):
    pictures = save_pictures(tmp_path / "p", 1)
    (pictures / "metadata.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"cannot read .*metadata\.jsonl"):
        load_pictures(spec_of(pictures))


def test_metadata_without_rows(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(DataError, match="has no rows"):
        load_pictures(spec_of(tmp_path))


def test_unreadable_picture_is_named_at_loading(folder):
    (folder / "1.png").write_bytes(b"this is not a picture")
    with pytest.raises(DataError, match=r"cannot read the picture .*1\.png"):
        load_pictures(spec_of(folder))


def test_unknown_source():
    with pytest.raises(DataError, match="unknown source 'ftp:x'; it begins with drawn:, hub:, folder: or parquet:"):
        load_pictures(DatasetSpec("x", "ftp:x"))


# Parquet files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def encoded(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "png")
    return buffer.getvalue()


def write_parquet(path, pictures, captions, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": pictures, "text": captions, **columns}), path)


def first_colours(dataset):
    return [read_picture(dataset, row).getpixel((0, 0)) for row in range(len(dataset))]


def test_parquet_file_as_the_datasets_library_writes_it(runs, tmp_path):
    pictures = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    columns = {"pic": pictures, "blip": ["red", "blue"], "n": [1, 2]}
    Dataset.from_dict(columns).cast_column("pic", ImageColumn()).to_parquet(tmp_path / "mine.parquet")
    spec = DatasetSpec("mine", f"parquet:{tmp_path}/mine.parquet", image_column="pic", text_column="blip")
    dataset = load_pictures(spec)
    assert (dataset.column_names, dataset["text"][:]) == (["image", "text"], ["red", "blue"])
    assert first_colours(dataset) == [RED, BLUE]
    assert load_pictures(replace(spec, train_rows=1, held_out_rows=9), "held_out")["text"][:] == ["blue"]
    for column in ("image_column", "text_column"):
        with pytest.raises(DataError, match=r"mine\.parquet has no column 'x'; its columns are: pic, blip, n"):
            load_pictures(replace(spec, **{column: "x"}))
    with pytest.raises(DataError, match="row 0 of mine has no text in the column 'n' but a value of type int"):
        load_pictures(replace(spec, text_column="n"))
    with pytest.raises(DataError, match="row 0 of mine has no text in the column 'pic' but a value of type dict"):
        load_pictures(replace(spec, image_column="blip", text_column="pic"))
    with pytest.raises(DataError, match="the column 'blip' of mine cannot hold both the pictures and the captions"):
        load_pictures(replace(spec, image_column="blip"))
    with pytest.raises(DataError, match="the column 'n' of mine does not hold pictures"):
        load_pictures(replace(spec, image_column="n"))


@pytest.mark.parametrize("as_struct", [False, True])
def test_folder_of_parquet_files(runs, tmp_path, as_struct):
    def cells(*colours):
        return [{"bytes": encoded(c), "path": None} if as_struct else encoded(c) for c in colours]

    write_parquet(tmp_path / "d/data/train-1.parquet", cells(BLUE), ["blue"])
    write_parquet(tmp_path / "d/data/train-0.parquet", cells(RED, RED), ["red", None])
    write_parquet(tmp_path / "d/data/test-0.parquet", cells(BLUE), ["not for training"])
    dataset = load_pictures(spec_of(tmp_path / "d"))
    assert (dataset["text"][:], first_colours(dataset)) == (["red", "", "blue"], [RED, RED, BLUE])
    for path in tmp_path.glob("d/data/train-*"):
        path.unlink()
    assert load_pictures(spec_of(tmp_path / "d"))["text"][:] == ["not for training"]


def test_parquet_is_read_again_when_it_changes_and_only_the_runs_folder_is_written(runs, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "home"))
    spec = DatasetSpec("mine", f"parquet:{tmp_path}/mine.parquet")
    for colour in (RED, BLUE):
        write_parquet(tmp_path / "mine.parquet", [encoded(colour)], ["a"])
        assert first_colours(load_pictures(spec)) == [colour]
    assert {path.name for path in tmp_path.iterdir()} == {"mine.parquet", "runs"}
    assert (runs / "cache" / "datasets").is_dir()


@pytest.mark.parametrize("how", ["empty", "cut", "inside"])
def test_damaged_parquet_is_named(runs, tmp_path, how, capfd, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [caplog.handler])
    path = tmp_path / "mine.parquet"
    table = pa.table({"image": [encoded(RED)] * 3, "text": ["a", "b", "c"]})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
    whole = path.read_bytes()
    length = whole.index(b"\x89PNG") - 4  # where the file says how many bytes the first picture has
    path.write_bytes({"empty": b"", "cut": whole[:-20], "inside": whole[:length] + b"\xff" + whole[length + 1 :]}[how])
    with pytest.raises(DataError, match=r"cannot read .*mine\.parquet: [^\n]+$"):
        load_pictures(DatasetSpec("mine", f"parquet:{path}"))
    assert (capfd.readouterr(), caplog.records) == (("", ""), []), "nothing but the error"


def test_parquet_with_nothing_to_train_on(runs, tmp_path):
    path = tmp_path / "mine.parquet"
    write_parquet(path, pa.array([], pa.binary()), pa.array([], pa.string()))
    with pytest.raises(DataError, match=r"mine\.parquet in .* has no rows"):
        load_pictures(DatasetSpec("mine", f"parquet:{path}"))
    write_parquet(path, [encoded(RED)] * 2, [float("nan"), None])
    with pytest.raises(DataError, match="all captions of mine are empty .column 'text'."):
        load_pictures(DatasetSpec("mine", f"parquet:{path}"))


def test_rows_of_a_parquet_file_without_a_picture_are_named(runs, tmp_path):
    cells = [encoded(RED), None, b"", encoded(RED)[:50]]
    write_parquet(tmp_path / "mine.parquet", cells, list("abcd"))
    dataset = load_pictures(DatasetSpec("mine", f"parquet:{tmp_path}/mine.parquet"))
    assert read_picture(dataset, 0).size == (8, 8)
    expected = ["there is no picture in row 1", "picture of row 2: it is empty, or", "picture of row 3: .*truncated"]
    for row, words in enumerate(expected, start=1):
        with pytest.raises(DataError, match=words):
            read_picture(dataset, row)


def test_a_file_is_no_folder_and_a_folder_no_file(runs, tmp_path):
    write_parquet(tmp_path / "mine.parquet", [encoded(RED)], ["a"])
    with pytest.raises(DataError, match="is a file, not a folder; the source of a parquet file is parquet:"):
        load_pictures(DatasetSpec("mine", f"folder:{tmp_path}/mine.parquet"))
    with pytest.raises(DataError, match="is a folder, not a parquet file; its source is folder:"):
        load_pictures(DatasetSpec("mine", f"parquet:{tmp_path}"))
    with pytest.raises(DataError, match="there is no folder or file .*lost"):
        load_pictures(DatasetSpec("mine", f"parquet:{tmp_path}/lost.parquet"))


# Other sources ---------------------------------------------------------------------------------------------------


def test_hub_columns_are_renamed_and_a_missing_one_named(monkeypatch, folder):
    rows = {"pic": [str(folder / "0.png")], "blip": ["a cat"], "text": ["other"]}
    asked = {}

    def load_dataset(place, split, cache_dir):
        asked.update(place=place, split=split)
        return Dataset.from_dict(rows).cast_column("pic", ImageColumn())

    def fetch(what, repositories, kind, download_gb):
        asked.update(repositories=repositories, kind=kind)
        return hub.Copy(folder, "a/b", "c" * 40)

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "fetch", fetch)
    spec = DatasetSpec("d", "hub:a/b", image_column="pic", text_column="blip", revision="abc")
    dataset = load_pictures(spec)
    assert asked == {"place": str(folder), "split": "train", "repositories": [("a/b", "abc")], "kind": "dataset"}
    assert dataset.column_names == ["image", "text"]
    assert (dataset[0]["text"], dataset[0]["image"].size) == ("a cat", (20, 16))
    with pytest.raises(DataError, match="d has no column 'label'; its columns are: pic, blip, text"):
        load_pictures(replace(spec, text_column="label"))


def test_a_download_that_holds_no_dataset_is_told(monkeypatch, tmp_path):
    (tmp_path / "data.parquet").write_bytes(b"not a table")
    monkeypatch.setattr(hub, "fetch", lambda *args, **settings: hub.Copy(tmp_path, "a/b", "c" * 40))
    with pytest.raises(DataError, match="cannot read the dataset a/b in "):
        load_pictures(DatasetSpec("d", "hub:a/b"))


@pytest.mark.parametrize(
    ("total", "train", "held_out"),
    [
        (20, [0, 2, 4, 6, 8, 10], [1, 7, 13]),  # of 1, 3 … 19, three evenly spread
        (5, [0, 2, 4], [1, 3]),
        (1, [0], []),
        (0, [], []),
    ],
)
def test_alternate_rows_train_and_measure(total, train, held_out):
    spec = DatasetSpec("d", "hub:a/b", train_rows=6, held_out_rows=3, split="alternate")
    found = {split: list(data.split_rows(spec, split, total)) for split in ("train", "held_out")}
    assert found == {"train": train, "held_out": held_out}


def test_the_homeworks_split_of_the_vintage_pictures():
    """685 of 1,370 rows train, none of them is held out, and both come from all over the dataset."""
    spec = get_preset("sd21-base").datasets["vintage"]
    train, held_out = (list(data.split_rows(spec, split, 1370)) for split in ("train", "held_out"))
    assert (len(train), len(held_out), len(set(held_out))) == (685, 200, 200)
    assert not set(train) & set(held_out)
    for rows in (train, held_out):
        assert rows[0] < 10 and rows[-1] > 1355
        assert abs(sum(row < 685 for row in rows) - len(rows) / 2) <= 1


def test_an_unknown_split_is_named():
    with pytest.raises(DataError, match="unknown split 'random' of the dataset d; known: first, alternate"):
        data.split_rows(DatasetSpec("d", "hub:a/b", split="random"), "train", 10)


def test_drawn_pictures_have_the_columns_and_the_size(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path))
    spec = DatasetSpec("d", "drawn:doodles", train_rows=2, held_out_rows=0)
    dataset = load_pictures(spec, "train", 24)
    assert {"image", "text"} <= set(dataset.column_names)
    assert (len(dataset), dataset[1]["image"].size, dataset[1]["image"].mode) == (2, (24, 24), "RGB")
    assert len(load_pictures(spec, "held_out", 24)) == 0


def test_drawn_rows_come_from_the_drawn_world(monkeypatch):
    from helpers.world import datasets as world

    asked = []
    monkeypatch.setattr(world, "drawn_dataset", lambda style, split, size, n: asked.append((style, split, size, n)))
    spec = DatasetSpec("d", "drawn:doodles", train_rows=7, held_out_rows=3)
    load_pictures(spec, "train", 32)
    load_pictures(spec, "held_out", 48)
    assert asked == [("doodles", "train", 32, 7), ("doodles", "held_out", 48, 3)]


# Pictures to tensors ---------------------------------------------------------------------------------------------


def colours(tensor):
    """0..255 of the centre of a tensor [3, H, W] in -1..1."""
    middle = tensor.shape[-1] // 2
    return [round(float(v)) for v in (tensor[:, middle, middle] + 1) * 127.5]


def test_rgb_keeps_every_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    tensor = to_tensor(Image.fromarray(pixels), 16)
    assert (tensor.shape, tensor.dtype) == ((3, 16, 16), torch.float32)
    assert np.array_equal(((tensor + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), pixels)
    assert to_tensor(Image.new("RGB", (8, 8), "black"), 8).min() == -1
    assert to_tensor(Image.new("RGB", (8, 8), "white"), 8).max() == 1


def palette_with_transparency(tmp_path):
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.save(tmp_path / "p.png", transparency=0)
    return Image.open(tmp_path / "p.png")


def test_every_mode(tmp_path):
    half = Image.fromarray(np.full((8, 8), 0.5, np.float32))
    cases = {
        "transparent red is white": (Image.new("RGBA", (8, 8), (*RED, 0)), (255, 255, 255)),
        "half transparent red is pink": (Image.new("RGBA", (8, 8), (*RED, 128)), (255, 127, 127)),
        "grey with alpha": (Image.new("LA", (8, 8), (0, 0)), (255, 255, 255)),
        "CMYK": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), RED),
        "grey": (Image.new("L", (8, 8), 77), (77, 77, 77)),
        "bilevel": (Image.new("1", (8, 8), 1), (255, 255, 255)),
        "16 bits": (Image.fromarray(np.full((8, 8), 32896, np.uint16)), (128, 128, 128)),
        "32 bits": (Image.new("I", (8, 8), 65535), (255, 255, 255)),
        "floating point": (half, (128, 128, 128)),
        "palette": (Image.new("RGB", (8, 8), BLUE).convert("P"), BLUE),
        "palette with a transparent colour": (palette_with_transparency(tmp_path), (255, 255, 255)),
    }
    for name, (picture, expected) in cases.items():
        assert colours(to_tensor(picture, 8)) == list(expected), name


def test_16_bit_file(tmp_path):
    Image.fromarray(np.full((8, 8), 32896, np.uint16)).save(tmp_path / "grey.png")
    assert colours(to_tensor(Image.open(tmp_path / "grey.png"), 8)) == [128, 128, 128]


def test_exif_orientation_is_followed(tmp_path):
    picture = Image.new("RGB", (8, 8), RED)
    picture.paste(BLUE, (0, 0, 8, 4))  # stored with blue on top
    exif = Image.Exif()
    exif[0x0112] = 3  # to be shown upside down
    picture.save(tmp_path / "turned.png", exif=exif)
    shown = to_tensor(Image.open(tmp_path / "turned.png"), 8)
    assert torch.equal(shown[:, 0, 0], torch.tensor([1.0, -1.0, -1.0]))
    assert torch.equal(shown[:, 7, 0], torch.tensor([-1.0, -1.0, 1.0]))


def test_centre_is_kept_when_cropping():
    picture = Image.new("RGB", (60, 20), RED)
    picture.paste(BLUE, (20, 0, 40, 20))
    tensor = to_tensor(picture, 20)
    assert torch.equal(tensor, torch.tensor([-1.0, -1.0, 1.0]).reshape(3, 1, 1).expand(3, 20, 20))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (500, 3), (7, 64)])
def test_any_size_fills_the_square(size):
    assert to_tensor(Image.new("RGB", size, RED), 16).shape == (3, 16, 16)


# Every kind of file, from the folder to the tensor ---------------------------------------------------------------


def top_and_bottom(top, bottom, mode="RGB"):
    picture = Image.new(mode, (8, 8), bottom)
    picture.paste(top, (0, 0, 8, 4))
    return picture


def save_with_exif(path):
    exif = Image.Exif()
    exif[0x0112] = 3  # to be shown upside down
    top_and_bottom(BLUE, RED).save(path, exif=exif, quality=100)


def save_palette(path):
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([*RED, *BLUE])
    picture.paste(1, (0, 4, 8, 8))
    picture.save(path, transparency=1)


def save_animation(path):
    first, second = top_and_bottom(RED, BLUE), top_and_bottom(BLUE, RED)
    first.save(path, save_all=True, append_images=[second], duration=100)


def save_wide_grey(path):
    pixels = np.full((8, 8), 32896, np.uint16)  # 128 * 257
    pixels[:4] = 65535
    Image.fromarray(pixels).save(path)


INK = top_and_bottom((0, 255, 255, 0), (255, 255, 0, 0), "CMYK")
GOOD_FILES = {  # name: (how to write it, the colour at the top, at the bottom)
    "plain.png": (top_and_bottom(RED, BLUE).save, RED, BLUE),
    "transparent.png": (top_and_bottom((*RED, 255), (*BLUE, 0), "RGBA").save, RED, WHITE),
    "ink.tif": (lambda path: INK.save(path), RED, BLUE),
    "ink.jpg": (lambda path: INK.save(path, quality=100), RED, BLUE),
    "16_bits.png": (save_wide_grey, WHITE, (128, 128, 128)),
    "16_bits.tif": (save_wide_grey, WHITE, (128, 128, 128)),
    "palette.png": (save_palette, RED, WHITE),
    "turned.jpg": (save_with_exif, RED, BLUE),
    "turned.png": (save_with_exif, RED, BLUE),
    "moving.gif": (save_animation, RED, BLUE),
    "moving.png": (save_animation, RED, BLUE),
    "moving.webp": (lambda path: top_and_bottom(RED, BLUE).save(path, lossless=True, save_all=True), RED, BLUE),
    "one_pixel.png": (Image.new("RGB", (1, 1), BLUE).save, BLUE, BLUE),
    "misnamed.png": (lambda path: top_and_bottom(RED, BLUE).save(path, "bmp"), RED, BLUE),
}


def only_file(tmp_path, name):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / name).with_suffix(".txt").write_text("a caption")
    return folder / name


def load_only(path):
    return to_tensor(read_picture(load_pictures(spec_of(path.parent)), 0), 8)


@pytest.mark.parametrize("name", GOOD_FILES)
def test_files_of_every_kind_are_read(tmp_path, name):
    write, top, bottom = GOOD_FILES[name]
    path = only_file(tmp_path, name)
    write(path)
    pixels = (load_only(path) + 1) * 127.5
    assert pixels.shape == (3, 8, 8)
    for row, expected in ((1, top), (6, bottom)):
        assert torch.allclose(pixels[:, row, 4], torch.tensor(expected).float(), atol=8), row


def write_bomb(path, side=20_000):
    """A small file that says it is a picture of 20,000 by 20,000 pixels."""
    Image.new("L", (8, 8)).save(path, "png")
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", side, side)  # in the header: after 8 bytes of signature, 4 of length, "IHDR"
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def write_truncated(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD_FILES = {  # name: (how to write it, what the error says)
    "bomb.png": (write_bomb, "it has more than the 178,956,970 pixels that are safe to open"),
    "truncated.png": (write_truncated, ""),
    "truncated.jpg": (write_truncated, "of row 0: image file is truncated"),
    "truncated.gif": (write_truncated, ""),
    "truncated.webp": (write_truncated, ""),
    "nothing.png": (lambda path: path.write_bytes(b""), "it is empty, or not a picture"),
    "words.png": (lambda path: path.write_text("a cat"), "it is empty, or not a picture"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_are_no_picture_are_refused_by_name(tmp_path, name):
    write, words = BAD_FILES[name]
    path = only_file(tmp_path, name)
    write(path)
    with pytest.raises(DataError, match=f"cannot read the picture .*{name}.*{words}") as caught:
        load_only(path)
    assert "\n" not in str(caught.value)


def test_a_folder_named_like_a_picture_is_refused_by_name(tmp_path):
    path = only_file(tmp_path, "folder.png")
    path.mkdir()
    with pytest.raises(DataError, match=r"folder\.png is a folder, not a picture"):
        load_only(path)


def test_a_large_picture_is_read_in_silence(tmp_path, monkeypatch):
    path = only_file(tmp_path, "large.png")
    Image.new("RGB", (40, 40), RED).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow warns above, and refuses from twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert colours(load_only(path)) == list(RED)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(DataError, match=r"large\.png: it has more than the 1,400 pixels"):
        load_only(path)


# Captions --------------------------------------------------------------------------------------------------------


def test_captions_are_counted(tiny):
    long = "a very long caption " * 20
    counts = describe_captions(tiny, ["a cat", "", long, "a cat", long, " ", "a man"])
    assert counts == {"pictures": 7, "different_captions": 5, "empty_captions": 2, "cut_captions": 2}
    assert not any(describe_captions(tiny, []).values())


def test_a_caption_is_cut_when_tokenize_would_cut_it(tiny):
    from helpers.diffusion.text import tokenize

    for words in range(1, 40):
        caption = " ".join(["cat"] * words)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tokenize(tiny, [caption])
        assert describe_captions(tiny, [caption])["cut_captions"] == len(caught)
    assert caught


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ((1, 1, 0, 0), "1 picture, 1 different caption"),
        ((12, 10, 0, 0), "12 pictures, 10 different captions"),
        (
            (12, 10, 2, 1),
            "12 pictures, 10 different captions; 2 are empty (they train the picture without words); "
            "1 is longer than the text encoder reads and is cut",
        ),
        (
            (3, 2, 1, 2),
            "3 pictures, 2 different captions; 1 is empty (it trains the picture without words); "
            "2 are longer than the text encoder reads and are cut",
        ),
    ],
)
def test_the_sentence_about_captions(numbers, sentence):
    names = ("pictures", "different_captions", "empty_captions", "cut_captions")
    assert caption_sentence(dict(zip(names, numbers, strict=True))) == sentence


def test_shapes_are_counted_and_what_the_crop_cuts_off(tmp_path):
    for number, size in enumerate([(40, 80), (100, 80), (64, 64), (64, 62)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a picture")
    turned = Image.new("RGB", (100, 50))
    exif = turned.getexif()
    exif[0x0112] = 6  # by a quarter: it is shown tall
    turned.save(tmp_path / "4.jpg", exif=exif)
    (tmp_path / "4.txt").write_text("a picture")
    said = shape_sentence(load_pictures(spec_of(tmp_path)))
    # 1/2 + 1/5 + 0 + 1/32 + 1/2 of five pictures
    assert said == "2 tall, 1 wide, 2 square; the square crop cuts off 25% of their area on average, 50% at most"
    assert shape_sentence(load_pictures(DatasetSpec("d", "drawn:doodles"), size=64).select(range(3))) == (
        "0 tall, 0 wide, 3 square"
    )


def test_one_caption_for_pictures_without_one(tmp_path):
    save_pictures(tmp_path)
    with pytest.raises(DataError, match="--caption"):
        load_pictures(spec_of(tmp_path))
    (tmp_path / "1.txt").write_text("a cat")
    (tmp_path / "2.txt").write_text("  ")
    trigger = spec_of(tmp_path, caption="in sks style")
    assert list(load_pictures(trigger)["text"]) == ["in sks style", "a cat", "in sks style"]
    assert data_fingerprint(trigger, 64) != data_fingerprint(replace(trigger, caption="another"), 64)


def test_one_caption_for_rows_without_one(tmp_path):
    save_pictures(tmp_path, 2)
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,\n1.png,a dog\n")
    assert list(load_pictures(spec_of(tmp_path, caption="sks"))["text"]) == ["sks", "a dog"]

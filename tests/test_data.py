"""Datasets from folders and the drawn world, pictures of every mode, and the cache of latents."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image

from helpers import data
from helpers.components import encode_prompts, to_latents
from helpers.data import DataError, build_cache, load_pictures, to_tensor
from helpers.presets import DatasetSpec

RED, BLUE = (255, 0, 0), (0, 0, 255)


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
    with pytest.raises(DataError, match="there is no folder .*nowhere"):
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


def test_row_without_caption(folder):
    write_csv(folder, [{"file_name": "0.png", "text": "a"}, {"file_name": "1.png", "text": " "}])
    with pytest.raises(DataError, match="row 1 of mine has no caption"):
        load_pictures(spec_of(folder))


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
    with pytest.raises(DataError, match="unknown source 'ftp:x'; it begins with drawn:, hub: or folder:"):
        load_pictures(DatasetSpec("x", "ftp:x"))


# Other sources ---------------------------------------------------------------------------------------------------


def test_hub_columns_are_renamed_and_a_missing_one_named(monkeypatch, folder):
    rows = {"pic": [str(folder / "0.png")], "blip": ["a cat"], "text": ["other"]}
    asked = {}

    def load_dataset(repository, split, revision):
        asked.update(repository=repository, split=split, revision=revision)
        return Dataset.from_dict(rows).cast_column("pic", ImageColumn())

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    spec = DatasetSpec("d", "hub:a/b", image_column="pic", text_column="blip", revision="abc")
    dataset = load_pictures(spec)
    assert asked == {"repository": "a/b", "split": "train", "revision": "abc"}
    assert dataset.column_names == ["image", "text"]
    assert (dataset[0]["text"], dataset[0]["image"].size) == ("a cat", (20, 16))
    with pytest.raises(DataError, match="d has no column 'label'; its columns are: pic, blip, text"):
        load_pictures(replace(spec, text_column="label"))


def test_hub_failure_says_what_to_do(monkeypatch):
    def load_dataset(*args, **settings):
        raise ConnectionError("no route")

    monkeypatch.setattr(data, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="cannot load the dataset a/b .*no route.*use a drawn dataset"):
        load_pictures(DatasetSpec("d", "hub:a/b"))


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


# The cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset():
    pictures = [Image.new("RGB", (16, 16), (30 * i, 255 - 30 * i, 9)) for i in range(5)]
    texts = ["a cat", "a man", "a cat", "", "a man"]
    return Dataset.from_dict({"image": pictures, "text": texts}).cast_column("image", ImageColumn())


def equal(a, b):
    names = ("mean", "std", "caption_embeddings", "caption_index", "empty_embedding")
    return a.captions == b.captions and all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)


def test_cache_holds_latents_and_embeddings_of_unique_captions(tiny, dataset, tmp_path):
    cache = build_cache(tiny, dataset, tmp_path, "k" * 64)
    mean, std = to_latents(tiny, torch.stack([to_tensor(row["image"], 16) for row in dataset]))
    assert torch.allclose(cache.mean, mean, atol=1e-6) and torch.allclose(cache.std, std, atol=1e-6)
    assert len(cache) == 5
    assert cache.captions == ["a cat", "a man", ""]
    assert cache.caption_index.tolist() == [0, 1, 0, 2, 1]
    assert torch.allclose(cache.caption_embeddings, encode_prompts(tiny, ["a cat", "a man", ""]))
    assert torch.allclose(cache.empty_embedding, encode_prompts(tiny, [""]))


def test_second_call_reads_the_file(tiny, dataset, tmp_path, monkeypatch):
    first = build_cache(tiny, dataset, tmp_path, "key")
    monkeypatch.setattr(data, "compute_cache", lambda *_: pytest.fail("computed again"))
    assert equal(build_cache(tiny, dataset, tmp_path, "key"), first)


def damaged(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "one bit":
        content[-3] ^= 1
    elif how == "no header":
        content = b"\0" * 100
    else:
        content = b""
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "one bit", "no header", "empty"])
def test_damaged_cache_is_rebuilt(tiny, dataset, tmp_path, how):
    first = build_cache(tiny, dataset, tmp_path, "key")
    (path,) = tmp_path.iterdir()
    damaged(path, how)
    assert data.read_cache(path, "key") is None
    assert equal(build_cache(tiny, dataset, tmp_path, "key"), first)
    assert equal(data.read_cache(path, "key"), first)


def test_cache_of_another_key_or_dataset_is_not_used(tiny, dataset, tmp_path):
    build_cache(tiny, dataset, tmp_path, "same-first-16-chars-1")
    assert data.read_cache(tmp_path / "latents-same-first-16-ch.safetensors", "same-first-16-chars-2") is None
    build_cache(tiny, dataset, tmp_path, "same-first-16-chars-2")
    assert data.read_cache(tmp_path / "latents-same-first-16-ch.safetensors", "same-first-16-chars-2") is not None
    assert len(build_cache(tiny, dataset.select(range(2)), tmp_path, "same-first-16-chars-2")) == 2


def test_unreadable_picture_is_named_when_caching(tiny, folder, tmp_path):
    dataset = load_pictures(spec_of(folder))
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[:40])
    with pytest.raises(DataError, match=r"cannot read the picture .*1\.png of row 1"):
        build_cache(tiny, dataset, tmp_path / "cache", "key")
    assert not (tmp_path / "cache").exists()


def test_empty_dataset_is_refused(tiny, dataset, tmp_path):
    with pytest.raises(DataError, match="no rows"):
        build_cache(tiny, dataset.select([]), tmp_path, "key")

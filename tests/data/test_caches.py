"""The cache of latents and text embeddings: what is in it, when it is used, and when it is computed again."""

import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image

from helpers.base.errors import DataError
from helpers.data import caches
from helpers.data.caches import build_cache
from helpers.data.loading import load_pictures
from helpers.diffusion.pictures import to_latents, to_tensor
from helpers.diffusion.text import encode_prompts, tokenize
from helpers.presets.configuration import DatasetSpec


@pytest.fixture
def folder(tmp_path):
    """Three pictures with captions in text files."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(3):
        Image.new("RGB", (20, 16), (40 * i, 0, 0)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(f"picture {i}")
    return pictures


@pytest.fixture
def dataset():
    pictures = [Image.new("RGB", (16, 16), (30 * i, 255 - 30 * i, 9)) for i in range(5)]
    texts = ["a cat", "a man", "a cat", "", "a man"]
    return Dataset.from_dict({"image": pictures, "text": texts}).cast_column("image", ImageColumn())


def equal(a, b):
    return a.captions == b.captions and all(torch.equal(getattr(a, n), getattr(b, n)) for n in caches.ARRAYS)


def test_cache_holds_latents_and_embeddings_of_unique_captions(tiny, dataset, tmp_path):
    cache = build_cache(tiny, dataset, tmp_path, "k" * 64)
    mean, std = to_latents(tiny, torch.stack([to_tensor(row["image"], tiny.resolution) for row in dataset]))
    assert torch.allclose(cache.mean, mean, atol=1e-6) and torch.allclose(cache.std, std, atol=1e-6)
    assert len(cache) == 5
    assert cache.captions == ["a cat", "a man", ""]
    assert cache.caption_index.tolist() == [0, 1, 0, 2, 1]
    assert torch.allclose(cache.caption_embeddings, encode_prompts(tiny, ["a cat", "a man", ""]))
    assert torch.allclose(cache.empty_embedding, encode_prompts(tiny, [""]))
    assert torch.equal(cache.caption_ids, tokenize(tiny, cache.captions))
    assert torch.equal(cache.empty_ids, tokenize(tiny, [""])) and cache.empty_ids.shape == (1, 24)


def test_second_call_reads_the_file(tiny, dataset, tmp_path, monkeypatch):
    first = build_cache(tiny, dataset, tmp_path, "key")
    monkeypatch.setattr(caches, "compute_cache", lambda *_: pytest.fail("computed again"))
    assert equal(build_cache(tiny, dataset, tmp_path, "key"), first)


def test_what_another_process_wrote_in_the_meantime_is_read(tiny, dataset, tmp_path, monkeypatch):
    first = build_cache(tiny, dataset, tmp_path / "theirs", "key")

    @contextmanager
    def waited_for(_):
        shutil.copytree(tmp_path / "theirs", tmp_path / "ours")
        yield

    monkeypatch.setattr(caches, "FileLock", waited_for)
    monkeypatch.setattr(caches, "compute_cache", lambda *_: pytest.fail("computed again"))
    assert equal(build_cache(tiny, dataset, tmp_path / "ours", "key"), first)


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "gone":
        return path.unlink()
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "one bit":
        content[-3] ^= 1
    elif how == "no header":
        content = b"\0" * 100
    else:
        content = b""
    path.write_bytes(content)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("file", ["mean.npy", "caption_embeddings.npy", "caption_ids.npy", "index.json"])
@pytest.mark.parametrize("how", ["cut", "one bit", "no header", "empty", "gone"])
def test_damaged_cache_is_rebuilt(tiny, dataset, tmp_path, monkeypatch, file, how, mapped):
    first = build_cache(tiny, dataset, tmp_path, "key")
    monkeypatch.setattr(caches, "MAP_ABOVE", 0 if mapped else 1 << 30)
    (folder,) = tmp_path.iterdir()
    damage(folder / file, how)
    assert caches.read_cache(folder, "key") is None
    assert equal(build_cache(tiny, dataset, tmp_path, "key"), first)
    assert equal(caches.read_cache(folder, "key"), first)


def test_a_large_cache_stays_on_the_disk(tiny, dataset, tmp_path, monkeypatch):
    small = build_cache(tiny, dataset, tmp_path, "key")
    monkeypatch.setattr(caches, "MAP_ABOVE", 1000)
    large = build_cache(tiny, dataset, tmp_path, "key")
    assert equal(small, large)
    # What is written to it stays in memory
    large.mean[0] = 7.0
    assert equal(build_cache(tiny, dataset, tmp_path, "key"), small)
    # Whoever changes the file changes what is read through the mapping, and not what was read into memory
    (folder,) = tmp_path.iterdir()
    np.load(folder / "std.npy", mmap_mode="r+")[1] = 7.0
    assert (large.std[1] == 7.0).all() and not (small.std[1] == 7.0).any()


def test_a_cache_that_was_cut_short_leaves_nothing(tiny, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "write_json_atomic", lambda *_: pytest.fail("stands for a full disk"))
    with pytest.raises(pytest.fail.Exception):
        build_cache(tiny, dataset, tmp_path, "key")
    assert list(tmp_path.iterdir()) == []


def test_cache_of_another_key_or_dataset_is_not_used(tiny, dataset, tmp_path):
    build_cache(tiny, dataset, tmp_path, "same-first-16-chars-1")
    folder = tmp_path / "latents-same-first-16-ch"
    assert caches.read_cache(folder, "same-first-16-chars-1") is not None
    assert caches.read_cache(folder, "same-first-16-chars-2") is None
    build_cache(tiny, dataset, tmp_path, "same-first-16-chars-2")
    assert caches.read_cache(folder, "same-first-16-chars-2") is not None
    assert len(build_cache(tiny, dataset.select(range(2)), tmp_path, "same-first-16-chars-2")) == 2


def test_unreadable_picture_is_named_when_caching(tiny, folder, tmp_path):
    dataset = load_pictures(DatasetSpec("mine", f"folder:{folder}", train_rows=100))
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[:40])
    with pytest.raises(DataError, match=r"cannot read the picture .*1\.png of row 1"):
        build_cache(tiny, dataset, tmp_path / "cache", "key")
    assert list((tmp_path / "cache").iterdir()) == []


def test_empty_dataset_is_refused(tiny, dataset, tmp_path):
    with pytest.raises(DataError, match="no rows"):
        build_cache(tiny, dataset.select([]), tmp_path, "key")


def test_what_a_killed_process_left_behind_is_removed(tiny, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    cache = tmp_path / "cache"
    left, others = cache / ".latents-key.0123abcd.tmp", cache / ".latents-other.0123abcd.tmp"
    for folder in (left, others):
        folder.mkdir(parents=True)
        (folder / "mean.npy").write_bytes(b"half")
    build_cache(tiny, dataset, cache, "key")
    assert not left.exists() and others.exists(), "another cache may be in the making"

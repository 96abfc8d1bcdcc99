"""What training needs of a dataset, computed once: latents of its pictures, and text embeddings of its captions.

    <folder>/latents-<key>/
        mean.npy, std.npy             the VAE's posterior for each picture
        caption_embeddings.npy …      what the text encoder makes of each different caption
        index.json                    the key, a hash of the content, and the captions

The VAE and the text encoder are frozen, so a step that asks them again gets the same answer: stock training scripts
spend that time at every step. A large cache stays on the disk and is read through memory mapping, row by row.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock
from torch import Tensor

from helpers.base.errors import DataError
from helpers.base.files import atomic_path, write_json_atomic
from helpers.base.paths import runs_folder
from helpers.base.provenance import tensor_hash
from helpers.data.loading import read_picture
from helpers.diffusion.components import Components
from helpers.diffusion.pictures import to_latents, to_tensor
from helpers.diffusion.text import encode_tokens, tokenize

# The modules that a cache depends on
CODE = (
    "helpers.base.device",
    *(f"helpers.data.{name}" for name in ("loading", "folders", "encodings", "recipes", "caches")),
    *(f"helpers.diffusion.{name}" for name in ("components", "text", "pictures")),
)
CHUNK = 16  # pictures, or captions, that are in memory as tensors at once
MAP_ABOVE = 512 * 2**20  # bytes; a larger cache is not read into memory


@dataclass
class LatentCache:
    """A dataset as the U-Net sees it, on the CPU. Row n's caption is `captions[caption_index[n]]`."""

    mean: Tensor  # float32 [N, C, h, w], of the VAE's posterior, times the scaling factor
    std: Tensor  # float32 [N, C, h, w], likewise
    caption_embeddings: Tensor  # float32 [M, L, D], of M different captions
    caption_ids: Tensor  # int64 [M, L], their tokens
    caption_index: Tensor  # int64 [N], or [N, K] of K orders of each caption, the first of them as written
    empty_embedding: Tensor  # float32 [1, L, D], of the empty caption
    empty_ids: Tensor  # int64 [1, L]
    captions: list[str] = field(default_factory=list)  # M

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def as_written(self) -> Tensor:
        """int64 [N]: which caption each row has in its dataset."""
        return self.caption_index if self.caption_index.ndim == 1 else self.caption_index[:, 0]


ARRAYS = tuple(f.name for f in fields(LatentCache) if f.name != "captions")


def build_cache(
    components: Components, dataset: Dataset, cache_dir: Path | str, key: str, orders: int = 1
) -> LatentCache:
    """Latents and text embeddings of a dataset, read from `cache_dir` when they are there for `key`, else computed.

    key: a hash of everything the cache depends on (data, weights, code). A cache with another key or content than it
    was written with is replaced. orders: as for `compute_cache`.
    Raises DataError when the dataset is empty or a picture cannot be read.
    """
    folder = Path(cache_dir) / f"latents-{key[:16]}"
    cache = read_cache(folder, key)
    if cache is None or len(cache) != len(dataset):
        locks = runs_folder() / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{folder.name}.lock"):  # one process at a time
            for left in folder.parent.glob(f".{folder.name}.*.tmp"):  # left behind by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            cache = read_cache(folder, key)  # the one before may have been at the same
            if cache is None or len(cache) != len(dataset):
                with atomic_path(folder) as writing:
                    write_cache(components, dataset, writing, key, orders)
                cache = read_cache(folder, key)
        if cache is None:
            raise DataError(f"the cache {folder.name} was written, and cannot be read back")
    return cache


def write_cache(components: Components, dataset: Dataset, folder: Path, key: str, orders: int = 1) -> None:
    """Compute the cache of a dataset and write it into a folder, with the key and the hash of what is in it."""
    cache = compute_cache(components, dataset, folder, orders)
    content = tensor_hash({name: getattr(cache, name) for name in ARRAYS})
    write_json_atomic(folder / "index.json", {"key": key, "content": content, "captions": cache.captions})


def in_orders(caption: str, count: int) -> list[str]:
    """The caption as written, then count - 1 shuffles of its parts between commas. The first part stays first.

    So the words of a style that begin each caption keep their place (kohya's --shuffle_caption with --keep_tokens 1).
    """
    first, *others = (part.strip() for part in caption.split(","))
    rng = random.Random(caption)
    return [caption, *(", ".join([first, *rng.sample(others, len(others))]) for _ in range(count - 1))]


def compute_cache(components: Components, dataset: Dataset, folder: Path | None = None, orders: int = 1) -> LatentCache:
    """Latents and text embeddings of a dataset, in memory.

    folder: where the arrays lie instead, as memory-mapped files, so that a dataset may be larger than the memory.
    orders: of each caption, see `in_orders`.
    """
    if len(dataset) == 0:
        raise DataError("the dataset has no rows")
    texts = [in_orders(text, orders) for text in dataset["text"]]
    captions = list(dict.fromkeys(caption for row in texts for caption in row))
    position = {caption: i for i, caption in enumerate(captions)}
    ids, empty_ids = tokenize(components, captions), tokenize(components, [""])

    latents_shape = (len(dataset), *components.latent_shape)
    empty_embedding = encode_tokens(components, empty_ids).float().cpu()
    arrays = {
        "mean": new_array(folder, "mean", latents_shape),
        "std": new_array(folder, "std", latents_shape),
        "caption_embeddings": new_array(folder, "caption_embeddings", (len(captions), *empty_embedding.shape[1:])),
    }
    for start in range(0, len(dataset), CHUNK):
        rows = range(start, min(start + CHUNK, len(dataset)))
        pictures = torch.stack([to_tensor(read_picture(dataset, row), components.resolution) for row in rows])
        mean, std = to_latents(components, pictures)
        arrays["mean"][start : rows.stop], arrays["std"][start : rows.stop] = mean.cpu(), std.cpu()
    for start in range(0, len(captions), CHUNK):
        embeddings = encode_tokens(components, ids[start : start + CHUNK]).float().cpu()
        arrays["caption_embeddings"][start : start + CHUNK] = embeddings

    small = {
        "caption_ids": ids,
        "caption_index": torch.tensor([[position[caption] for caption in row] for row in texts]),
        "empty_embedding": empty_embedding,
        "empty_ids": empty_ids,
    }
    if orders == 1:
        small["caption_index"] = small["caption_index"].squeeze(1)
    for name, tensor in small.items():
        arrays[name] = new_array(folder, name, tuple(tensor.shape), tensor.numpy().dtype)
        arrays[name][:] = tensor.numpy()
    return LatentCache(**{name: torch.from_numpy(array) for name, array in arrays.items()}, captions=captions)


def new_array(folder: Path | None, name: str, shape: tuple[int, ...], dtype: str | np.dtype = "float32") -> np.ndarray:
    """An array to be filled: in memory, or mapped to `folder`/`name`.npy."""
    if folder is None:
        return np.empty(shape, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    return np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=shape)


def read_cache(folder: Path, key: str) -> LatentCache | None:
    """The cache in a folder, or None when there is none, it is damaged, or it was written for another key.

    Above MAP_ABOVE bytes the arrays stay on the disk and rows are read when they are asked for. Either way the whole
    content is compared with its hash first.
    """
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        files = {name: folder / f"{name}.npy" for name in ARRAYS}
        # "c": mapped, and what is written goes to memory only
        mode: Literal["c"] | None = "c" if sum(path.stat().st_size for path in files.values()) > MAP_ABOVE else None
        arrays = {name: torch.from_numpy(np.load(path, mmap_mode=mode)) for name, path in files.items()}
        if index["key"] != key or index["content"] != tensor_hash(arrays):
            return None
        return LatentCache(**arrays, captions=index["captions"])
    except (OSError, EOFError, KeyError, ValueError, TypeError):
        return None

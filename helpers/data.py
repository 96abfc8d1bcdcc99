"""Captioned picture datasets, and what training needs of them: latents and text embeddings, computed once.

A dataset has the columns "image" and "text", wherever it comes from: the drawn world, the Hugging Face hub or a folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from datasets import Image as ImageColumn
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .components import Components, encode_prompts, to_latents
from .folders import DataError, from_folder, missing_column
from .presets import DatasetSpec
from .provenance import atomic_path, tensor_hash

CHUNK = 16  # pictures that are in memory as tensors at once


def load_pictures(spec: DatasetSpec, split: str = "train", size: int = 64) -> Dataset:
    """The rows of one split, with the columns "image" and "text" (drawn ones also have "scene").

    split: "train" (the first `spec.train_rows` rows) or "held_out" (the `spec.held_out_rows` after them, if there are).
    size: pixels on a side, for drawn pictures; others keep theirs until `to_tensor`.
    Raises DataError when there is no such dataset, column or caption, or a picture cannot be read.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"unknown split {split!r}; known: train, held_out")
    kind, _, place = spec.source.partition(":")
    if kind == "drawn":
        return drawn_rows(place, split, size, spec.train_rows if split == "train" else spec.held_out_rows)
    if kind == "hub":
        dataset = with_standard_columns(from_hub(place, spec), spec)
    elif kind == "folder":
        dataset = from_folder(place, spec)
    else:
        raise DataError(f"unknown source {spec.source!r}; it begins with drawn:, hub: or folder:")
    rows = split_rows(spec, split, len(dataset))
    dataset = dataset.select(list(rows))
    check_captions(dataset["text"], spec.name)
    return dataset


def split_rows(spec: DatasetSpec, split: str, total: int) -> range:
    """Which of `total` rows make the split. A short dataset gives its rows to training first."""
    first = 0 if split == "train" else spec.train_rows
    count = spec.train_rows if split == "train" else spec.held_out_rows
    return range(min(first, total), min(first + count, total))


def drawn_rows(style: str, split: str, size: int, rows: int) -> Dataset:
    from .world.datasets import drawn_dataset

    dataset = drawn_dataset(style, split, size=size, n=max(rows, 1))
    return dataset if rows else dataset.select([])


def from_hub(repository: str, spec: DatasetSpec) -> Dataset:
    try:
        return load_dataset(repository, split="train", revision=spec.revision)
    except Exception as error:  # no network, no such repository, a damaged file: all told the same way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise DataError(
            f"cannot load the dataset {repository} from the Hugging Face hub ({reason}); connect to the internet, or "
            "use a drawn dataset, which needs no download"
        ) from error


def with_standard_columns(dataset: Dataset, spec: DatasetSpec) -> Dataset:
    """Only the picture and caption columns, named "image" and "text"."""
    for column in (spec.image_column, spec.text_column):
        if column not in dataset.column_names:
            raise missing_column(column, dataset.column_names, spec.name)
    dataset = dataset.select_columns([spec.image_column, spec.text_column])
    names = {spec.image_column: "image", spec.text_column: "text"}
    dataset = dataset.rename_columns({old: new for old, new in names.items() if old != new})
    return dataset.cast_column("image", ImageColumn())


def check_captions(captions, name: str) -> None:
    for row, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise DataError(f"row {row} of {name} has no caption")


def to_tensor(picture: Image.Image, size: int) -> Tensor:
    """A picture of any mode as float32 [3, size, size] in -1..1.

    Turned as its EXIF tag says, laid on white where it is transparent, scaled until it covers the square, and cropped
    to the centre. Raises DataError for a picture that cannot be decoded or converted.
    """
    try:
        picture = to_rgb(ImageOps.exif_transpose(picture))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"cannot read the picture {getattr(picture, 'filename', '')}: {error}") from error
    picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    # 0..255 to -1..1
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1.0


def to_rgb(picture: Image.Image) -> Image.Image:
    """The picture in mode RGB: transparency on white, 16-bit and floating-point grey scaled to 8 bits."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        picture = to_8_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def to_8_bits(picture: Image.Image) -> Image.Image:
    """Grey of many bits as mode L. Floats up to 1 are taken for 0..1; values above 255 for 16 bits."""
    grey = np.asarray(picture).astype(np.float64)
    if picture.mode.startswith("I;16") or grey.max() > 255:
        grey = grey / 257  # 65535 / 255
    elif picture.mode == "F" and grey.max() <= 1:
        grey = grey * 255
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))


@dataclass
class LatentCache:
    """A dataset as the U-Net sees it, on the CPU. Row n's caption is `captions[caption_index[n]]`."""

    mean: Tensor  # float32 [N, C, h, w], of the VAE's posterior, times the scaling factor
    std: Tensor  # float32 [N, C, h, w], likewise
    caption_embeddings: Tensor  # [M, L, D], of M different captions
    caption_index: Tensor  # int64 [N]
    empty_embedding: Tensor  # [1, L, D], of the empty caption
    captions: list[str] = field(default_factory=list)  # M

    def __len__(self) -> int:
        return len(self.mean)


def build_cache(components: Components, dataset: Dataset, cache_dir: Path | str, key: str) -> LatentCache:
    """Latents and text embeddings of a dataset, read from `cache_dir` when they are there for `key`, else computed.

    key: a hash of everything the cache depends on (data, weights, code). A file with another key or content than it
    was written with is replaced. Raises DataError when the dataset is empty or a picture cannot be read.
    """
    if len(dataset) == 0:
        raise DataError("the dataset has no rows")
    path = Path(cache_dir) / f"latents-{key[:16]}.safetensors"
    cache = read_cache(path, key)
    if cache is None or len(cache) != len(dataset):
        cache = compute_cache(components, dataset)
        write_cache(path, key, cache)
    return cache


def compute_cache(components: Components, dataset: Dataset) -> LatentCache:
    means, stds = [], []
    for start in range(0, len(dataset), CHUNK):
        rows = range(start, min(start + CHUNK, len(dataset)))
        pictures = torch.stack([to_tensor(read_picture(dataset, row), components.resolution) for row in rows])
        mean, std = to_latents(components, pictures)
        means.append(mean.cpu())
        stds.append(std.cpu())
    texts = list(dataset["text"])
    captions = list(dict.fromkeys(texts))
    position = {caption: i for i, caption in enumerate(captions)}
    return LatentCache(
        mean=torch.cat(means),
        std=torch.cat(stds),
        caption_embeddings=encode_prompts(components, captions).cpu(),
        caption_index=torch.tensor([position[text] for text in texts]),
        empty_embedding=encode_prompts(components, [""]).cpu(),
        captions=captions,
    )


def read_picture(dataset: Dataset, row: int) -> Image.Image:
    try:
        return dataset[row]["image"]
    except Exception as error:  # Pillow raises many kinds for damaged files
        stored = dataset.cast_column("image", ImageColumn(decode=False))[row]["image"]
        raise DataError(f"cannot read the picture {stored['path'] or ''} of row {row}: {error}") from error


def write_cache(path: Path, key: str, cache: LatentCache) -> None:
    tensors = {name: value.contiguous() for name, value in vars(cache).items() if isinstance(value, Tensor)}
    header = {"key": key, "content": tensor_hash(tensors), "captions": json.dumps(cache.captions)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def read_cache(path: Path, key: str) -> LatentCache | None:
    """The cache in a file, or None when there is none, it is damaged, or it was written for another key."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
        if header["key"] != key or header["content"] != tensor_hash(tensors):
            return None
        return LatentCache(**tensors, captions=json.loads(header["captions"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None

"""Captioned picture datasets: where their rows come from, and pictures of any kind as tensors.

A dataset has the columns "image" and "text", wherever it comes from: the drawn world, the Hugging Face hub or the disk.
"""

from __future__ import annotations

import io

from datasets import Dataset, load_dataset
from datasets import Image as ImageColumn
from PIL import Image

from helpers.base import hub
from helpers.base.errors import DataError, unreadable
from helpers.base.paths import runs_folder
from helpers.data.folders import as_caption, from_folder, from_parquet, missing_column, no_size_warning, quiet_datasets
from helpers.diffusion.components import Components
from helpers.presets.configuration import DatasetSpec

EXIF_ORIENTATION = 0x0112


def load_pictures(spec: DatasetSpec, split: str = "train", size: int = 128) -> Dataset:
    """The rows of one split, with the columns "image" and "text" (drawn ones also have "scene").

    split: "train" or "held_out"; which rows those are, `spec.split` says (see `split_rows`).
    size: pixels on a side, for drawn pictures; others keep theirs until `to_tensor`.
    A caption that is missing or blank becomes "", which `describe_captions` counts.
    Raises DataError when there is no such dataset or column, when a caption is not text or all of them are empty, and
    for a file that is no picture. Damage further inside a picture shows in `read_picture`.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"unknown split {split!r}; known: train, held_out")
    kind, _, place = spec.source.partition(":")
    if kind == "drawn":
        return drawn_rows(place, split, size, spec.train_rows if split == "train" else spec.held_out_rows)
    readers = {"hub": from_hub, "folder": from_folder, "parquet": from_parquet}
    if kind not in readers:
        raise DataError(f"unknown source {spec.source!r}; it begins with drawn:, hub:, folder: or parquet:")
    dataset = with_standard_columns(readers[kind](place, spec), spec)
    dataset = dataset.select(list(split_rows(spec, split, len(dataset))))
    if split == "train" and len(dataset) and not any(dataset["text"]):
        raise DataError(f"all captions of {spec.name} are empty (column {spec.text_column!r}): no words to learn")
    return dataset


def split_rows(spec: DatasetSpec, split: str, total: int) -> range | list[int]:
    """Which of `total` rows make the split "train" or "held_out". A short dataset gives its rows to training first.

    spec.split "first": the first `train_rows`, and the `held_out_rows` after them. "alternate": the first `train_rows`
    of 0, 2, 4 …, and `held_out_rows` of 1, 3, 5 …, evenly spread. Raises DataError for another one.
    """
    count = spec.train_rows if split == "train" else spec.held_out_rows
    if spec.split == "first":
        first = 0 if split == "train" else spec.train_rows
        return range(min(first, total), min(first + count, total))
    if spec.split != "alternate":
        raise DataError(f"unknown split {spec.split!r} of the dataset {spec.name}; known: first, alternate")
    if split == "train":
        return range(0, total, 2)[:count]
    odd = range(1, total, 2)
    count = min(count, len(odd))
    return [odd[i * len(odd) // count] for i in range(count)]


def drawn_rows(place: str, split: str, size: int, rows: int) -> Dataset:
    """The first rows of a drawn dataset of a style, or of a recipe such as "doodles?shuffled=0.5"; none for 0."""
    from helpers.data.recipes import drawn_by

    dataset = drawn_by(place, split, size, max(rows, 1))
    return dataset if rows else dataset.select([])


def hub_copy(spec: DatasetSpec) -> hub.Copy:
    """The files of a hub dataset on this machine, downloaded if they are not. Raises HubError."""
    repositories = [(spec.source.partition(":")[2], spec.revision)]
    return hub.fetch(f"the dataset {spec.name}", repositories, "dataset", download_gb=spec.download_gb)


def from_hub(repository: str, spec: DatasetSpec) -> Dataset:
    """The rows of a hub dataset's split "train", copied to `runs/cache/datasets` as Arrow files."""
    folder = hub_copy(spec).folder
    try:
        with quiet_datasets():
            return load_dataset(str(folder), split="train", cache_dir=str(runs_folder() / "cache" / "datasets"))
    except Exception as error:  # the datasets library has many kinds for what it cannot read
        lines = str(error).strip().splitlines() or [repr(error)]
        raise DataError(f"cannot read the dataset {repository} in {folder}: {lines[0]}") from error


def with_standard_columns(dataset: Dataset, spec: DatasetSpec) -> Dataset:
    """Only the picture and caption columns, named "image" and "text".

    A caption that is missing or blank is the dataset's own (`DatasetSpec.caption`), which is "" unless it is given.
    """
    picture, text = spec.image_column, spec.text_column
    for column in (picture, text):
        if column not in dataset.column_names:
            raise missing_column(column, dataset.column_names, spec.name)
    if picture == text:
        raise DataError(f"the column {text!r} of {spec.name} cannot hold both the pictures and the captions")
    dataset = dataset.select_columns([picture, text])
    found = dataset.with_format("arrow").select_columns([text])[:][text].to_pylist()  # as they are stored
    captions = [as_caption(value, row, text, spec.name) or spec.caption for row, value in enumerate(found)]
    if captions != found:
        dataset = dataset.remove_columns(text).add_column(text, captions)
    names = {picture: "image", text: "text"}
    dataset = dataset.rename_columns({old: new for old, new in names.items() if old != new})
    try:
        return dataset.cast_column("image", ImageColumn())
    except Exception as error:  # Arrow has many kinds for what cannot be made a picture
        raise DataError(f"the column {picture!r} of {spec.name} does not hold pictures ({error})") from error


def describe_captions(components: Components, captions: list[str]) -> dict[str, int]:
    """Of N captions: how many pictures they are for (N), are different, are empty, and are longer than is read.

    The text encoder reads a fixed number of tokens, start and end included; `tokenize` cuts what is longer.
    """
    different = list(dict.fromkeys(captions))
    token_ids = components.tokenizer(different, verbose=False).input_ids if different else []
    length = components.text_encoder.config.max_position_embeddings
    is_long = {caption: len(ids) > length for caption, ids in zip(different, token_ids, strict=True)}
    return {
        "pictures": len(captions),
        "different_captions": len(different),
        "empty_captions": sum(not caption.strip() for caption in captions),
        "cut_captions": sum(is_long[caption] for caption in captions),
    }


def caption_sentence(counts: dict[str, int]) -> str:
    """What `describe_captions` found, in words."""
    pictures, different = counts["pictures"], counts["different_captions"]
    empty, cut = counts["empty_captions"], counts["cut_captions"]
    sentence = f"{pictures} picture{'s' * (pictures != 1)}, {different} different caption{'s' * (different != 1)}"
    if empty:
        sentence += "; 1 is empty (it trains" if empty == 1 else f"; {empty} are empty (they train"
        sentence += " the picture without words)"
    if cut:
        verb = "is" if cut == 1 else "are"
        sentence += f"; {cut} {verb} longer than the text encoder reads and {verb} cut"
    return sentence


def shape_sentence(dataset: Dataset) -> str:
    """How many pictures of a dataset are tall, wide and square, and how much of them the square crop cuts off.

    Tall and wide: one side over 1.05 times the other. Only the pictures' heads are read. Training takes the largest
    square in the middle (`to_tensor`).
    """
    ratios = []
    for cell in dataset.cast_column("image", ImageColumn(decode=False))["image"]:
        source = io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"]
        try:
            with no_size_warning(), Image.open(source) as picture:
                turned = picture.getexif().get(EXIF_ORIENTATION, 1) >= 5  # by a quarter
                width, height = picture.size
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise unreadable(cell["path"] or "", error) from error
        ratios.append(height / width if turned else width / height)
    tall, wide = sum(ratio < 1 / 1.05 for ratio in ratios), sum(ratio > 1.05 for ratio in ratios)
    kept = [min(ratio, 1 / ratio) for ratio in ratios]
    sentence = f"{tall} tall, {wide} wide, {len(ratios) - tall - wide} square"
    if tall + wide:
        cut = 1 - sum(kept) / len(kept)
        sentence += f"; the square crop cuts off {cut:.0%} of their area on average, {1 - min(kept):.0%} at most"
    return sentence


def read_picture(dataset: Dataset, row: int) -> Image.Image:
    """The picture of a row, decoded to its last pixel. Raises DataError with its file and row when that fails."""
    try:
        with no_size_warning():
            picture = dataset[row]["image"]
    except Exception as error:  # Pillow raises many kinds for damaged files
        stored = dataset.cast_column("image", ImageColumn(decode=False))[row]["image"]
        raise unreadable(f"{stored['path'] or ''} of row {row}".lstrip(), error) from error
    if picture is None:
        raise DataError(f"there is no picture in row {row}")
    return picture

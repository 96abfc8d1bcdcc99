"""Captioned pictures in a folder: with a metadata file, or with a text file beside each picture."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image

from .presets import ROOT, DatasetSpec

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
METADATA = ("metadata.csv", "metadata.jsonl")


class DataError(ValueError):
    """A dataset cannot be used; the message names the file, column or row."""


def missing_column(column: str, existing, where: str) -> DataError:
    return DataError(f"{where} has no column {column!r}; its columns are: {', '.join(map(str, existing)) or 'none'}")


def from_folder(place: str, spec: DatasetSpec) -> Dataset:
    """Pictures of a folder, with captions from metadata.csv or metadata.jsonl, else from .txt files beside them.

    A metadata file has a column "file_name", relative to it, and one of captions. A relative folder is looked for in
    the working directory, then in the repository.
    """
    folder = Path(place).expanduser()
    folder = folder if folder.is_absolute() or folder.is_dir() else ROOT / folder
    if not folder.is_dir():
        raise DataError(f"there is no folder {place}")
    metadata = [folder / name for name in METADATA if (folder / name).is_file()]
    pairs = pairs_from_metadata(metadata[0], spec) if metadata else pairs_from_text_files(folder)
    for path, _ in pairs:
        check_picture(path)
    columns = {"image": [str(path) for path, _ in pairs], "text": [text for _, text in pairs]}
    return Dataset.from_dict(columns).cast_column("image", ImageColumn())


def pairs_from_metadata(path: Path, spec: DatasetSpec) -> list[tuple[Path, str]]:
    """(picture, caption) for each row of a metadata file."""
    rows = read_rows(path)
    if not rows:
        raise DataError(f"{path.name} in {path.parent} has no rows")
    for column in ("file_name", spec.text_column):
        if column not in rows[0]:
            raise missing_column(column, rows[0], path.name)
    absent = [row["file_name"] for row in rows if not (path.parent / str(row.get("file_name"))).is_file()]
    if absent:
        raise DataError(f"{path.name} names {absent[0]}, which is not in {path.parent} ({len(absent)} such rows)")
    return [(path.parent / row["file_name"], row.get(spec.text_column)) for row in rows]


def read_rows(path: Path) -> list[dict]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                return list(csv.DictReader(file))
            return [dict(json.loads(line)) for line in file if line.strip()]
    except (ValueError, TypeError, csv.Error) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DataError(f"cannot read {path}: {error}") from error


def pairs_from_text_files(folder: Path) -> list[tuple[Path, str]]:
    """(picture, caption) for each picture in the folder and those below it, in the order of their paths."""
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not pictures:
        raise DataError(f"there are no pictures in {folder}")
    bare = [path.name for path in pictures if not path.with_suffix(".txt").is_file()]
    if bare:
        raise DataError(
            f"{len(bare)} of {len(pictures)} pictures in {folder} have no caption, {bare[0]} for one: put a .txt file "
            "of the same name beside each, or one metadata.csv with the columns file_name and text"
        )
    return [(path, path.with_suffix(".txt").read_text(encoding="utf-8-sig").strip()) for path in pictures]


def check_picture(path: Path) -> None:
    try:
        with Image.open(path) as picture:
            picture.verify()
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more for damaged files
        raise DataError(f"cannot read the picture {path}: {error}") from error

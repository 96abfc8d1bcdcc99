"""Captioned pictures on the disk: a folder with a metadata file, with parquet files or with a text file beside each
picture, or a single parquet file. The rows have the columns that the `DatasetSpec` names."""

from __future__ import annotations

import csv
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from PIL import Image
from pyarrow import ArrowException
from pyarrow.parquet import read_metadata

from helpers.base.errors import DataError, unreadable
from helpers.base.paths import ROOT, runs_folder
from helpers.presets.configuration import DatasetSpec

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
METADATA = ("metadata.csv", "metadata.jsonl")


def missing_column(column: str, existing, where: str) -> DataError:
    """The error for a column that is not there; it names those that are."""
    return DataError(f"{where} has no column {column!r}; its columns are: {', '.join(map(str, existing)) or 'none'}")


def find_path(place: str) -> Path:
    """An existing file or folder. A relative one is looked for in the working directory, then in the repository."""
    path = Path(place).expanduser()
    for candidate in (path, ROOT / path):
        if candidate.exists():
            return candidate
    raise DataError(f"there is no folder or file {place}")


def from_folder(place: str, spec: DatasetSpec) -> Dataset:
    """The rows of metadata.csv or metadata.jsonl; else of the parquet files; else pictures with .txt files beside them.

    Files and folders whose name begins with a dot do not count, wherever they are.
    Raises DataError when there is no such folder, column or caption, or a file is damaged.
    """
    folder = find_path(place)
    if not folder.is_dir():
        raise DataError(f"{place} is a file, not a folder; the source of a parquet file is parquet:{place}")
    metadata = [folder / name for name in METADATA if (folder / name).is_file()]
    tables = [] if metadata else parquet_files(folder)
    if tables:
        return read_parquet(tables, spec)
    pairs = pairs_from_metadata(metadata[0], spec) if metadata else pairs_from_text_files(folder, spec.caption)
    columns = {spec.image_column: [str(path) for path, _ in pairs], spec.text_column: [text for _, text in pairs]}
    return Dataset.from_dict(columns)


def visible_paths(folder: Path) -> list[Path]:
    """Everything below the folder, in order, but what is hidden, such as Jupyter's .ipynb_checkpoints."""
    found = sorted(folder.rglob("*"))
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


# --- a metadata file ---------------------------------------------------------------------------------------------
def pairs_from_metadata(path: Path, spec: DatasetSpec) -> list[tuple[Path, str]]:
    """(picture, caption) for each row of a metadata file.

    Pictures are named relative to it, in the column "file_name", or in `spec.image_column` when that is another name
    than the usual "image". They must be in its folder or below.
    """
    rows = read_rows(path)
    if not rows:
        raise DataError(f"{path.name} in {path.parent} has no rows")
    file_column = "file_name" if spec.image_column == "image" else spec.image_column
    for column in (file_column, spec.text_column):
        if not any(column in row for row in rows):
            raise missing_column(column, rows[0], path.name)
    captions = [as_caption(row.get(spec.text_column), n, spec.text_column, path.name) for n, row in enumerate(rows)]
    return list(zip(picture_paths(path, [row.get(file_column) for row in rows]), captions, strict=True))


def picture_paths(metadata: Path, names: list) -> list[Path]:
    """The pictures that the rows of a metadata file name."""
    folder = metadata.parent
    for row, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"row {row} of {metadata.name} names no picture")
        if not Path(os.path.normpath(folder / name)).is_relative_to(os.path.normpath(folder)):
            raise DataError(f"row {row} of {metadata.name} names {name}, which is outside of {folder}")
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise DataError(f"{metadata.name} names {absent[0]}, which is not in {folder} ({len(absent)} such rows)")
    pictures = [folder / name for name in names]
    for picture in pictures:
        check_picture(picture)
    return pictures


def read_rows(path: Path) -> list[dict]:
    """The rows of a metadata file, in order."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                rows = list(csv.DictReader(file))
            else:
                rows = [dict(json.loads(line)) for line in file if line.strip()]
    except (ValueError, TypeError, csv.Error) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DataError(f"cannot read {path}: {error}") from error
    for number, row in enumerate(rows):
        if None in row:  # where DictReader puts the cells that have no column
            raise DataError(f"row {number} of {path.name} has too many cells: a caption with a comma needs quotes")
    return rows


def as_caption(value: Any, row: int, column: str, where: str) -> str:
    """The caption in a cell: "" when it is missing (None, NaN) or blank. Raises DataError for anything but text."""
    if value is None or value != value:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"row {row} of {where} has no text in the column {column!r} but a value of type {kind}")
    return value if value.strip() else ""


# --- text files and parquet files --------------------------------------------------------------------------------
def pairs_from_text_files(folder: Path, caption: str = "") -> list[tuple[Path, str]]:
    """(picture, caption) for each picture in the folder and those below it, in the order of their paths.

    caption: of pictures without a .txt file; "" means that each must have one.
    """
    pictures = [path for path in visible_paths(folder) if path.suffix.lower() in PICTURE_SUFFIXES]
    if not pictures:
        raise DataError(f"there are no pictures in {folder}")
    for path in pictures:
        check_picture(path)
    bare = [path.name for path in pictures if not path.with_suffix(".txt").is_file()]
    if bare and not caption:
        raise DataError(
            f"{len(bare)} of {len(pictures)} pictures in {folder} have no caption, {bare[0]} for one: put a .txt file "
            "of the same name beside each, or one metadata.csv with the columns file_name and text, or give all of "
            'them one caption by --caption "…"'
        )
    texts = {path: path.with_suffix(".txt") for path in pictures}
    return [(path, read_text(text) if text.is_file() else caption) for path, text in texts.items()]


def read_text(path: Path) -> str:
    """The text of a file without the space around it. Raises DataError unless it is UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except ValueError as error:
        raise DataError(f"cannot read {path}: it is not text in UTF-8 ({error})") from error


def parquet_files(folder: Path) -> list[Path]:
    """The parquet files below a folder; as on the hub, only those whose name begins with "train" if there are such."""
    files = [path for path in visible_paths(folder) if path.suffix == ".parquet" and path.is_file()]
    return [path for path in files if path.name.startswith("train")] or files


def from_parquet(place: str, spec: DatasetSpec) -> Dataset:
    """The rows of one parquet file, as the datasets library writes them: pictures are bytes, or bytes with a path."""
    path = find_path(place)
    if path.is_dir():
        raise DataError(f"{place} is a folder, not a parquet file; its source is folder:{place}")
    return read_parquet([path], spec)


def read_parquet(files: list[Path], spec: DatasetSpec) -> Dataset:
    """The picture and caption columns of the files' rows, copied to `runs/cache/datasets` as Arrow files."""
    wanted = list(dict.fromkeys([spec.image_column, spec.text_column]))
    names = ", ".join(path.name for path in files)
    if not sum(check_table(path, wanted) for path in files):
        raise DataError(f"{names} in {files[0].parent} has no rows")
    cache = runs_folder() / "cache" / "datasets"
    try:
        with quiet_datasets():
            return Dataset.from_parquet([str(path) for path in files], cache_dir=str(cache), columns=wanted)
    except Exception as error:  # kinds of Arrow's and of the datasets library, around what really happened
        reason = " ".join(str(error.__cause__ or error).split())
        raise DataError(f"cannot read {names}: {reason}") from error


def check_table(path: Path, columns: list[str]) -> int:
    """How many rows a parquet file has. Raises DataError when it is damaged or lacks a column."""
    try:
        found = read_metadata(path)
    except (OSError, ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    existing = found.schema.to_arrow_schema().names
    for column in columns:
        if column not in existing:
            raise missing_column(column, existing, path.name)
    return found.num_rows


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars and no log of the datasets library, whose errors are told in our words."""
    shown, verbosity = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()


# --- pictures that cannot be read --------------------------------------------------------------------------------
def check_picture(path: Path) -> None:
    """Raises DataError for a file that is no picture. (Some damage shows only when all of it is read.)"""
    if path.is_dir():
        raise DataError(f"{path} is a folder, not a picture")
    try:
        with no_size_warning(), Image.open(path) as picture:
            picture.verify()
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more for damaged files
        raise unreadable(str(path), error) from error


@contextmanager
def no_size_warning() -> Iterator[None]:
    """Silence about pictures that Pillow finds large (over 89 million pixels) but opens. Twice that it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield

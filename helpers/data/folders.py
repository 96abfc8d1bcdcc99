"""Captioned pictures on the disk: a folder with a metadata file, with parquet files or with a caption file beside each
picture, or a single parquet file. The rows have the columns that the `DatasetSpec` names."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
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
from helpers.data.encodings import decode
from helpers.presets.configuration import DatasetSpec

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CAPTION_SUFFIXES = (".txt", ".caption")  # where a picture has both, the first counts
METADATA = ("metadata.csv", "metadata.jsonl")
MAX_REPEATS = 100  # a folder 10_cat means "ten times"; 2023_summer is a name


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
    """The rows of metadata.csv or metadata.jsonl; else of the parquet files; else pictures with a caption file beside.

    Files and folders whose name begins with a dot do not count, wherever they are. Pictures of a folder called 10_cat,
    as kohya's trainers have them, come ten times as often as others (see `repeats_of`).
    Raises DataError when there is no such folder, column or caption, or a file is damaged.
    """
    folder = find_path(place)
    if not folder.is_dir():
        raise DataError(f"{place} is a file, not a folder; the source of a parquet file is parquet:{place}")
    tables = [] if metadata_file(folder) else parquet_files(folder)
    if tables:
        return read_parquet(tables, spec)
    pairs = [(picture, spec.caption or None if text is None else text) for picture, text in pairs_of(folder, spec)]
    bare = [picture.name for picture, text in pairs if text is None]
    if bare:
        raise DataError(
            f"{len(bare)} of {len(pairs)} pictures in {folder} have no caption, {bare[0]} for one: put a .txt file "
            "of the same name beside each, or one metadata.csv with the columns file_name and text, or give all of "
            'them one caption by --caption "…"'
        )
    for picture, _ in pairs:
        check_picture(picture)
    times = repeats_of([picture for picture, _ in pairs], folder)
    if spec.held_out_rows and max(times) > 1:
        raise DataError(f"some pictures in {folder} come several times (10_name): none can be held out of the training")
    rows = [pair for pair, count in zip(pairs, times, strict=True) for _ in range(count)]
    columns = {spec.image_column: [str(path) for path, _ in rows], spec.text_column: [text for _, text in rows]}
    return Dataset.from_dict(columns)


def metadata_file(folder: Path) -> Path | None:
    """The folder's metadata file, if it has one."""
    return next((folder / name for name in METADATA if (folder / name).is_file()), None)


def pairs_of(folder: Path, spec: DatasetSpec) -> list[tuple[Path, str | None]]:
    """(picture, caption) for each picture of a folder; None where it has none. Whether it can be read is not tried."""
    metadata = metadata_file(folder)
    return list(pairs_from_metadata(metadata, spec) if metadata else pairs_from_text_files(folder))


def repeats_of(pictures: list[Path], folder: Path) -> list[int]:
    """How often each picture comes: in 10_cat and 20_dog once and twice, as only the ratio counts.

    Once each, where a metadata file lists them.
    """
    if metadata_file(folder):
        return [1] * len(pictures)
    times = [max(1, folder_repeats(picture.parent.relative_to(folder))) for picture in pictures]
    shared = math.gcd(*times)
    return [count // shared for count in times]


def folder_repeats(below: Path) -> int:
    """The number in front of a folder's name, 1 to MAX_REPEATS; 0 for a name without. `below` is a relative path."""
    match = re.fullmatch(r"(\d{1,6})_.+", below.name)
    return int(match[1]) if match and int(match[1]) <= MAX_REPEATS else 0


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
    absent = [name for name in names if not is_there(folder / name)]
    if absent:
        raise DataError(f"{metadata.name} names {absent[0][:200]}, which is not in {folder} ({len(absent)} such rows)")
    return [folder / name for name in names]


def is_there(path: Path) -> bool:
    """Whether there is such a file; not so for a name that is too long to be one."""
    try:
        return path.exists()
    except OSError:
        return False


def read_rows(path: Path) -> list[dict]:
    """The rows of a metadata file, in order."""
    try:
        lines = io.StringIO(decode(path), newline="")
        if path.suffix == ".csv":
            rows = list(csv.DictReader(lines, delimiter=delimiter_of(lines.getvalue())))
        else:
            rows = [dict(json.loads(line)) for line in lines if line.strip()]
    except DataError:
        raise
    except (ValueError, TypeError, RecursionError, csv.Error) as error:  # JSONDecodeError is a ValueError
        raise DataError(f"cannot read {path}: {error}") from error
    for number, row in enumerate(rows):
        if None in row:  # where DictReader puts the cells that have no column
            raise DataError(f"row {number} of {path.name} has too many cells: a caption with a comma needs quotes")
    return rows


def delimiter_of(text: str) -> str:
    """What separates the cells of a table: a comma, or the semicolon or tab of a header that has no comma."""
    header = text.partition("\n")[0]
    return "," if "," in header else next((mark for mark in ";\t" if mark in header), ",")


def as_caption(value: Any, row: int, column: str, where: str) -> str:
    """The caption in a cell: "" when it is missing (None, NaN) or blank. Raises DataError for anything but text."""
    if value is None or value != value:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"row {row} of {where} has no text in the column {column!r} but a value of type {kind}")
    return value if value.strip() else ""


# --- text files and parquet files --------------------------------------------------------------------------------
def pairs_from_text_files(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """(picture, caption) for each picture in the folder and those below it, in the order of their paths.

    A picture without a caption file in a folder such as 10_sks cat takes "sks cat", as kohya's trainers read it.
    """
    found = visible_paths(folder)
    pictures = [path for path in found if path.suffix.lower() in PICTURE_SUFFIXES]
    if not pictures:
        raise DataError(f"there are no pictures in {folder}")
    texts = caption_files(found)
    for picture in pictures:
        path = texts.get(picture.with_suffix("")) or texts.get(picture)
        is_repeated = folder_repeats(picture.parent.relative_to(folder))
        if path:
            yield picture, decode(path).strip()
        else:
            yield picture, picture.parent.name.partition("_")[2].strip() if is_repeated else None


def caption_files(paths: list[Path]) -> dict[Path, Path]:
    """{cat: cat.txt} for the caption files among the paths; for cat.png.txt, as some tools write it, {cat.png: …}."""
    texts = [path for path in paths if path.suffix.lower() in CAPTION_SUFFIXES and path.is_file()]
    texts.sort(key=lambda path: CAPTION_SUFFIXES.index(path.suffix.lower()), reverse=True)
    return {path.with_suffix(""): path for path in texts}


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

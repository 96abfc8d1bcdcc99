"""Captioned datasets of the drawn world: the doodles and vintage pictures of the homework, and any other style."""

from __future__ import annotations

import hashlib
import io
import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base.files import atomic_path
from helpers.base.provenance import code_hash
from helpers.world.captions import caption
from helpers.world.scenes import STYLES, Scene, sample_scene

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "held_out")
# Rows (train, held_out); the homework's doodles set has 1000 pictures and its vintage set 685.
ROWS = {style: (500, 200) for style in STYLES} | {"doodles": (1000, 200), "vintage": (685, 200)}


def default_rows(style: str, split: str) -> int:
    """Number of rows of a split when none is asked for. Raises ValueError for an unknown style or split."""
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}; known: {', '.join(STYLES)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    return ROWS[style][SPLITS.index(split)]


def fingerprint(style: str, split: str, size: int = 128, n: int | None = None, seed: int = 0) -> str:
    """SHA-256 (hex) over the dataset's specification and the code of `helpers.world` that draws and captions it."""
    n = default_rows(style, split) if n is None else n
    spec = {"style": style, "split": split, "size": size, "n": n, "seed": seed}
    code = code_hash(Path(__file__).parent)
    return hashlib.sha256(f"{json.dumps(spec, sort_keys=True)} {code}".encode()).hexdigest()


def scene_from_json(text: str) -> Scene:
    """The scene in a row's `scene` column. Raises ValueError when the text does not describe a scene."""
    try:
        return Scene(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a scene: {text[:80]!r}") from error


def _row(style: str, split: str, size: int, seed: int, index: int) -> dict:
    """Row `index` of a split. It depends on nothing else: a shorter dataset is the beginning of a longer one."""
    from helpers.world.styles import render

    rng = random.Random(f"{style}:{split}:{seed}:{index}")
    scene = sample_scene(rng, "train")
    text = caption(scene, style, rng)
    png = io.BytesIO()
    render(scene, style, size).save(png, format="PNG")
    return {
        "image": {"bytes": png.getvalue(), "path": None},
        "text": text,
        "scene": json.dumps(asdict(scene), sort_keys=True),
    }


def _draw(style: str, split: str, size: int, n: int, seed: int) -> Dataset:
    from datasets import Dataset, Features, Image, Value

    rows = [_row(style, split, size, seed, index) for index in range(n)]
    columns = {name: [row[name] for row in rows] for name in ("image", "text", "scene")}
    features = Features({"image": Image(), "text": Value("string"), "scene": Value("string")})
    return Dataset.from_dict(columns, features=features)


def _write(dataset: Dataset, path: Path) -> None:
    """Writes the dataset as parquet; its schema carries the columns' features."""
    import pyarrow.parquet as pq

    pq.write_table(dataset.data.table, path, compression="none")  # PNG bytes do not compress further


def _read(path: Path, n: int, key: str) -> Dataset | None:
    """The cached dataset, or None when there is none or the file is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    try:
        dataset = Dataset(pq.read_table(path), fingerprint=key[:16])
    except (OSError, pa.ArrowException):
        return None
    complete = len(dataset) == n and dataset.column_names == ["image", "text", "scene"]
    return dataset if complete else None


def drawn_dataset(
    style: str, split: str, size: int = 128, n: int | None = None, seed: int = 0, cache_dir: Path | str | None = None
) -> Dataset:
    """Drawn pictures of one style with their captions, as a `datasets.Dataset`.

    style: one of STYLES. split: "train" or "held_out"; the scenes of both have only training pairs of subject and
    headwear, drawn from separate random streams. size: width and height in pixels. n: rows (by default 1000 and 200
    for doodles, 685 and 200 for vintage, 500 and 200 for other styles).
    Columns: image (RGB, size x size), text (the caption), scene (JSON, see `scene_from_json`).

    The rows are a function of the arguments and are kept as a parquet file in `cache_dir` (by default the cache folder
    beside the runs); a damaged file is drawn again. Raises ValueError for an unknown style or split and for n or size
    below 1.
    """
    n = default_rows(style, split) if n is None else n
    if n < 1 or size < 1:
        raise ValueError(f"a drawn dataset has at least one row and one pixel, not n={n}, size={size}")
    if cache_dir is None:
        from helpers.base.paths import runs_folder

        cache_dir = runs_folder() / "cache"
    key = fingerprint(style, split, size, n, seed)
    path = Path(cache_dir) / f"drawn-{style}-{split}-{size}px-{n}-{key[:12]}.parquet"
    dataset = _read(path, n, key)
    if dataset is None:
        with atomic_path(path) as temporary:
            _write(_draw(style, split, size, n, seed), temporary)
        dataset = _read(path, n, key)
    return dataset

"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`, which replaces it when the block ends without an exception.

        with atomic_path("runs/x/weights.safetensors") as temporary:
            save_file(tensors, temporary)

    The block writes a file or creates a folder there; parents are created and the suffix is kept. After an exception
    (an interrupt too) the temporary is deleted and what was at `path` stays. A file is replaced in one step. An
    existing folder is first renamed, then replaced, then deleted. Raises FileNotFoundError when nothing was written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:8]
    temporary = path.with_name(f".{path.stem}.{token}.tmp{path.suffix}")
    try:
        yield temporary
        if not temporary.exists():
            raise FileNotFoundError(f"nothing was written for {path}")
        if temporary.is_dir() and path.is_dir():
            old = path.with_name(f".{path.name}.{token}.old")
            os.replace(path, old)
            os.replace(temporary, path)
            _delete(old)
        else:
            os.replace(temporary, path)
    finally:
        _delete(temporary)


def write_json_atomic(path: Path | str, obj: Any) -> None:
    """Writes `obj` as readable JSON (UTF-8, two spaces, a newline at the end), whole or not at all.

    Raises ValueError for NaN and infinities, which JSON does not have, and TypeError for what JSON cannot say.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def new_folder(folder: Path | str) -> Iterator[Path]:
    """An empty folder to be filled, which appears as `folder` when the block ends without an error (`atomic_path`)."""
    with atomic_path(folder) as writing:
        writing.mkdir()
        yield writing

"""Where things are: the repository, and the folder of runs."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def runs_folder() -> Path:
    """Where runs, caches and figures go: the folder that COURSE_RUNS names, else `runs/` in the repository."""
    return Path(os.environ.get("COURSE_RUNS") or ROOT / "runs").resolve()


def short(path: Path) -> str:
    """The path as a reader sees it: relative to the repository, or to where they are, when it lies below."""
    for base in (Path.cwd(), ROOT):
        if path.is_relative_to(base):
            return path.relative_to(base).as_posix()
    return str(path)

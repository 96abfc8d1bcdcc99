"""`course figure N`: one figure drawn again and compared with the committed one."""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path
from typing import Any

from helpers.base.errors import CourseError
from helpers.base.paths import ROOT, runs_folder, short
from helpers.cli.messages import DEFAULT


def redraw_figure(given: argparse.Namespace) -> int:
    """`course figure N`: reruns the notebook that makes it, aside, and says how the figure differs."""
    from helpers.course import notebooks
    from helpers.course.figures import picture_difference
    from helpers.course.results import output_folder

    stem = f"fig{given.number:02d}"
    path = notebook_of(stem)
    folder = runs_folder() / "figure"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    earlier = [output_folder(DEFAULT) / "results.json", ROOT / "report" / "results.json"]
    for results in [file for file in earlier if file.exists()][:1]:  # a notebook may read what an earlier one recorded
        shutil.copyfile(results, folder / "results.json")
    print(f"figure {given.number} is drawn by {path.name}")
    environment = notebooks.OFFLINE | {"COURSE_OUTPUT": str(folder)}
    with notebooks.progress(path.name, notebooks.expected_seconds(DEFAULT, path.stem), print):
        notebooks.execute(path, folder / path.name, {"PRESET": DEFAULT}, environment)
    drawn = sorted((folder / "figures").glob(f"{stem}_*.png")) + sorted((folder / "figures").glob(f"{stem}.png"))
    if not drawn:
        raise CourseError(f"{path.name} ran, but drew no figure {given.number}")
    for new in drawn:
        committed = ROOT / "figures" / new.name
        print(f"{short(new)}: {describe_difference(new, committed, picture_difference)}")
    return 0


def describe_difference(new: Path, committed: Path, difference: Any) -> str:
    """One phrase: identical, how far apart, of another size, or nothing to compare with."""
    if not committed.exists():
        return f"there is no {committed.parent.name}/{committed.name} to compare with"
    if new.read_bytes() == committed.read_bytes():
        return "identical to the committed figure, byte for byte"
    mean = difference(new, committed)
    if mean is None:
        return "of another size than the committed figure"
    if mean == 0:
        return "every pixel is identical to the committed figure's"
    return f"differs from the committed figure by {mean:.2f} grey levels of 255 on average"


def notebook_of(stem: str) -> Path:
    """The notebook that draws a figure: the one that recorded it, or else the one whose code names it."""
    from helpers.course import notebooks
    from helpers.course.results import read

    paths = {path.stem: path for path in notebooks.committed()}
    try:
        figures = read(ROOT / "report" / "results.json")["figures"]
    except ValueError:
        figures = {}
    named = [entry.get("notebook") for name, entry in figures.items() if re.match(rf"{stem}(_|$)", name)]
    for path in [paths[name] for name in named if name in paths] + list(paths.values()):
        code = [cell.source for cell in notebooks.read(path).cells if cell.cell_type == "code"]
        if path.stem in named or any(re.search(rf"[\"']{stem}(_\w*)?[\"']", source) for source in code):
            return path
    raise CourseError(f"no notebook draws a figure {int(stem[3:])}")

"""`course check`, `notebooks`, `colab` and `sweep`: what keeps the course in order."""

from __future__ import annotations

import argparse
import sys

from helpers.base.paths import runs_folder, short


def check_course(given: argparse.Namespace) -> int:
    """`course check`: see `checks.check`."""
    from helpers.course.checks import check

    return 0 if check() else 1


def refresh_notebooks(given: argparse.Namespace) -> int:
    """`course notebooks`: the committed notebooks with new outputs; 1 when one is not fit to be committed."""
    from helpers.course import hygiene, notebooks

    paths = notebooks.select(given.only)
    environment = notebooks.OFFLINE | {"COURSE_OUTPUT": str(runs_folder() / "check")}
    wrong = 0
    for number, path in enumerate(paths, start=1):
        with notebooks.progress(f"[{number}/{len(paths)}] {path.name}", None, print):
            found = hygiene.refresh(path, environment)
        for problem in found:
            print(f"  {path.name}: {problem}", file=sys.stderr)
        wrong += bool(found)
    print(f"{len(paths)} notebooks refreshed in {short(notebooks.FOLDER)}/, {wrong} with problems")
    return 1 if wrong else 0


def write_badges(given: argparse.Namespace) -> int:
    """`course colab ADDRESS`: what the notebooks need to be opened in Colab from that repository."""
    from helpers.course import colab, notebooks

    paths = notebooks.select()
    for path in paths:
        colab.stamp(path, given.address)
    print(f"{len(paths)} notebooks open in Google Colab from {given.address}, once they are there")
    return 0


def run_sweep(given: argparse.Namespace) -> int:
    """`course sweep`: status 1 when trials are still missing, because other machines have them or were stopped."""
    from helpers.base.errors import CourseError
    from helpers.studies.questions import get_study
    from helpers.studies.sweep import sweep

    study = get_study(given.study)
    if given.workers < 1:
        raise CourseError(f"--workers must be at least 1, not {given.workers}")
    return 0 if sweep(study, given.storage, given.workers) else 1

"""`course run` and `course report`: notebooks to results, figures and the report."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.base.errors import CourseError
from helpers.base.paths import ROOT, short
from helpers.cli.messages import DEFAULT, is_readers, sentence_of, warn_without_gpu
from helpers.cli.train import parse_settings
from helpers.presets.variants import get_preset


def run_course(given: argparse.Namespace) -> int:
    """`course run`: notebooks → results, figures, report, all of it in the runs folder.

    With --refresh the committed figures, results, report and times are replaced too.
    """
    from helpers.course import notebooks

    preset = get_preset(given.preset)
    settings = parse_settings(given.set)
    if given.refresh and (given.only is not None or settings or given.preset != DEFAULT):
        raise CourseError(f"--refresh replaces what is committed: it needs the whole course with the preset {DEFAULT}")
    warn_without_gpu(preset)
    paths = notebooks.select(given.only)
    print(f"{preset.title}: {len(paths)} notebooks")
    done = notebooks.run_all(given.preset, paths, settings, given.force)
    summary(given.preset, done, given.refresh)
    return 0


def summary(preset: str, done: Sequence[Any], refresh: bool = False) -> None:
    """Compiles the report, and says what was written where; what is committed changes only if `refresh`."""
    from helpers.course import notebooks
    from helpers.course.exercises import failed_claims
    from helpers.course.results import Results, output_folder

    results, folder = Results(preset), output_folder(preset)
    seconds = sum(one.seconds for one in done if not one.skipped)
    executed = sum(not one.skipped for one in done)
    print(f"\n{executed} notebooks executed in {notebooks.duration(seconds)}, {len(done) - executed} unchanged")
    print(f"  results    {short(results.path)} ({len(results.names)} values, {len(results.figures)} figures)")
    for run in sorted(folder.glob("*-*/done.json")):
        print(f"  run        {short(run.parent)}/")
    for sentence in failed_claims(results):
        print(f"  not so     {sentence}")
    strip = animate(preset, results)
    report = report_of(results, complete=len(done) == len(notebooks.committed()))
    if refresh:
        publish(results, [strip, report])
        notebooks.write_costs(preset, list(done))
        print("  refreshed  figures/, report/ and the table in README.md; `course notebooks` refreshes the notebooks")
    unchanged = "" if refresh else " (the committed ones are unchanged)"
    places = f"figures {short(folder / 'figures')}/, notebooks {short(folder / 'notebooks')}/"
    print(f"{places}{f', report {short(report)}' if report else ''}{unchanged}")


def animate(preset: str, results: Any) -> Path | None:
    """The validation pictures of the runs that the figures show, as one animated strip beside them; None without."""
    from helpers.course.figures import save_animation
    from helpers.training.runs import Run

    shown = {key for figure in results.figures.values() for key in str(figure.get("run")).split(", ")}
    folder, found = results.path.parent, []
    for spec in get_preset(preset).datasets:
        folders = [path.parent for path in sorted(folder.glob(f"{spec.name}-*/done.json"))]
        found += [Run(f, preset, spec.name, key) for f in folders if (key := f.name.rpartition("-")[2]) in shown]
    return save_animation(found, folder / "figures" / "style_coming_in.webp") if found else None


def report_of(results: Any, complete: bool) -> Path | None:
    """Compiles the report beside the results. Without all notebooks it may lack values: that is said, and None."""
    folder = results.path.parent
    try:
        return build_report(results.path, folder / "figures", folder / "report.pdf")
    except Exception as error:
        if complete or not is_readers(error):
            raise
        print(f"  report     not compiled, since only some notebooks ran ({sentence_of(error)})")
    return None


def publish(results: Any, more: Sequence[Path | None]) -> None:
    """Copies figures, results.json and the report to where the repository keeps them, each whole or not at all.

    Figures that the results there name and these do not are removed: nothing draws them any more.
    """
    from helpers.base.files import atomic_path
    from helpers.course.results import files_of, read

    source, kept = results.path.parent, ROOT / "report" / "results.json"
    files = [file for entry in results.figures.values() for file in files_of(entry)]
    try:
        before = [file for entry in read(kept)["figures"].values() for file in files_of(entry)]
    except ValueError:  # there is none, or it is damaged
        before = []
    pairs = [*((source / file, ROOT / file) for file in files), (results.path, kept)]
    for file in filter(None, more):
        pairs.append((file, ROOT / ("report" if file.suffix == ".pdf" else "figures") / file.name))
    for old, new in pairs:
        with atomic_path(new) as temporary:
            shutil.copyfile(old, temporary)
    for gone in set(before) - set(files):
        (ROOT / gone).unlink(missing_ok=True)


def build_report(results: Path, figures: Path, output: Path) -> Path:
    """The report as a PDF, compiled from report/report.typ. Returns its path."""
    from helpers.course import report

    report.compile(results, figures, output)
    return output


def compile_report(given: argparse.Namespace) -> int:
    """`course report`: from report/results.json and figures/, or with --preset from the results of that preset."""
    from helpers.course.results import output_folder, read

    if given.preset is None:
        results, figures, output = ROOT / "report" / "results.json", ROOT / "figures", ROOT / "report" / "report.pdf"
    else:
        get_preset(given.preset)
        folder = output_folder(given.preset)
        results, figures, output = folder / "results.json", folder / "figures", folder / "report.pdf"
    read(results)
    print(f"report: {short(build_report(results, figures, output))}")
    return 0

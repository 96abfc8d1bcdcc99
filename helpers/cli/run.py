"""`course run` and `course report`: notebooks to results, figures and the report."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.base.paths import ROOT, short
from helpers.cli.messages import DEFAULT, is_readers, sentence_of, warn_without_gpu
from helpers.cli.train import parse_settings
from helpers.presets.catalogue import PRESETS
from helpers.presets.variants import get_preset


def run_course(given: argparse.Namespace) -> int:
    """`course run`: notebooks → results, figures, report. Only the default preset's full run publishes."""
    from helpers.course import notebooks

    preset = get_preset(given.preset)
    settings = parse_settings(given.set)
    warn_without_gpu(preset)
    paths = notebooks.select(given.only)
    print(f"{preset.title}: {len(paths)} notebooks")
    done = notebooks.run_all(given.preset, paths, settings, given.force)
    full = given.only is None and not settings
    if full and given.preset in PRESETS and not preset.on_hub:
        notebooks.write_costs(given.preset, done)
    summary(given.preset, done, publish=full and given.preset == DEFAULT)
    return 0


def summary(preset: str, done: Sequence[Any], publish: bool) -> None:
    """Publishes figures and results if asked to, compiles the report, and says what was written where."""
    from helpers.course import notebooks
    from helpers.course.exercises import failed_claims
    from helpers.course.results import Results, output_folder

    results, folder = Results(preset), output_folder(preset)
    seconds = sum(one.seconds for one in done if not one.skipped)
    executed = sum(not one.skipped for one in done)
    figures, target = folder / "figures", folder
    if publish:
        figures, target = ROOT / "figures", ROOT / "report"
        publish_results(results, figures, target)
    print(f"\n{executed} notebooks executed in {notebooks.duration(seconds)}, {len(done) - executed} unchanged")
    print(f"  notebooks  {short(folder / 'notebooks')}/")
    print(f"  results    {short(target / 'results.json')} ({len(results.names)} values)")
    print(f"  figures    {short(figures)}/ ({len(results.figures)} figures)")
    for run in sorted(folder.glob("*-*/done.json")):
        print(f"  run        {short(run.parent)}/")
    for sentence in failed_claims(results):
        print(f"  not so     {sentence}")
    try:
        print(f"  report     {short(build_report(target / 'results.json', figures, target / 'report.pdf'))}")
    except Exception as error:
        complete = len(done) == len(notebooks.committed())
        if complete or not is_readers(error):
            raise
        print(f"  report     not compiled, since only some notebooks ran ({sentence_of(error)})")


def publish_results(results: Any, figures: Path, report: Path) -> None:
    """Copies the run's figures and results.json to where the repository keeps them, each whole or not at all."""
    from helpers.base.files import atomic_path

    source = results.path.parent
    files = [entry[key] for entry in results.figures.values() for key in ("file", "vector", "data") if key in entry]
    pairs = [(source / file, figures / Path(file).relative_to("figures")) for file in files]
    for old, new in [*pairs, (results.path, report / "results.json")]:
        with atomic_path(new) as temporary:
            shutil.copyfile(old, temporary)


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

"""`course check`: every test there is, one after the other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from helpers.base.paths import ROOT, runs_folder
from helpers.course import notebooks
from helpers.course.results import comparable, compare

SANITIZE = ROOT / "notebooks" / "nbval_sanitize.cfg"
WORKERS = 4  # processes of unit tests at most: each of them holds PyTorch
COMMITTED_RESULTS = ROOT / "report" / "results.json"


@dataclass(frozen=True)
class Outcome:
    """How one group of checks ended: counts, and its closing line."""

    name: str
    passed: int
    failed: int
    skipped: int
    line: str


def check(say: Callable[[str], None] = print) -> bool:
    """Lint, types, unit tests, strict notebook tests and measured numbers; True when nothing failed.

    All groups run even when one fails. The notebooks write into `runs/check`, which is emptied first, and what they
    measured there is compared with report/results.json. The last line adds everything up.
    """
    output = runs_folder() / "check"
    shutil.rmtree(output, ignore_errors=True)
    environment = os.environ | notebooks.OFFLINE | {"COURSE_OUTPUT": str(output)}
    groups = [lint, types, unit_tests, lambda env: notebook_tests(env, notebooks.committed()), measured_numbers]
    outcomes = []
    for group in groups:
        outcomes.append(group(environment))
        say(f"{outcomes[-1].name}: {outcomes[-1].line}\n")
    for outcome in outcomes:
        say(f"{'ok    ' if not outcome.failed else 'FAILED'}  {outcome.name}: {outcome.line}")
    passed, failed, skipped = (sum(getattr(o, name) for o in outcomes) for name in ("passed", "failed", "skipped"))
    say(f"total: {passed} passed, {failed} failed, {skipped} skipped")
    return not failed


def lint(environment: dict[str, str]) -> Outcome:
    """ruff over the repository."""
    status, line = _run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], environment)
    return Outcome("ruff", int(status == 0), int(status != 0), 0, line)


def types(environment: dict[str, str], target: Path = ROOT / "helpers") -> Outcome:
    """mypy over helpers, or another file or folder. What it learns of the libraries is kept with the runs."""
    cache = runs_folder() / "mypy"
    status, line = _run([sys.executable, "-m", "mypy", f"--cache-dir={cache}", str(target)], environment)
    return Outcome("mypy", int(status == 0), int(status != 0), 0, line)


def unit_tests(environment: dict[str, str]) -> Outcome:
    """pytest over tests/, without the output folder of the notebooks: tests choose their own.

    Several processes share the files of tests and the cores. What needs a browser is left to `make site`.
    """
    cores = os.cpu_count() or 1
    workers = min(cores, WORKERS)
    environment = {name: value for name, value in environment.items() if name != "COURSE_OUTPUT"}
    environment["OMP_NUM_THREADS"] = str(cores // workers)
    return _pytest("pytest", ["tests", "--ignore=tests/browser", f"-n{workers}", "--dist=loadfile"], environment)


def notebook_tests(environment: dict[str, str], paths: list[Path]) -> Outcome:
    """Strict nbval: each committed notebook is executed, and every output compared with the committed one."""
    if not paths:
        return Outcome("nbval", 0, 1, 0, "there are no notebooks to test")
    options = ["-p", "no:cacheprovider", "--nbval", "--nbval-current-env"]
    options += ["--nbval-sanitize-with", str(SANITIZE), f"--nbval-cell-timeout={notebooks.TIMEOUT}"]
    return _pytest("nbval", [*options, *map(str, paths)], environment)


def measured_numbers(environment: dict[str, str], committed: Path = COMMITTED_RESULTS) -> Outcome:
    """What the notebooks have just measured against the committed results, each number within its tolerance."""
    name, measured = "measured numbers", Path(environment["COURSE_OUTPUT"]) / "results.json"
    try:
        problems, total = compare(measured, committed), len(comparable(committed))
    except ValueError as error:
        return Outcome(name, 0, 1, 0, str(error))
    for problem in problems:
        print(problem)
    if not total:
        return Outcome(name, 0, 1, 0, "the committed results hold nothing to compare")
    passed = max(0, total - len(problems))
    return Outcome(name, passed, len(problems), 0, f"{passed} agree with report/results.json, {len(problems)} do not")


def _run(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Runs a command from the repository, showing its output; returns its exit status and its last line."""
    line = ""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for text in process.stdout or ():
            print(text, end="", flush=True)
            line = text.strip() or line
    return process.returncode, line.strip("= ")


def _pytest(name: str, arguments: list[str], environment: dict[str, str]) -> Outcome:
    """One pytest process, counted from its own report. No test at all is a failure."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        status, line = _run([sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *arguments], environment)
        counts = _counts(report)
    total, failed, skipped = counts
    if status and not failed:
        failed, line = 1, line or f"pytest ended with status {status}"
    return Outcome(name, max(0, total - counts[1] - skipped), failed, skipped, line)


def _counts(report: Path) -> tuple[int, int, int]:
    """(tests, failures and errors, skipped) of a JUnit report; zeros when pytest wrote none."""
    try:
        suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return 0, 0, 0
    number = {name: sum(int(s.get(name, 0)) for s in suites) for name in ("tests", "failures", "errors", "skipped")}
    return number["tests"], number["failures"] + number["errors"], number["skipped"]

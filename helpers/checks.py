"""`course check`: every test there is, one after the other; and `course doctor`: is this machine ready?"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import notebooks
from .presets import ROOT, get_preset, runs_folder
from .results import comparable, compare

SANITIZE = ROOT / "notebooks" / "nbval_sanitize.cfg"
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
    """Lint, unit tests, strict notebook tests and measured numbers; True when nothing failed.

    All groups run even when one fails. The notebooks write into `runs/check`, which is emptied first, and what they
    measured there is compared with report/results.json. The last line adds everything up.
    """
    output = runs_folder() / "check"
    shutil.rmtree(output, ignore_errors=True)
    environment = os.environ | notebooks.OFFLINE | {"COURSE_OUTPUT": str(output)}
    groups = [lint, unit_tests, lambda env: notebook_tests(env, notebooks.committed()), measured_numbers]
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


def unit_tests(environment: dict[str, str]) -> Outcome:
    """pytest over tests/, without the output folder of the notebooks: tests choose their own."""
    environment = {name: value for name, value in environment.items() if name != "COURSE_OUTPUT"}
    return _pytest("pytest", ["tests"], environment)


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
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        for text in process.stdout:
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


# ------------------------------------------------------------------------------------------------------- doctor
def doctor() -> tuple[list[tuple[str, str, bool]], str]:
    """What the course needs of this machine: rows of (what, what was found, whether it will do), and advice."""
    import psutil
    import torch

    from .components import default_device
    from .provenance import versions

    found = versions()
    memory, free = psutil.virtual_memory().total / 2**30, shutil.disk_usage(ROOT).free / 2**30
    weights = get_preset("mini").model_folder
    present = all((weights / part).is_dir() for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"))
    device = default_device()
    gpu = torch.cuda.get_device_properties(0).total_memory / 2**30 if device == "cuda" else 0.0
    rows = [
        ("Python", f"{platform.python_version()} (3.11 or newer)", sys.version_info >= (3, 11)),
        ("torch", f"{found['torch']} (2.6 or newer)", _at_least(found["torch"], (2, 6))),
        ("diffusers", found["diffusers"], found["diffusers"] != "not installed"),
        ("transformers", found["transformers"], found["transformers"] != "not installed"),
        ("device", f"{found['device']}" + (f", {gpu:.0f} GiB" if gpu else ""), True),
        ("processors", f"{os.cpu_count()}", True),
        ("memory", f"{memory:.0f} GiB (4 or more)", memory >= 3.5),
        ("free disk", f"{free:.0f} GiB (2 or more)", free >= 2),
        ("MiniSD", "weights found" if present else f"no weights in {notebooks.short(weights)}", present),
        ("notebooks", f"{len(notebooks.committed())}", bool(notebooks.committed())),
    ]
    return rows, _advice(gpu)


def _at_least(version: str, wanted: tuple[int, int]) -> bool:
    numbers = version.split("+")[0].split(".")[:2]
    return all(n.isdigit() for n in numbers) and tuple(map(int, numbers)) >= wanted


def _advice(gpu: float) -> str:
    """Which preset suits this machine. At 512 pixels and batch 8, Stable Diffusion 2.1 trains in about 16 GiB."""
    if gpu >= 23:
        return "`course run` (MiniSD) works here; so does Stable Diffusion: `course run --preset sd21`"
    if gpu >= 15:
        return "`course run` (MiniSD) works here; so does Stable Diffusion: `course run --preset sd21-base`"
    return "`course run` is the one for this machine: MiniSD needs no GPU; `--preset smoke` is a short trial"

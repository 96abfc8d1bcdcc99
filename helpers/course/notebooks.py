"""The course's notebooks as files: executing them, refreshing the committed ones, and checking that they are clean.

A committed notebook is source and evidence in one: its outputs are what a reader sees first and what the strict
notebook tests compare with. So it is executed as a whole, holds nothing of the machine it ran on, and stays small.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import nbformat
import psutil

from helpers.base.errors import CourseError, is_out_of_memory
from helpers.base.files import atomic_path, write_json_atomic
from helpers.base.paths import ROOT, short
from helpers.base.provenance import code_hash, versions
from helpers.course.results import Results, files_of, output_folder, python_files
from helpers.presets.catalogue import PRESETS
from helpers.presets.variants import get_preset

FOLDER = ROOT / "notebooks"
README = ROOT / "README.md"
COSTS = FOLDER / "costs.json"  # {preset: {notebook: {"seconds", "gigabytes"}}}
TIMEOUT = 1800  # seconds for one cell
LONG_TIMEOUT = 24 * 3600  # for one that trains Stable Diffusion
# The course needs no network and no account: libraries must not try, and must not mention it in a notebook's output.
HEADLESS = {"COURSE_HEADLESS": "1"}  # nobody is there to move a slider, see helpers.course.sliders
OFFLINE = HEADLESS | {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}
# Helpers that no notebook's result depends on.
_NOT_EXECUTED = (
    *("cli", "playground", "course/checks", "course/colab", "course/hygiene", "course/notebooks", "course/report"),
    "course/site",
)


def committed() -> list[Path]:
    """The numbered notebooks, in order."""
    return sorted(path for path in FOLDER.glob("[0-9][0-9]_*.ipynb"))


def select(only: str | None = None) -> list[Path]:
    """The numbered notebooks, or those of a list such as "01,04". Raises CourseError for a number that none has."""
    notebooks = committed()
    if not notebooks:
        raise CourseError(f"there are no notebooks in {FOLDER}: run the course from a clone of its repository")
    if only is None:
        return notebooks
    numbers = {path.name[:2]: path for path in notebooks}
    wanted = [number.strip().zfill(2) for number in only.split(",") if number.strip()]
    unknown = [number for number in wanted if number not in numbers]
    if unknown or not wanted:
        missing = ", ".join(unknown) or repr(only)
        raise CourseError(f"there is no notebook {missing}; there are {', '.join(numbers)}")
    return [numbers[number] for number in sorted(set(wanted))]


def read(path: Path | str) -> nbformat.NotebookNode:
    """The notebook in a file. Raises CourseError when it is missing or is not a notebook."""
    path = Path(path)
    try:
        return nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise CourseError(f"there is no notebook {path}") from None
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, KeyError, AttributeError) as error:
        raise CourseError(f"{path.name} is not a notebook ({type(error).__name__})") from None


def write(notebook: nbformat.NotebookNode, path: Path | str) -> None:
    """Writes a notebook, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8", newline="\n")


# ---------------------------------------------------------------------------------------------------- executing
def parameters(path: Path) -> dict[str, str]:
    """{name: default, as written} of the notebook's cell tagged `parameters`."""
    import papermill

    return {name: facts["default"] for name, facts in papermill.inspect_notebook(str(path)).items()}


def check_parameters(given: dict[str, Any], paths: list[Path]) -> None:
    """Raises CourseError for a parameter that none of the notebooks has."""
    known = {name for path in paths for name in parameters(path)}
    for name in given:
        if name not in known:
            raise CourseError(f"no notebook has a parameter {name!r}; known: {', '.join(sorted(known)) or 'none'}")


def execute(path: Path, output: Path, given: dict[str, Any], environment: dict[str, str] | None = None) -> float:
    """Executes a notebook with parameters into another file and returns the seconds it took.

    Every cell has `TIMEOUT` seconds, or `LONG_TIMEOUT` where Stable Diffusion may train in it. The kernel is this
    Python's, whatever kernels the user has installed.
    When a cell fails, the notebook as far as it came stays beside `output` as `<name>.failed.ipynb`.
    Raises CourseError, naming the failing cell, and for a parameter that the notebook does not have.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    known, timeout = parameters(path), cell_timeout(given.get("PRESET", "mini"))
    for name in given:
        if name not in known:
            listing = ", ".join(known) or "none"
            raise CourseError(f"{path.name} has no parameter {name!r}; its parameters: {listing}")
    output.parent.mkdir(parents=True, exist_ok=True)
    failed = output.with_suffix(".failed.ipynb")
    temporary = output.with_suffix(".running.ipynb")
    settings = {
        "JUPYTER_PREFER_ENV_PATH": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "COURSE_NOTEBOOK": path.stem,  # what it records is noted as its own
        "COURSE_PRESET": given.get("PRESET", "mini"),  # where its sliders are kept
        **(environment or {}),
    }
    start = time.monotonic()
    try:
        with _environment(settings), _quiet():
            papermill.execute_notebook(
                str(path),
                str(temporary),
                parameters=given,
                kernel_name="python3",
                cwd=str(path.parent),
                execution_timeout=timeout,
                progress_bar=False,
                log_output=False,
            )
    except papermill.PapermillExecutionError as error:
        os.replace(temporary, failed)
        reason = re.sub(r"\x1b\[[0-9;]*m", "", f"{error.ename}: {error.evalue}").strip().splitlines()[0]
        if is_out_of_memory(error.ename, error.evalue):
            from helpers.presets.machine import out_of_memory

            reason = out_of_memory(given.get("PRESET", "mini"))
        where = f"the code cell executed as [{error.exec_count}]"
        raise CourseError(f"{path.name} failed in {where}: {reason} (kept as {short(failed)})") from None
    except (CellTimeoutError, DeadKernelError) as error:
        if temporary.exists():
            os.replace(temporary, failed)
        took = f"a cell ran longer than {timeout} s"
        if isinstance(error, DeadKernelError):  # nobody says why; a system that has no memory left ends the largest
            from helpers.presets.machine import out_of_memory

            took = f"its kernel died; if that was for want of memory: {out_of_memory(given.get('PRESET', 'mini'))}"
        raise CourseError(f"{path.name} failed: {took} (kept as {short(failed)})") from None
    except BaseException:  # an interrupt too
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, output)
    failed.unlink(missing_ok=True)
    return time.monotonic() - start


def cell_timeout(preset: str) -> int:
    """Seconds that a cell may take with a preset of that name."""
    known = PRESETS.get(preset.split("@")[0])
    return LONG_TIMEOUT if known and known.on_hub else TIMEOUT


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Environment variables for the kernels started inside the block."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _quiet() -> Iterator[None]:
    """papermill's log repeats what our progress lines say: only its errors are kept."""
    import logging
    import warnings

    logger = logging.getLogger("papermill")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


# ------------------------------------------------------------------------------------------------ a whole course
@dataclass(frozen=True)
class Executed:
    """What happened to one notebook: skipped (nothing it depends on has changed) or executed, and what that took."""

    path: Path
    output: Path
    seconds: float
    gigabytes: float  # of memory, at most
    skipped: bool


def source_hash(path: Path) -> str:
    """Content hash of a notebook's cells without their outputs."""
    cells = [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in read(path).cells]
    return sha256(json.dumps(cells).encode()).hexdigest()


def shared_key(preset: str) -> dict[str, Any]:
    """What every notebook depends on besides itself: the helpers' code, the model files, the preset, the versions."""
    folder = ROOT / "helpers"
    code = python_files(folder, leave_out=_NOT_EXECUTED)
    weights = sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        if "reference" not in file.parts:  # training replaces the reference runs; a notebook does not depend on them
            weights.update(file.relative_to(folder).as_posix().encode() + sha256(file.read_bytes()).digest())
    return {"preset": preset, "code": code_hash(*code), "weights": weights.hexdigest(), "versions": versions()}


def run_all(
    preset: str,
    paths: list[Path],
    given: dict[str, Any] | None = None,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> list[Executed]:
    """Executes notebooks in order into `runs/<preset>/notebooks/`, skipping those whose inputs have not changed.

    Each gets PRESET; one that trains also gets FROM_SCRATCH=True, so that it trains instead of showing the run that
    comes with the repository. What a notebook depends on is its source, the helpers, the model, the preset, the
    parameters, the library versions and the same of every notebook before it. Raises CourseError when one fails;
    the notebooks before it stay done.
    """
    environment = OFFLINE if not get_preset(preset).on_hub else HEADLESS
    given = given or {}
    check_parameters(given, paths)
    folder = output_folder(preset) / "notebooks"
    key = shared_key(preset)
    chain = sha256(json.dumps(key, sort_keys=True).encode())
    done: list[Executed] = []
    for number, path in enumerate(paths, start=1):
        known = parameters(path)
        own = {"PRESET": preset} | {name: True for name in ("FROM_SCRATCH",) if name in known}
        if force and "FORCE" in known:
            own["FORCE"] = True
        own |= {name: value for name, value in given.items() if name in known}
        identity = {name: value for name, value in own.items() if name != "FORCE"}
        chain.update(json.dumps([source_hash(path), identity], sort_keys=True).encode())
        stamp, output = folder / f"{path.stem}.json", folder / path.name
        before = _read_stamp(stamp)
        heading = f"[{number}/{len(paths)}] {path.name}"
        if not force and before.get("key") == chain.hexdigest() and _intact(preset, path.stem, output, before):
            say(f"{heading}: unchanged, skipped")
            done.append(Executed(path, output, before["seconds"], before["gigabytes"], True))
            continue
        expected = before.get("seconds") or expected_seconds(preset, path.stem)
        stamp.unlink(missing_ok=True)
        Results(preset).forget(path.stem)
        with progress(heading, expected, say), watched_memory() as most:
            seconds = execute(path, output, own, environment)
        names = {"values": _recorded(preset, "values", path.stem), "figures": _recorded(preset, "figures", path.stem)}
        cost = {"seconds": round(seconds, 1), "gigabytes": round(most() / 1e9, 2)}
        write_json_atomic(stamp, {"key": chain.hexdigest(), **cost, **names})
        done.append(Executed(path, output, seconds, cost["gigabytes"], False))
    return done


def _read_stamp(path: Path) -> dict[str, Any]:
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    whole = {"key", "seconds", "gigabytes", "values", "figures"}
    return stamp if isinstance(stamp, dict) and whole <= stamp.keys() else {}


@contextmanager
def watched_memory(every: float = 0.5) -> Iterator[Callable[[], int]]:
    """Watches this process's children within the block, and theirs; the function given says the most they took, bytes.

    It looks every so many seconds at the resident memory of all of them together.
    """
    most, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(every):
            most = max(most, _memory_of_children())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: most
    finally:
        ended.set()
        thread.join()


def _memory_of_children() -> int:
    total = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            total += process.memory_info().rss
    return total


def _recorded(preset: str, section: str, notebook: str) -> list[str]:
    entries = Results(preset).data[section]
    return sorted(name for name, entry in entries.items() if entry.get("notebook") == notebook)


def _intact(preset: str, notebook: str, output: Path, stamp: dict[str, Any]) -> bool:
    """Whether everything that the notebook wrote is still there."""
    results = Results(preset)
    noted = set(stamp["values"]) <= set(results.names) and set(stamp["figures"]) <= results.figures.keys()
    if not noted or not output.exists():
        return False
    files = [file for name in stamp["figures"] for file in files_of(results.figures[name])]
    return all((results.path.parent / file).exists() for file in files)


def expected_seconds(preset: str, notebook: str) -> float | None:
    """Seconds that a notebook took when costs.json was written, or None."""
    return _costs().get(preset, {}).get(notebook, {}).get("seconds")


def _costs() -> dict[str, dict[str, dict[str, float]]]:
    try:
        return json.loads(COSTS.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_costs(preset: str, done: list[Executed]) -> None:
    """Notes what each notebook took when it was executed, unless both are close to what is noted already.

    It may have been executed by an earlier run, without `--refresh`. Of the default preset README.md's table says the
    same, and is written anew.
    """
    costs = _costs()
    for one in done:
        before = costs.setdefault(preset, {}).get(one.path.stem)
        now = {"seconds": max(1, round(one.seconds)), "gigabytes": round(one.gigabytes, 1)}
        if before is None or any(abs(now[k] - before[k]) > 0.25 * before[k] for k in now):
            costs[preset][one.path.stem] = now
    write_json_atomic(COSTS, costs)
    if preset == "mini" and README.exists():
        with atomic_path(README) as temporary:
            temporary.write_text(with_costs(README.read_text(encoding="utf-8"), costs[preset]), encoding="utf-8")


def with_costs(page: str, costs: dict[str, dict[str, float]]) -> str:
    """The page with each notebook's time and memory in the last two columns of its row, `| [01](…) | … | … | … |`."""

    def row(match: re.Match[str]) -> str:
        cost = costs.get(match[2])
        if cost is None:
            return match[0]
        return f"{match[1]} {duration(cost['seconds'])} | {cost['gigabytes']:.1f} GB |"

    pattern = r"^(\| \[\w+\]\(notebooks/(\w+)\.ipynb\) \| [^|]+ \|) [^|]+ \| [^|]+ \|$"
    return re.sub(pattern, row, page, flags=re.MULTILINE)


@contextmanager
def progress(heading: str, expected: float | None, say: Callable[[str], None]) -> Iterator[None]:
    """One line when a notebook begins, one when it has ended; on a terminal the seconds count in between."""
    hint = f"expected {duration(expected)}" if expected else "never timed here"
    start, ended = time.monotonic(), threading.Event()
    live = sys.stdout.isatty()
    if not live:
        say(f"{heading}: running ({hint})")

    def count() -> None:
        while not ended.wait(1):
            print(f"\r{heading}: {duration(time.monotonic() - start)} ({hint}) ", end="", flush=True)

    thread = threading.Thread(target=count, daemon=True)
    if live:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if live:
            thread.join()
            print("\r\x1b[K", end="")
    say(f"{heading}: done in {duration(time.monotonic() - start)} ({hint})")


def duration(seconds: float) -> str:
    """Seconds as "42 s" or "3 min 05 s"."""
    seconds = round(seconds)
    return f"{seconds} s" if seconds < 100 else f"{seconds // 60} min {seconds % 60:02d} s"

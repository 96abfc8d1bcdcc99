"""Every measured number and every figure of a run, with where it comes from, in one results.json.

Notebooks record; the report, the README and the tests read. No number in the report is typed by hand.

    results = Results("mini")
    results.record("doodles/style_probability", 0.93, interval=(0.90, 0.95), n=200, tolerance=0.03)
    print(approx(results.get("doodles/style_probability")))  # ≈0.93
"""

from __future__ import annotations

import json
import math
import os
import re
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.base import hub, provenance
from helpers.base.files import write_json_atomic
from helpers.base.paths import ROOT, runs_folder
from helpers.data.fingerprint import data_fingerprint
from helpers.diffusion.weights import weights_fingerprint
from helpers.presets.configuration import DatasetSpec, Preset
from helpers.presets.variants import get_preset

if TYPE_CHECKING:
    from helpers.evaluation.measures import Measure

# What a measured number depends on: all of `helpers` except what only shows, starts or reports.
_NOT_MEASURING = (
    *("cli", "course", "playground", "base/hub", "presets/machine", "presets/sd_configs", "adapters/cards"),
    *("training/progress", "training/tracking", "studies/sweep"),
)


def output_folder(preset: str | Preset) -> Path:
    """Where results.json and figures/ of a preset are written.

    `runs/<preset>`, unless the environment variable COURSE_OUTPUT names another folder (checking the notebooks and
    redrawing one figure do that, so as to leave the results of the last run alone).
    """
    name = preset if isinstance(preset, str) else preset.name
    return Path(os.environ.get("COURSE_OUTPUT") or runs_folder() / name).resolve()


def approx(value: float, digits: int = 2) -> str:
    """A measured number as the notebooks print it: `approx(0.9312)` is "≈0.93".

    The sign "≈" marks what may differ a little on another machine; strict notebook tests replace what follows it by
    one word and compare the number itself with report/results.json instead (see `compare`).
    Raises ValueError for NaN and infinities.
    """
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"a measured number must be finite, not {value}")
    text = f"{value:.{digits}f}"
    return "≈" + (text.lstrip("-") if float(text) == 0 else text)  # never "≈-0.00"


def shown(measure: Measure, digits: int = 2) -> str:
    """A measure as the notebooks print it, with its interval: "≈0.93 [≈0.90, ≈0.95]"."""
    return f"{approx(measure.value, digits)} [{approx(measure.low, digits)}, {approx(measure.high, digits)}]"


def slug(name: str) -> str:
    """A name as a part of a result's name: "rank, alpha = r=4" is "rank_alpha_r_4"."""
    return re.sub(r"\W+", "_", name).strip("_").lower()


class Results:
    """The results.json of one preset: `values` (numbers, strings, lists of them), `figures` and their `provenance`.

    Every change is written at once, whole or not at all, so that a notebook that fails later loses nothing.
    """

    def __init__(self, preset: str | Preset = "mini", path: Path | str | None = None):
        """preset: its name, or a `Preset`; path: of results.json, by default in `output_folder(preset)`.

        Raises ValueError for an unknown preset and for a file that is not a results.json.
        """
        self.preset = get_preset(preset) if isinstance(preset, str) else preset
        self.path = Path(path) if path is not None else output_folder(self.preset) / "results.json"
        self._read()

    def _read(self) -> None:
        """Take in what other instances, or other notebooks, have written since."""
        self.data = read(self.path) if self.path.exists() else {"values": {}, "figures": {}, "provenance": {}}

    def record(
        self,
        name: str,
        value: Any,
        interval: tuple[float, float] | None = None,
        n: int | None = None,
        tolerance: float | None = None,
        notebook: str | None = None,
        varies: bool = False,
        **extra: Any,
    ) -> Any:
        """Keeps one measured value under a name, with its provenance, and returns it.

        value: a number, a string, or a list of them (numpy and torch scalars and arrays are converted).
        interval: its confidence interval (low, high); n: how many things were measured.
        tolerance: how far, in the value's own unit, the same measurement may lie from this one on another machine.
        notebook: that measured it; known by itself when `course run` executes the notebook.
        varies: True for what no two machines share (seconds, memory): recorded, but never compared.
        extra: further facts about this value, such as unit="dB".
        Raises ValueError for what JSON cannot hold, or for an interval that is not (low, high).
        """
        if not name or not isinstance(name, str):
            raise ValueError(f"a result needs a name, not {name!r}")
        entry: dict[str, Any] = {"value": _plain(value, name)}
        if interval is not None:
            low, high = (float(_plain(v, name)) for v in interval)
            if low > high:
                raise ValueError(f"the interval of {name!r} must be (low, high), not ({low}, {high})")
            entry["interval"] = [low, high]
        if tolerance is not None and not 0 <= tolerance < math.inf:
            raise ValueError(f"the tolerance of {name!r} must be a number from 0, not {tolerance}")
        notebook = notebook or os.environ.get("COURSE_NOTEBOOK")
        optional = {"n": n, "tolerance": tolerance, "notebook": notebook, "varies": varies or None, **extra}
        entry |= {key: _plain(v, name) for key, v in optional.items() if v is not None}
        self._read()
        entry["provenance"] = self._provenance()
        self.data["values"][name] = entry
        self._write()
        return value

    def record_figure(self, name: str, **entry: Any) -> None:
        """Keeps what is known about a figure (its file, alt text, model, run, seed); see `figures.save_figure`."""
        entry["notebook"] = entry.get("notebook") or os.environ.get("COURSE_NOTEBOOK")
        entry = {key: _plain(value, name) for key, value in entry.items() if value is not None}
        self._read()
        self.data["figures"][name] = entry | {"provenance": self._provenance()}
        self._write()

    def get(self, name: str) -> Any:
        """The value recorded under a name. Raises ValueError when there is none, naming the closest ones."""
        return self.entry(name)["value"]

    def entry(self, name: str) -> dict[str, Any]:
        """Everything recorded with a value: value, interval, n, tolerance, notebook, provenance …"""
        if name not in self.data["values"]:
            folder = name.split("/")[0]
            near = [known for known in self.data["values"] if known.startswith(folder)] or list(self.data["values"])
            known = ", ".join(sorted(near)[:8]) or "none yet"
            raise ValueError(f"{self.path.name} has no {name!r}; known: {known}; run the notebook that records it")
        return self.data["values"][name]

    @property
    def names(self) -> list[str]:
        """The names of all values, sorted."""
        return sorted(self.data["values"])

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """{name: what is known about the figure}."""
        return self.data["figures"]

    def forget(self, notebook: str) -> None:
        """Drops what a notebook recorded: before it runs again, so that nothing it no longer measures stays behind."""
        self._read()
        for section in ("values", "figures"):
            kept = {k: v for k, v in self.data[section].items() if v.get("notebook") != notebook}
            self.data[section] = kept
        if self.path.exists():
            self._write()

    def _provenance(self) -> str:
        """Notes preset, seed, device, library versions and content hashes once, and returns the note's name."""
        note = current_provenance(self.preset)
        identity = sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()[:12]
        self.data["provenance"][identity] = note
        return identity

    def _write(self) -> None:
        entries = [*self.data["values"].values(), *self.data["figures"].values()]
        used = {entry["provenance"] for entry in entries}
        notes = {key: note for key, note in self.data["provenance"].items() if key in used}
        self.data = {section: dict(sorted(self.data[section].items())) for section in ("values", "figures")}
        self.data["provenance"] = dict(sorted(notes.items()))
        write_json_atomic(self.path, self.data)


def files_of(figure: dict[str, Any]) -> list[str]:
    """The files of a figure, beside results.json: its picture, a plot's vectors, a slider's numbers."""
    return [figure[key] for key in ("file", "vector", "data") if key in figure]


def current_provenance(preset: Preset) -> dict[str, Any]:
    """What a value measured now depends on: preset, base model, seed, device, versions, and content hashes."""
    return {
        "preset": preset.name,
        "model": preset.title,
        "seed": preset.train.seed,
        **provenance.versions(),
        "code": measuring_code_hash(),
        "weights": _weights_hash(preset),
        "data": _data_hashes(preset),
    }


@lru_cache
def measuring_code_hash() -> str:
    """Content hash of the helpers that a measured number depends on."""
    folder = ROOT / "helpers"
    return provenance.code_hash(*python_files(folder, leave_out=_NOT_MEASURING))[:12]


def python_files(folder: Path, leave_out: tuple[str, ...]) -> list[Path]:
    """The Python files below a folder, without the folders and modules that are left out, such as "cli", "base/hub"."""
    names = {file: file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.py")}
    return [file for file, name in names.items() if name not in leave_out and name.split("/")[0] not in leave_out]


def _weights_hash(preset: Preset) -> str | None:
    """What names the base model: 12 digits of its folder's hash, the hub's revision, or the hash of one's own copy."""
    if preset.model_folder is not None:
        return _folder_hash(preset.model_folder)
    return weights_fingerprint(preset).rpartition("@")[2]


@lru_cache
def _folder_hash(folder: Path) -> str | None:
    try:
        return provenance.folder_weights_hash(folder)[:12]
    except FileNotFoundError:
        return None  # whoever loads the weights says that they are missing; a value without a model has none


def _data_hashes(preset: Preset) -> dict[str, str]:
    """{dataset name: where its pictures come from, to the byte}."""
    return {spec.name: _data_hash(spec, preset.resolution) for spec in preset.datasets}


def _data_hash(spec: DatasetSpec, resolution: int) -> str:
    """As `data_fingerprint`, but nothing is downloaded or read through for it."""
    kind, _, where = spec.source.partition(":")
    if kind == "drawn":
        return _drawn_hash(spec, resolution)
    if kind != "hub":
        return spec.source
    found = hub.find_local([(where, spec.revision)]) or hub.find_cached([(where, spec.revision)], "dataset")
    commit = found.commit or "a copy of one's own" if found else spec.revision or "main"
    return f"{spec.source}@{commit}"


@lru_cache
def _drawn_hash(spec: DatasetSpec, resolution: int) -> str:
    return data_fingerprint(spec, resolution)[:12]


def _plain(value: Any, name: str) -> Any:
    """The value as JSON can hold it. Raises ValueError, naming the result, for what it cannot."""
    if hasattr(value, "tolist"):  # numpy and torch
        value = value.tolist()
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"the result {name!r} must be finite, not {value}")
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item, name) for key, item in value.items()}
    if isinstance(value, Path):
        return value.as_posix()
    raise ValueError(f"the result {name!r} cannot be a {type(value).__name__}; numbers, strings and lists can be kept")


def read(path: Path | str) -> dict[str, Any]:
    """The content of a results.json. Raises ValueError, in one sentence, when it is missing or damaged."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no {path.name} in {path.parent}; `course run` writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete it and run `course run` again") from None
    if not isinstance(data, dict) or not {"values", "figures", "provenance"} <= data.keys():
        raise ValueError(f"{path} is not a results.json of this course; delete it and run `course run` again")
    return data


# ---------------------------------------------------------------------------------------------------- comparing
def compare(measured: Path | str, committed: Path | str) -> list[str]:
    """What differs between two results.json, one sentence each; an empty list when all is well.

    A number may differ by the tolerance that the committed entry states; without one, it must lie in the committed
    interval; with neither, integers and strings must be equal and other numbers agree to 6 digits. Values marked
    `varies` are not compared. A value that only one of the files has is a difference.
    """
    new, old = read(measured)["values"], read(committed)["values"]
    problems = []
    for name in sorted(new.keys() | old.keys()):
        entry = old.get(name) or new[name]
        if entry.get("varies"):
            continue
        if name not in new:
            problems.append(f"{name}: in the committed results, but no notebook measured it")
        elif name not in old:
            problems.append(f"{name}: measured, but not in the committed results")
        elif not _agrees(new[name]["value"], old[name]["value"], entry):
            allowed = _allowed(entry)
            problems.append(f"{name}: measured {new[name]['value']}, committed {old[name]['value']} ({allowed})")
    return problems


def comparable(path: Path | str) -> list[str]:
    """Names of the values in a results.json that `compare` looks at."""
    return [name for name, entry in read(path)["values"].items() if not entry.get("varies")]


def _allowed(entry: dict[str, Any]) -> str:
    if "tolerance" in entry:
        return f"tolerance {entry['tolerance']}"
    return f"interval {entry['interval']}" if "interval" in entry else "no tolerance stated"


def _agrees(new: Any, old: Any, entry: dict[str, Any]) -> bool:
    if isinstance(old, list):
        return isinstance(new, list) and len(new) == len(old) and all(map(_agrees, new, old, [entry] * len(old)))
    if isinstance(old, dict):
        return isinstance(new, dict) and new.keys() == old.keys() and all(_agrees(new[k], old[k], entry) for k in old)
    if not _is_number(old) or not _is_number(new):
        return type(new) is type(old) and new == old  # in Python True == 1
    if "tolerance" in entry:
        return abs(new - old) <= entry["tolerance"] * (1 + 1e-9)  # forgive the rounding of the subtraction
    if "interval" in entry:
        low, high = entry["interval"]
        return low - 1e-9 <= new <= high + 1e-9  # Wilson's upper end for 37 of 37 is rounded to just below 1
    return new == old or (not isinstance(old, int) and math.isclose(new, old, rel_tol=1e-6))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

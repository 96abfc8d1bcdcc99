"""The report as a PDF: report/report.typ, whose every number comes from results.json.

Four kinds of values reach the page, all through one lookup in report.typ that stops at a name it does not know:
what the notebooks measured (results.json), the settings of the preset that they ran (`preset_facts`), sizes that
follow from the base model's files (`model_facts`), and what the number of comparisons asks of an interval
(`comparison_facts`).
"""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import tempfile
import tomllib
from dataclasses import asdict
from pathlib import Path
from statistics import NormalDist
from typing import Any

from PIL import Image

from helpers.base.files import atomic_path
from helpers.base.paths import ROOT
from helpers.course import results
from helpers.course.figures import jpeg
from helpers.presets.catalogue import MINISD
from helpers.presets.configuration import Preset
from helpers.presets.variants import get_preset
from helpers.world.scenes import SUBJECTS

SOURCE = ROOT / "report" / "report.typ"
BIBLIOGRAPHY = "references.bib"
METRICS = ROOT / "helpers" / "minisd" / "metrics.json"  # what pretraining took
# What the project set out to reach; the report says whether it was reached.
TARGETS = {
    "target/style_with_adapter": 0.8,  # at least
    "target/style_without": 0.05,  # at most
    "target/subject_drop": 0.08,  # at most, as a share of all pictures
    "target/strict_style": 0.9,  # at least, together with the next
    "target/content_drop": 0.05,  # at most, as a share of all attributes
}
# A value is stale when one of these differs from what it would be today. (Versions and device may differ.)
_DEPENDS_ON = ("preset", "model", "code", "weights", "data")
# How names look in report.typ, where they are always written out: "nb07.doodles.subject_drop", "train/rank".
_NAME = re.compile(r'"(nb\d\d\.[^"\s]+|[a-z_]+/[^"\s]+)"')
_FIGURE = re.compile(r'\bfig\("(fig\d\d)"')


class ReportError(ValueError):
    """The report cannot be compiled; the message names the value or the figure that is to blame."""


def compile(results_path: Path | str, figures_dir: Path | str, output: Path | str) -> Path:
    """Compiles the report from one results.json and the figures beside it, and returns the PDF's path.

    The PDF is tagged (PDF/UA-1: alt texts, headings, reading order), and its bytes depend on the sources alone.
    Raises ReportError when a value is missing or stale, when a figure or its alt text is missing, and when
    report.typ does not compile; ValueError when results.json cannot be read. An earlier PDF then stays as it was.
    """
    import typst

    data = results.read(results_path)
    preset = preset_of(data)
    check_fresh(data, preset)
    values = gather(data, preset)
    wanted = required_figures()
    if preset.model == MINISD:
        check_complete(values, required_values())
    else:  # the judge does not know Stable Diffusion's pictures; typst stops at what is needed and not there
        wanted = [key for key in wanted if any(name.startswith(key) for name in data["figures"])]
    figures = find_figures(data, Path(figures_dir), wanted)
    with tempfile.TemporaryDirectory() as folder:
        _write_sources(Path(folder), values, figures, data["provenance"])
        try:
            pdf = typst.compile(
                str(Path(folder) / SOURCE.name),
                root=folder,
                format="pdf",
                ignore_system_fonts=True,  # typst brings its own: the same letters on every machine
                pdf_standards=["ua-1"],
            )
        except typst.TypstError as error:
            raise ReportError(f"{SOURCE.name} does not compile: {_sentence(error)}") from None
    with atomic_path(Path(output)) as temporary:
        temporary.write_bytes(pdf)
    return Path(output)


def made(figure: dict[str, Any], note: dict[str, Any]) -> dict[str, Any]:
    """Where a figure comes from: notebook, run, seed of the noise, hashes of code and weights (None: unknown)."""
    own = {name: figure.get(name) for name in ("run", "seed")}
    hashes = {name: note.get(name) for name in ("code", "weights")}
    return {"notebook": str(figure.get("notebook") or "?").split("_")[0], **own, **hashes}


def _write_sources(
    folder: Path, values: dict[str, Any], figures: dict[str, dict[str, Any]], provenance: dict[str, dict[str, Any]]
) -> None:
    """Everything that typst reads, in one folder: it may read nothing outside of its root."""
    for source in (SOURCE, SOURCE.parent / BIBLIOGRAPHY):
        shutil.copyfile(source, folder / source.name)
    for figure in figures.values():
        if figure["path"].suffix == ".svg":
            shutil.copyfile(figure["path"], folder / figure["shown"])
            continue
        with Image.open(figure["path"]) as picture:  # as PNG the pictures would make the PDF several times as large
            (folder / figure["shown"]).write_bytes(jpeg(picture, quality=95, sharp_colours=True))
    shown = {key: {k: v for k, v in figure.items() if k != "path"} for key, figure in figures.items()}
    for figure in shown.values():
        figure["made"] = made(figure, provenance.get(str(figure.get("provenance")), {}))
    (folder / "data.json").write_text(json.dumps({"values": values, "figures": shown}), encoding="utf-8")


def _sentence(error: Exception) -> str:
    """What typst says, and where: "results.json lacks 'x' … (report.typ:12:5)"."""
    message = str(getattr(error, "message", error)).strip().removeprefix("panicked with: ").strip('"')
    place = re.search(rf"{re.escape(SOURCE.name)}:\d+:\d+", str(getattr(error, "diagnostic", "")))
    return f"{message.splitlines()[0] if message else type(error).__name__}" + (f" ({place[0]})" if place else "")


# ------------------------------------------------------------------------------------------------------ checking
def required_values(source: Path | None = None) -> list[str]:
    """Names of the values that report.typ looks up."""
    return sorted(set(_NAME.findall((source or SOURCE).read_text(encoding="utf-8"))))


def required_figures(source: Path | None = None) -> list[str]:
    """The figures that report.typ shows, as "fig06"."""
    return sorted(set(_FIGURE.findall((source or SOURCE).read_text(encoding="utf-8"))))


def preset_of(data: dict[str, Any]) -> Preset:
    """The preset that the values were measured with. Raises ReportError for none, and for more than one."""
    names = sorted({note.get("preset", "?") for note in data["provenance"].values()})
    if len(names) != 1:
        found = f"of the presets {', '.join(names)}" if names else "no values"
        raise ReportError(f"the report needs the values of one preset, and results.json holds {found}; `course run`")
    return get_preset(names[0])


def check_complete(values: dict[str, Any], names: list[str]) -> None:
    """Raises ReportError naming the values that results.json lacks."""
    missing = [name for name in names if name not in values]
    if missing:
        raise ReportError(f"results.json lacks {_listed(missing)}, which the report needs; run `course run` again")


def check_fresh(data: dict[str, Any], preset: Preset) -> None:
    """Raises ReportError naming the values and figures that were made with other code, weights or data than today's."""
    now = results.current_provenance(preset)
    stale, reasons = [], set()
    for name, entry in [*data["values"].items(), *data["figures"].items()]:
        note = data["provenance"].get(entry.get("provenance"), {})
        changed = {key for key in _DEPENDS_ON if note.get(key) != now[key]}
        if changed:
            stale.append(name)
            reasons |= changed
    if stale:
        what = " and ".join(key for key in _DEPENDS_ON if key in reasons)
        what = f"{_listed(stale)} (other {what} than today's)"
        raise ReportError(f"results.json is stale: {what}; run `course run` again")


def find_figures(data: dict[str, Any], folder: Path, keys: list[str]) -> dict[str, dict[str, Any]]:
    """{"fig06": {path, shown, alt, model, width, height, …}} for each key; a plot's path is that of its vector file.

    shown: the file's name in the report's folder; width and height in pixels. Raises ReportError for what is missing.
    """
    found = {}
    for key in keys:
        names = [name for name in data["figures"] if name == key or name.startswith(f"{key}_")]
        if len(names) != 1:
            problem = f"has {' and '.join(names)}" if names else "has none"
            raise ReportError(f"the report needs one figure {key}, and results.json {problem}; run `course run` again")
        entry = data["figures"][names[0]]
        drawn = folder / Path(entry.get("file", f"{names[0]}.png")).name
        path = folder / Path(entry.get("vector") or drawn).name
        for file in {drawn, path}:
            if not file.is_file():
                raise ReportError(f"the figure {file.name} is missing from {folder.name}/; run `course run` again")
        for fact in ("alt", "model"):
            if not str(entry.get(fact) or "").strip():
                raise ReportError(f"the figure {names[0]!r} has no {fact} in results.json; save it with save_figure")
        with Image.open(drawn) as picture:
            size = {"width": picture.width, "height": picture.height}
        shown = f"{key}.svg" if path.suffix == ".svg" else f"{key}.jpg"
        found[key] = {**entry, **size, "name": names[0], "path": path, "shown": shown}
    return found


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more


# --------------------------------------------------------------------------------------------------------- facts
def gather(data: dict[str, Any], preset: Preset) -> dict[str, dict[str, Any]]:
    """{name: {"value": …, "interval": …, "n": …}}: measured values, and facts that need no measuring."""
    facts = {**preset_facts(preset), **model_facts(preset), **version_facts(data), **comparison_facts(data), **TARGETS}
    both = sorted(facts.keys() & data["values"].keys())
    if both:
        raise ReportError(f"results.json records {_listed(both)}, names that the report keeps for settings")
    return {**data["values"], **{name: {"value": value} for name, value in facts.items()}}


def preset_facts(preset: Preset) -> dict[str, Any]:
    """Settings of the preset: "train/rank", "preset/resolution", "data/doodles/source" …"""
    plain = ("name", "title", "model", "resolution", "prediction_type", "num_inference_steps", "guidance_scale")
    facts = {f"preset/{name}": getattr(preset, name) for name in (*plain, "eval_prompts", "control_prompts")}
    facts["preset/is_minisd"] = preset.model == MINISD
    facts |= {f"train/{name}": value for name, value in asdict(preset.train).items()}
    for spec in preset.datasets:
        facts |= {f"data/{spec.name}/{name}": value for name, value in asdict(spec).items()}
    facts |= {f"prompts/{figure}": list(prompts) for figure, prompts in preset.figure_prompts.items()}
    return facts


def model_facts(preset: Preset) -> dict[str, Any]:
    """Sizes of the base model that lies in a folder, from its configurations and weights; {} for a model of the hub."""
    folder = preset.model_folder
    if folder is None:
        return {}
    shapes = {part: _shapes(folder / part) for part in ("unet", "vae", "text_encoder")}
    facts = {f"model/{part}_parameters": sum(map(math.prod, s.values())) for part, s in shapes.items()}
    unet, text = (_config(folder / part) for part in ("unet", "text_encoder"))
    latent = unet["sample_size"]
    training = json.loads(METRICS.read_text(encoding="utf-8"))["training"]
    return facts | {
        "pretraining/stages": [[stage["stage"], stage["seconds"], stage["pictures"]] for stage in training],
        "world/subjects": len(SUBJECTS),
        "model/latent_channels": unet["in_channels"],
        "model/latent_size": latent,
        "model/downsampling": preset.resolution // latent,
        "model/text_positions": text["max_position_embeddings"],
        "model/text_width": text["hidden_size"],
        "model/timesteps": _config(folder / "scheduler")["num_train_timesteps"],
    }


def _config(folder: Path) -> dict[str, Any]:
    name = "scheduler_config.json" if folder.name == "scheduler" else "config.json"
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"the base model has no readable {folder.name}/{name} ({error})") from None


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """{tensor name: shape} from the headers of the .safetensors files in a folder; the tensors are not read."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        shapes |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    if not shapes:
        raise ReportError(f"the base model has no weights in {folder.name}/")
    return shapes


def comparison_facts(data: dict[str, Any]) -> dict[str, Any]:
    """How many differences the table of hyper-parameters tests, and the factor that Bonferroni's rule asks for.

    For m normal intervals to hold together at 95%, each is widened by z(1 - 0.025 / m) / z(0.975).
    """
    ends = tuple(f"{what}.{who}" for what in ("style", "content") for who in ("world", "imagenet"))
    m = sum(name.startswith("nb09.effect.") and name.endswith(ends) for name in data["values"])
    quantile = NormalDist().inv_cdf
    return {"effects/count": m, "effects/widening": quantile(1 - 0.025 / max(m, 1)) / quantile(0.975)}


def version_facts(data: dict[str, Any]) -> dict[str, Any]:
    """What the values were measured with: "versions/torch" … (several, when notebooks ran on several machines).

    "versions/pinned" is what the repository asks for, "version/course" the newest release in CHANGELOG.md.
    """
    notes = data["provenance"].values()
    keys = ("python", "torch", "diffusers", "transformers", "device")
    facts: dict[str, Any] = {}
    for key in keys:
        facts[f"versions/{key}"] = " and ".join(sorted({str(note.get(key, "?")) for note in notes}))
    releases = re.findall(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    return facts | {"versions/pinned": pinned(), "version/course": releases[0]}


def pinned() -> list[str]:
    """The versions that constraints.txt gives the libraries of pyproject.toml: ["torch 2.13.0", …]."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {re.split(r"[<>=]", line)[0] for line in project["dependencies"]}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line.replace("==", " ") for line in lines if line.split("==")[0] in named]

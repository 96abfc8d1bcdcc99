"""Run directories: what a training run leaves behind, how it is found again, and how it is resumed.

    runs/<preset>/<dataset>-<key>/
        config.json                          what the run is a function of
        metrics.jsonl                        one line a step: step, epoch, loss, lr, grad_norm, mean_timestep
        initial_latents.safetensors          where every validation picture starts
        validation/step-000250/              000.png … one a prompt and seed, latents.safetensors, metrics.json
        checkpoints/step-000950/             see helpers.checkpoints
        adapter/pytorch_lora_weights.safetensors
        done.json                            only when finished: hashes, losses, versions, seconds

The key is a hash of configuration, code, weights and data. So a directory that exists and is done is the run that
would be trained; and one that exists and is not done is continued from its last checkpoint.
Steps count optimizer updates: step-000250 is the state after 250 of them, which draws batch 250 next.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from helpers import components, data, hub, presets, provenance
from helpers.folders import find_path, visible_paths
from helpers.presets import DatasetSpec, Preset

REFERENCE = presets.ROOT / "helpers" / "minisd" / "reference"  # finished runs that come with the repository
RUN_FILES = ("config.json", "metrics.jsonl", "initial_latents.safetensors", "done.json")
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
# The modules that a run's result depends on. (This one only files it.)
CODE = (
    *("diffusion", "lora", "draws", "steps", "validation", "training", "checkpoints"),
    *("data", "recipes", "folders", "caches", "sampling", "components", "dora"),
)
REFERENCE_PIXELS = 128  # validation pictures of a reference run are stored at most this large


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says why, and what is left on the disk."""


class BusyError(TrainingError):
    """Another process is training this very run."""


# --- what a run is a function of ---------------------------------------------------------------------------------


def weights_fingerprint(preset: Preset, parts: components.Components | None = None) -> str:
    """Names the base model's weights: their hash, or repository@revision, which the hub guarantees not to change.

    Mirrors hold the same weights, so that it does not matter which of them was there. A copy of one's own
    (COURSE_LOCAL) may be anything, and is hashed.
    """
    if parts is not None:
        modules = {"unet": parts.unet, "vae": parts.vae, "text_encoder": parts.text_encoder}
        state = {f"{name}.{key}": t for name, module in modules.items() for key, t in module.state_dict().items()}
        return provenance.tensor_hash(state)
    if preset.model_folder is None:
        own = hub.find_local(preset.repositories)
        return own_copy_hash(own.folder) if own else f"{preset.model}@{preset.revision}"
    if not preset.model_folder.is_dir():
        raise components.ComponentsError(
            f"the base model of preset {preset.name!r} is missing: no folder {preset.model}. "
            "MiniSD's weights come with the repository; restore them with git, or train them with "
            "`python -m helpers.minisd.pretrain`."
        )
    return provenance.folder_weights_hash(preset.model_folder)


def own_copy_hash(folder: Path) -> str:
    """SHA-256 (hex) of the files of a model that are read, and of no other that lies beside them."""
    alternatives = [folder / file for needed in components.NEEDED for file in needed.split("|")]
    files = sorted({path for path in alternatives if path.is_file()})
    stats = [path.stat() for path in files]
    return _hash_files(folder, tuple(files), tuple((stat.st_mtime_ns, stat.st_size) for stat in stats))


@lru_cache
def _hash_files(folder: Path, files: tuple[Path, ...], stamps: tuple) -> str:
    """They have some GB, so they are read again only when their times or sizes have changed."""
    return digest([(path.relative_to(folder).as_posix(), provenance.file_hash(path)) for path in files])


def data_fingerprint(spec: DatasetSpec, resolution: int) -> str:
    """Names the pictures and captions: a hash of their recipe, of the folder's bytes, or the hub's commit."""
    kind, _, where = spec.source.partition(":")
    if kind == "drawn":
        from helpers.recipes import fingerprint

        parts = [fingerprint(where, "train", resolution, spec.train_rows, 0)]
        parts += [fingerprint(where, "held_out", resolution, spec.held_out_rows, 0)] if spec.held_out_rows else []
        return digest(parts)
    rows = [spec.image_column, spec.text_column, spec.train_rows, spec.held_out_rows, spec.split]
    if kind in ("folder", "parquet", "hub"):
        copy = data.hub_copy(spec) if kind == "hub" else None
        if copy and copy.commit:
            return digest([spec.source, copy.commit, *rows])
        root = copy.folder if copy else find_path(where)
        paths = [root] if root.is_file() else [path for path in visible_paths(root) if path.is_file()]
        files = [(path.relative_to(root).as_posix(), provenance.file_hash(path)) for path in paths]
        return digest([files, *rows])
    raise data.DataError(f"unknown source {spec.source!r}")


def run_config(preset: Preset, dataset_name: str, parts: components.Components | None = None) -> dict:
    """Everything that the run's result depends on, as plain JSON. Two equal configurations give equal runs."""
    spec = preset.datasets[dataset_name]
    modules = [presets.ROOT / "helpers" / f"{name}.py" for name in CODE]
    config = {
        "dataset": {name: value for name, value in asdict(spec).items() if name not in ("licence", "download_gb")},
        "train": asdict(preset.train),
        "resolution": preset.resolution,
        "prediction_type": preset.prediction_type,
        "dtype": preset.dtype,
        "validation_prompts": preset.validation_prompts.get(dataset_name, ()),
        "num_inference_steps": preset.num_inference_steps,
        "guidance_scale": preset.guidance_scale,
        "hashes": {
            "code": provenance.code_hash(*modules),
            "weights": weights_fingerprint(preset, parts),
            "data": data_fingerprint(spec, preset.resolution),
        },
    }
    return json.loads(json.dumps(config))


def config_key(config: dict) -> str:
    """12 hexadecimal digits that change when anything in the configuration does."""
    return digest(config)[:12]


def run_key(preset: Preset, dataset_name: str, parts: components.Components | None = None) -> str:
    """12 hexadecimal digits: a hash of configuration, code, weights and data. ValueError for an unknown dataset."""
    return config_key(run_config(preset, dataset_name, parts))


def digest(obj: object) -> str:
    """SHA-256 (hex) of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(obj, sort_keys=True).encode()).hexdigest()


# --- a run on the disk -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run directory. `source` says how we came by it: "trained now", "found in runs" or "reference"."""

    dir: Path
    preset: str
    dataset: str
    key: str
    source: str = "trained now"

    @property
    def config(self) -> dict:
        """What the run is a function of (see `run_config`)."""
        return json.loads((self.dir / "config.json").read_text(encoding="utf-8"))

    @property
    def done(self) -> dict:
        """The closing record: hashes, losses, versions, seconds. Raises FileNotFoundError for an unfinished run."""
        return json.loads((self.dir / "done.json").read_text(encoding="utf-8"))

    @property
    def hashes(self) -> dict[str, str]:
        """Content hashes by name: code, weights, data, adapter, initial_latents."""
        return self.done["hashes"]

    @property
    def adapter(self) -> Path:
        """The adapter's file, which diffusers' `load_lora_weights` reads too."""
        return self.dir / "adapter" / ADAPTER_FILE

    def metrics(self) -> list[dict]:
        """One dict a step: step (0 … steps - 1), epoch, loss, lr, grad_norm, mean_timestep. Skips a torn last line."""
        path = self.dir / "metrics.jsonl"
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break  # the process was killed while it wrote this line
        return lines

    def best_step(self) -> int | None:
        """The validated step (after the first update) with the lowest held-out loss; None without such a loss."""
        losses = {m["step"]: m["held_out_loss"] for m in self.validation_metrics() if "held_out_loss" in m}
        return min((step for step in losses if step > 0), key=losses.get, default=None)  # type: ignore[arg-type]

    def validations(self) -> list[tuple[int, int]]:
        """(step, epoch) of every validation, in order; the epoch is the number of epochs completed."""
        return [(m["step"], m["epoch"]) for m in self.validation_metrics()]

    def validation_metrics(self) -> list[dict]:
        """One dict a validation: step, epoch, and held_out_loss where held-out pictures exist."""
        found = sorted(self.dir.glob("validation/step-*/metrics.json"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in found]

    def validation_dir(self, step: int) -> Path:
        """Where the validation pictures after a step are."""
        return self.dir / "validation" / f"step-{step:06d}"

    def validation_pictures(self, step: int) -> list[Image.Image]:
        """The pictures of that validation, by prompt, then seed. Raises ValueError naming the steps that exist."""
        folder = self.validation_dir(step)
        if not (folder / "metrics.json").exists():
            raise ValueError(f"no validation at step {step}; known: {[s for s, _ in self.validations()]}")
        return [_open_picture(path) for path in sorted(folder.glob("*.png"))]

    def validation_latents(self, step: int) -> torch.Tensor:
        """The latents of that validation, float32 [pictures, C, h, w]."""
        return load_file(self.validation_dir(step) / "latents.safetensors")["latents"]

    def initial_latents(self) -> torch.Tensor:
        """Where every validation starts, float32 [pictures, C, h, w]."""
        return load_file(self.dir / "initial_latents.safetensors")["latents"]

    def checkpoints(self) -> list[int]:
        """The steps of the checkpoints kept, in order."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.dir.glob("checkpoints/step-*"))

    def checkpoint_dir(self, step: int) -> Path:
        """Where the checkpoint after a step is."""
        return self.dir / "checkpoints" / f"step-{step:06d}"


def _open_picture(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def run_dir(preset: Preset, dataset_name: str, key: str, runs: Path | None = None) -> Path:
    """runs/<preset>/<dataset>-<key>/"""
    return (runs or presets.runs_folder()) / preset.name / f"{dataset_name}-{key}"


def is_finished(folder: Path) -> bool:
    """True when done.json is there and the adapter is the one it was written for."""
    try:
        done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
        return provenance.tensor_hash(load_file(folder / "adapter" / ADAPTER_FILE)) == done["hashes"]["adapter"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False


def find_run(
    preset: Preset, dataset_name: str, key: str, from_scratch: bool = False, runs: Path | None = None
) -> Run | None:
    """The finished `Run` of that key, or None: first one of our own, then (unless from_scratch) the reference run."""
    own = run_dir(preset, dataset_name, key, runs)
    reference = REFERENCE / own.name
    if is_finished(own):
        return Run(own, preset.name, dataset_name, key, "found in runs")
    if not from_scratch and is_finished(reference):
        return Run(reference, preset.name, dataset_name, key, "reference")
    return None


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name; it appears under its own name when the block ends without an error."""
    writing = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        yield writing
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(writing, folder)


def adapter_metadata(run: Run, step: int) -> dict:
    """What a run's adapter says about its origin after `step` updates, for the header of its file."""
    config = run.config
    train, hashes = config["train"], config["hashes"]
    return {
        "base_model": config["model"],
        "base_model_hash": hashes["weights"],
        "prediction_type": config["prediction_type"],
        "resolution": config["resolution"],
        "dataset": run.dataset,
        "dataset_hash": hashes["data"],
        "rank": train["rank"],
        "alpha": train["alpha"],
        "targets": train["targets"],
        "seed": train["seed"],
        "step": step,
        "run": run.key,
        "code_hash": hashes["code"],
        "versions": provenance.versions(),
    }


def rewind(run: Run, step: int) -> None:
    """Forget what was written after `step` updates, since it is about to come again, and what was half written."""
    for pattern in (".*", "checkpoints/.*", "validation/.*"):  # temporary names, left behind by a killed process
        for left in run.dir.glob(pattern):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    (run.dir / "done.json").unlink(missing_ok=True)
    kept = [line for line in run.metrics() if line["step"] < step]
    with provenance.atomic_path(run.dir / "metrics.jsonl") as path:
        Path(path).write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    for later, _ in run.validations():
        if later > step:
            shutil.rmtree(run.validation_dir(later))
    for later in run.checkpoints():
        if later > step:
            shutil.rmtree(run.checkpoint_dir(later))


# --- reference runs ----------------------------------------------------------------------------------------------


def copy_run(run: Run, target: Path, step: int) -> None:
    """Copy a run as it was after `step` updates, where it has a checkpoint: ready to be resumed in `target`."""
    with new_folder(target) as folder:
        for path in run.dir.iterdir():
            if path.name in RUN_FILES:
                shutil.copy2(path, folder / path.name)
        shutil.copytree(run.checkpoint_dir(step), folder / "checkpoints" / f"step-{step:06d}")
        for past, _ in run.validations():
            if past <= step:
                shutil.copytree(run.validation_dir(past), folder / "validation" / f"step-{past:06d}")
        rewind(Run(folder, run.preset, run.dataset, run.key), step)


def export_reference(run: Run, target: Path | None = None) -> Path:
    """Copy a finished run to where the repository keeps its reference runs: a few MB that replay and resume.

    Of the checkpoints the last one before the end is kept; pictures are at most 128 pixels on a side.
    target: the folder of all reference runs. Returns the run's own folder in it.
    Raises TrainingError for a run that is not finished, or that kept no earlier checkpoint.
    """
    if not is_finished(run.dir):
        raise TrainingError(f"the run {run.dir.name} is not finished: only finished runs become references")
    last = run.config["train"]["steps"]
    earlier = [step for step in run.checkpoints() if step < last]
    if not earlier:
        raise TrainingError(f"the run {run.dir.name} kept no checkpoint before step {last}: nothing to resume from")
    folder = (target or REFERENCE) / run.dir.name
    checkpoint = f"checkpoints/{run.checkpoint_dir(earlier[-1]).name}"
    with new_folder(folder) as writing:
        for path in run.dir.iterdir():
            if path.name in RUN_FILES:
                shutil.copy2(path, writing / path.name)
        for name in ("adapter", "validation", checkpoint):
            shutil.copytree(run.dir / name, writing / name)
        for path in writing.glob("validation/*/*.png"):
            shrink_picture(path)
    return folder


def shrink_picture(path: Path) -> None:
    """Rewrite a PNG at no more than REFERENCE_PIXELS on a side, compressed as well as PNG can."""
    picture = _open_picture(path)
    if max(picture.size) > REFERENCE_PIXELS:
        picture.thumbnail((REFERENCE_PIXELS, REFERENCE_PIXELS), Image.Resampling.LANCZOS)
    picture.save(path, optimize=True)

"""Run directories: what a training run leaves behind, how it is found again, and how it is resumed.

    runs/<preset>/<dataset>-<key>/
        config.json                          what the run is a function of
        metrics.jsonl                        one line a step: step, epoch, loss, lr, grad_norm, mean_timestep
        initial_latents.safetensors          where every validation picture starts
        validation/step-000250/              000.png … one a prompt and seed, latents.safetensors, metrics.json
        checkpoints/step-000950/             see helpers.training.checkpoints
        adapter/pytorch_lora_weights.safetensors
        done.json                            only when finished: hashes, losses, versions, seconds

The key is a hash of configuration, code, weights and data. So a directory that exists and is done is the run that
would be trained; and one that exists and is not done is continued from its last checkpoint.
Steps count optimizer updates: step-000250 is the state after 250 of them, which draws batch 250 next.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from helpers.base import paths, provenance
from helpers.base.files import atomic_path, new_folder
from helpers.base.provenance import digest
from helpers.data.fingerprint import data_fingerprint
from helpers.diffusion import components
from helpers.diffusion.weights import weights_fingerprint
from helpers.presets.configuration import Preset

REFERENCE = paths.ROOT / "helpers" / "minisd" / "reference"  # finished runs that come with the repository
RUN_FILES = ("config.json", "metrics.jsonl", "initial_latents.safetensors", "done.json")
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
# The modules that a run's result depends on. (This one only files it.)
CODE = (
    "helpers.base.device",
    *(f"helpers.lora.{name}" for name in ("layer", "injection", "merging", "dora")),
    *(f"helpers.diffusion.{name}" for name in ("schedule", "components", "text", "pictures", "sampling")),
    *(f"helpers.data.{name}" for name in ("loading", "folders", "encodings", "recipes", "caches")),
    *(f"helpers.training.{name}" for name in ("draws", "steps", "loop", "validation", "checkpoints")),
)
REFERENCE_PIXELS = 128  # validation pictures of a reference run are stored at most this large


class TrainingError(RuntimeError):
    """Training cannot start or go on; the message says why, and what is left on the disk."""


class BusyError(TrainingError):
    """Another process is training this very run."""


def run_config(preset: Preset, dataset_name: str, parts: components.Components | None = None) -> dict:
    """Everything that the run's result depends on, as plain JSON. Two equal configurations give equal runs."""
    spec = preset.datasets[dataset_name]
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
            "code": provenance.code_hash(*CODE),
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
        """One dict a step: step (0 … steps - 1), epoch, loss, lr, grad_norm, mean_timestep. Skips a torn last line.

        A step that fp16 did not take, since its gradient overflowed, has grad_norm None and "skipped".
        """
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
        return min((step for step in losses if step > 0), key=lambda step: losses[step], default=None)

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
    return (runs or paths.runs_folder()) / preset.name / f"{dataset_name}-{key}"


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


def newest_run(preset: Preset, dataset_name: str) -> Run | None:
    """The finished run on a dataset of that name that ended last, whatever its settings; None when there is none."""
    folders = (paths.runs_folder() / preset.name).glob(f"{dataset_name}-*")
    # (one named my-cats is no run on my)
    done = [folder for folder in folders if folder.name.rpartition("-")[0] == dataset_name and is_finished(folder)]
    if not done:
        return None
    last = max(done, key=lambda folder: (folder / "done.json").stat().st_mtime)
    return Run(last, preset.name, dataset_name, last.name.rpartition("-")[2], "found in runs")


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
    with atomic_path(run.dir / "metrics.jsonl") as path:
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

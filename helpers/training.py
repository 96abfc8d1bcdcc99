"""The training loop: LoRA fine-tuning of a latent diffusion model, resumed, validated and filed.

The loop goes through the steps (see `helpers.steps`) in order. After some of them it writes a checkpoint, after some
it draws pictures; what a step computes depends on neither. So a run that was killed and resumed, or validated more
often, ends with the same bits as one that was not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from helpers import adapters, cards, lora, provenance
from helpers.components import Components, load_components, to_pictures, to_pil
from helpers.data import LatentCache, build_cache, load_pictures
from helpers.presets import Preset, TrainConfig, get_preset, runs_folder
from helpers.runs import (
    ADAPTER_FILE,
    Run,
    TrainingError,
    adapter_metadata,
    config_key,
    copy_run,
    digest,
    export_reference,
    find_run,
    load_last_checkpoint,
    new_folder,
    rewind,
    run_config,
    run_dir,
    run_key,
    save_checkpoint,
)
from helpers.sampling import initial_latents, sample
from helpers.steps import StepDraw, draw_step, held_out_loss, injected, steps_per_epoch, training_step
from helpers.tracking import Tracker

__all__ = ["Run", "StepDraw", "TrainingError", "draw_step", "export_reference", "held_out_loss", "replay",
           "resume_from", "run_key", "train", "training_step"]  # fmt: skip


# --- validation --------------------------------------------------------------------------------------------------


def validation_steps(config: TrainConfig, rows: int) -> list[int]:
    """Before the first step, after every `validation_epochs` epochs, and after the last step."""
    every = config.validation_epochs * steps_per_epoch(config, rows)
    return [*range(0, config.steps, every), config.steps]


@dataclass
class Loop:
    """What the loop holds while it runs: the model, the data, the settings and the run's directory."""

    run: Run
    preset: Preset
    components: Components
    cache: LatentCache
    held_out: LatentCache | None

    @property
    def config(self) -> TrainConfig:
        return self.preset.train

    @property
    def prompts(self) -> list[str]:
        return list(self.preset.validation_prompts.get(self.run.dataset, ()))

    @property
    def epoch_steps(self) -> int:
        return steps_per_epoch(self.config, len(self.cache.mean))

    def step(self, optimizer: torch.optim.Optimizer, step: int) -> dict:
        """Draw step `step`, train on it, and return its line of metrics.jsonl."""
        alphas_cumprod = self.components.noise_scheduler.alphas_cumprod.to(self.components.device)
        draw = draw_step(self.config, self.cache, step, len(alphas_cumprod))
        kind = self.components.prediction_type
        metrics = training_step(self.components.unet, optimizer, draw, alphas_cumprod, kind, self.config, step)
        return {"step": step, "epoch": step // self.epoch_steps, **metrics}


def starting_latents(loop: Loop) -> Tensor:
    """The latents that every validation of the run starts from, saved at the first call. float32 [prompts, C, h, w]"""
    path = loop.run.dir / "initial_latents.safetensors"
    if not path.exists():
        seeds = [1000 * loop.config.seed + i for i in range(len(loop.prompts))]
        with provenance.atomic_path(path) as writing:
            save_file({"latents": initial_latents(loop.components, seeds).float().cpu().contiguous()}, writing)
    return load_file(path)["latents"].to(loop.components.device)


@torch.no_grad()
def validate(loop: Loop, step: int, tracker: Tracker) -> None:
    """Pictures of the validation prompts, their latents and the held-out loss after `step` updates, to the disk."""
    components, preset = loop.components, loop.preset
    components.unet.eval()
    metrics = {"step": step, "epoch": step // loop.epoch_steps}
    if loop.held_out is not None:
        metrics["held_out_loss"] = held_out_loss(components, loop.held_out, loop.config.seed)
    with new_folder(loop.run.validation_dir(step)) as folder:
        pictures = []
        if loop.prompts:
            latents = sample(
                components,
                loop.prompts,
                starting_latents(loop),
                num_inference_steps=preset.num_inference_steps,
                guidance_scale=preset.guidance_scale,
            )
            save_file({"latents": latents.float().cpu().contiguous()}, folder / "latents.safetensors")
            pictures = to_pil(to_pictures(components, latents))
        for i, picture in enumerate(pictures):
            picture.save(folder / f"{i:03d}.png")
        provenance.write_json_atomic(folder / "metrics.json", metrics)
    tracker.log({key: value for key, value in metrics.items() if key != "step"}, step)
    tracker.log_pictures(pictures, loop.prompts, step)


# --- the loop ----------------------------------------------------------------------------------------------------


def run_loop(
    loop: Loop,
    optimizer: torch.optim.Optimizer,
    tracker: Tracker,
    progress: bool,
    on_log: Callable[[int, dict], None] | None,
) -> float:
    """Train from the run's last checkpoint to the end; returns the seconds spent, earlier processes' included."""
    run, config, unet = loop.run, loop.config, loop.components.unet
    state = load_last_checkpoint(run, unet, optimizer)
    start, began = state["step"], time.monotonic() - state["seconds"]
    rewind(run, start)
    validations = set(validation_steps(config, len(loop.cache.mean)))

    bar = tqdm(total=config.steps, initial=start, desc=run.dataset, unit="step", disable=not progress)
    with bar, (run.dir / "metrics.jsonl").open("a", buffering=1, encoding="utf-8") as log:
        for step in range(start, config.steps + 1):
            last = step == config.steps
            if step > start and (last or step % config.checkpoint_every == 0):
                save_checkpoint(run, step, unet, optimizer, time.monotonic() - began, config.keep_checkpoints)
            if step in validations and not (run.validation_dir(step) / "metrics.json").exists():
                validate(loop, step, tracker)
            if last:
                break
            metrics = loop.step(optimizer, step)
            tracker.log({key: value for key, value in metrics.items() if key != "step"}, step)
            if note := tracker.take_note():
                metrics["note"] = note
            log.write(json.dumps(metrics) + "\n")
            bar.update()
            if on_log is not None:
                on_log(step, metrics)
    return time.monotonic() - began


def finish(loop: Loop, seconds: float) -> None:
    """Write the adapter, then done.json: only a run that has both is finished."""
    run, unet = loop.run, loop.components.unet
    with new_folder(run.dir / "adapter") as folder:
        adapters.save_adapter(folder / ADAPTER_FILE, unet, adapter_metadata(run, loop.config.steps))
        cards.write_card(folder / ADAPTER_FILE)
    hashes = dict(run.config["hashes"], adapter=provenance.tensor_hash(load_file(run.adapter)))
    if loop.prompts:
        hashes["initial_latents"] = provenance.tensor_hash({"latents": run.initial_latents()})
    losses = [line["loss"] for line in run.metrics()]
    recent = losses[-min(100, len(losses)) :]
    done = {
        "preset": run.preset,
        "dataset": run.dataset,
        "key": run.key,
        "model": loop.components.title,
        "steps": loop.config.steps,
        "lora_parameters": sum(p.numel() for p in lora.lora_parameters(unet)),
        "losses": {"first": losses[0], "last": losses[-1], "mean_of_last_100": sum(recent) / len(recent)},
        "held_out_losses": {m["step"]: m["held_out_loss"] for m in run.validation_metrics() if "held_out_loss" in m},
        "hashes": hashes,
        "versions": provenance.versions(),
        "seconds": round(seconds, 1),
    }
    provenance.write_json_atomic(run.dir / "done.json", done)


def load_caches(
    preset: Preset, dataset_name: str, components: Components, hashes: dict[str, str]
) -> tuple[LatentCache, LatentCache | None]:
    """Latents and caption embeddings of the training rows, and of the held-out rows if the preset measures them."""
    spec, wanted = preset.datasets[dataset_name], preset.train.held_out_eval
    folder = runs_folder() / "cache"

    def key(split: str, rows: int) -> str:  # it changes with whatever the numbers depend on
        return digest([hashes, preset.resolution, preset.dtype, spec.name, split, rows])

    train_set = load_pictures(spec, "train", preset.resolution)
    cache = build_cache(components, train_set, folder, key("train", len(train_set)))
    if not spec.held_out_rows or not wanted:
        return cache, None
    held_out = load_pictures(spec, "held_out", preset.resolution)
    held_out = held_out.select(range(min(wanted, len(held_out))))
    if not len(held_out):  # a dataset with fewer rows than the preset thought
        return cache, None
    return cache, build_cache(components, held_out, folder, key("held_out", len(held_out)))


def prepare(run: Run, preset: Preset, components: Components | None, device: str | None) -> Loop:
    """Load model and data for a run. Raises TrainingError when the model is not what the preset says."""
    hashes = run_config(preset, run.dataset, components)["hashes"]
    components = components or load_components(preset, device)
    if components.prediction_type != preset.prediction_type:
        raise TrainingError(
            f"{components.name} predicts {components.prediction_type}, the preset {preset.name!r} says "
            f"{preset.prediction_type}: it would learn nonsense"
        )
    cache, held_out = load_caches(preset, run.dataset, components, hashes)
    return Loop(run, preset, components, cache, held_out)


def train(
    preset: Preset,
    dataset_name: str,
    from_scratch: bool = False,
    force: bool = False,
    progress: bool = True,
    tracker: str | None = None,
    device: str | None = None,
    on_log: Callable[[int, dict], None] | None = None,
    components: Components | None = None,
) -> Run:
    """The finished run of this preset on this dataset: found, or trained now.

    A finished run in the runs folder is returned as it is; then a reference run of the repository, unless
    `from_scratch`; otherwise the run is trained, from its last checkpoint if an earlier process was stopped.
    `force` throws an existing run away and trains anew. `on_log(step, metrics)` is called after each step.
    tracker: None or "wandb". device: "cuda", "mps", "cpu", or None for the best there is.
    components: another base model than the preset's own; the hash of its weights then enters the key.

    Raises ValueError for an unknown dataset or tracker, ComponentsError or DataError when model or pictures are
    missing, TrainingError when the loss is not a number (the last checkpoint stays).
    """
    config = run_config(preset, dataset_name, components)
    key = config_key(config)
    if not force and (found := find_run(preset, dataset_name, key, from_scratch)):
        return found
    run = Run(run_dir(preset, dataset_name, key), preset.name, dataset_name, key)
    if force:
        shutil.rmtree(run.dir, ignore_errors=True)
    loop = prepare(run, preset, components, device)
    run.dir.mkdir(parents=True, exist_ok=True)
    about = {"preset": preset.name, "model": loop.components.title, "dataset_name": dataset_name, "key": key}
    provenance.write_json_atomic(run.dir / "config.json", {**about, **config})
    train_loop(loop, tracker, progress, on_log)
    return run


def train_loop(
    loop: Loop, tracker_name: str | None, progress: bool, on_log: Callable[[int, dict], None] | None
) -> None:
    """The whole loop, from injection to done.json, with its tracker closed and the base model restored at the end."""
    run = loop.run
    tracker = Tracker(tracker_name, run.dir, run.dir.name, run.config)
    try:
        with injected(loop.components.unet, loop.config) as optimizer:
            seconds = run_loop(loop, optimizer, tracker, progress, on_log)
            finish(loop, seconds)
    finally:
        tracker.finish()


def resume_from(
    run: Run,
    target: Path,
    preset: Preset | None = None,
    components: Components | None = None,
    device: str | None = None,
    progress: bool = False,
) -> Run:
    """Train a copy of a run from its last checkpoint before the end to the end, in the new folder `target`.

    It shows that a finished run is what its settings give: compare the adapters. Raises TrainingError when the run
    has no such checkpoint.
    """
    preset = preset or get_preset(run.preset)
    earlier = [step for step in run.checkpoints() if step < preset.train.steps]
    if not earlier:
        raise TrainingError(f"the run {run.dir.name} has no checkpoint before step {preset.train.steps}")
    copy_run(run, Path(target), earlier[-1])
    again = Run(Path(target), run.preset, run.dataset, run.key)
    train_loop(prepare(again, preset, components, device), None, progress, None)
    return again


def replay(
    run: Run,
    steps: int = 50,
    preset: Preset | None = None,
    components: Components | None = None,
    device: str | None = None,
) -> list[dict]:
    """Train the first `steps` steps of a run again, and return their metrics. Nothing is written but caches."""
    loop = prepare(run, preset or get_preset(run.preset), components, device)
    with injected(loop.components.unet, loop.config) as optimizer:
        return [loop.step(optimizer, step) for step in range(steps)]


def main(arguments: list[str] | None = None) -> int:
    """`python -m helpers.training --preset mini --dataset doodles`. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Train a LoRA on a dataset of a preset, or find the finished run.")
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--dataset", action="append", help="may be repeated; all datasets of the preset by default")
    parser.add_argument("--from-scratch", action="store_true", help="do not take the repository's reference run")
    parser.add_argument("--force", action="store_true", help="throw an existing run away")
    parser.add_argument("--tracker", choices=["wandb"])
    parser.add_argument("--device")
    parser.add_argument("--export-reference", action="store_true", help="keep the finished run in the repository")
    given = parser.parse_args(arguments)
    try:
        preset = get_preset(given.preset)
        for name in given.dataset or preset.datasets.names:
            run = train(preset, name, given.from_scratch, given.force, tracker=given.tracker, device=given.device)
            print(f"{run.source}: {run.dir}")
            if given.export_reference and run.source != "reference":
                print(f"reference: {export_reference(run)}")
    except (ValueError, TrainingError) as error:  # ComponentsError and DataError are ValueErrors
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

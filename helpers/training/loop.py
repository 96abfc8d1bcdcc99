"""The training loop: LoRA fine-tuning of a latent diffusion model, resumed, validated and filed.

The loop goes through the steps (see `helpers.training.steps`) in order. After some of them it draws pictures, after
some it writes a checkpoint; what a step computes depends on neither. So a run that was killed and resumed, or validated
more often, ends with the same bits as one that was not.

Several processes, on one machine or more, train one run when torchrun starts them: each computes a share of every
batch, and the first of them writes. Nothing here knows how many there are but `accelerator`.
"""

from __future__ import annotations

import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import lora
from helpers.adapters import cards
from helpers.adapters import writing as adapters
from helpers.base import provenance
from helpers.base.files import atomic_path, new_folder, write_json_atomic
from helpers.base.paths import runs_folder
from helpers.base.provenance import digest
from helpers.data import caches
from helpers.data import loading as data
from helpers.data.caches import LatentCache, build_cache
from helpers.diffusion.components import Components, load_components
from helpers.diffusion.pictures import to_pictures, to_pil
from helpers.diffusion.sampling import sample
from helpers.presets.configuration import Preset, TrainConfig
from helpers.presets.variants import get_preset
from helpers.training.checkpoints import keep_checkpoints, load_last_checkpoint, read_checkpoint, save_checkpoint
from helpers.training.draws import draw_step, steps_per_epoch
from helpers.training.guards import check_latents, check_model, check_same_run, disk_errors, locked, memory_errors
from helpers.training.progress import Progress
from helpers.training.runs import (
    ADAPTER_FILE,
    Run,
    TrainingError,
    adapter_metadata,
    config_key,
    copy_run,
    find_run,
    rewind,
    run_config,
    run_dir,
)
from helpers.training.steps import (
    averaged,
    injected,
    new_accelerator,
    trained_parts,
    training_step,
    update_average,
)
from helpers.training.tracking import Tracker
from helpers.training.validation import held_out_loss, validation_latents, validation_pairs, validation_steps

OnLog = Callable[[int, dict], None]


@dataclass
class Loop:
    """What the loop holds while it runs: the run's directory, the model, the data, and the processes."""

    run: Run
    preset: Preset
    components: Components
    cache: LatentCache
    held_out: LatentCache | None
    accelerator: Accelerator

    @property
    def config(self) -> TrainConfig:
        """The training settings of the preset."""
        return self.preset.train

    @property
    def writes(self) -> bool:
        """Whether this process is the one that validates and writes."""
        return self.accelerator.is_main_process

    @property
    def prompts(self) -> list[str]:
        """The prompts that validations draw."""
        return list(self.preset.validation_prompts.get(self.run.dataset, ()))

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps in an epoch."""
        return steps_per_epoch(self.config, len(self.cache))

    @property
    def counts(self) -> dict[str, int]:
        """How many pictures and captions there are, and how many of them are empty or too long."""
        captions = [self.cache.captions[i] for i in self.cache.as_written.tolist()]
        return data.describe_captions(self.components, captions)

    def step(self, optimizer: torch.optim.Optimizer, step: int) -> dict:
        """Draw step `step`, train on it, and return its line of metrics.jsonl."""
        draw = draw_step(self.config, self.cache, step, len(self.components.noise_scheduler.alphas_cumprod))
        metrics = training_step(self.components, optimizer, draw, self.config, step, self.accelerator)
        if self.config.ema_decay:
            update_average(optimizer, self.config.ema_decay, step)
        line = {"step": step, "epoch": step // self.epoch_steps, **metrics}
        # fp16: the gradient overflowed, so the scaler took no step; JSON has no infinity
        return line if math.isfinite(metrics["grad_norm"]) else line | {"grad_norm": None, "skipped": True}


# --- validation --------------------------------------------------------------------------------------------------
def starting_latents(loop: Loop) -> Tensor:
    """The latents that every validation of the run starts from, saved at the first call. float32 [pictures, C, h, w]"""
    path = loop.run.dir / "initial_latents.safetensors"
    if not path.exists():
        with atomic_path(path) as writing:
            save_file({"latents": validation_latents(loop.components, loop.config, loop.prompts)}, writing)
    return load_file(path)["latents"].to(loop.components.device)


@torch.no_grad()
def validate(loop: Loop, step: int, tracker: Tracker) -> None:
    """Pictures of the validation prompts, their latents and the held-out loss after `step` updates, to the disk."""
    components, preset = loop.components, loop.preset
    for part in trained_parts(components, loop.config).values():
        part.eval()
    metrics: dict[str, float] = {"step": step, "epoch": step // loop.epoch_steps}
    if loop.held_out is not None:
        metrics["held_out_loss"] = held_out_loss(components, loop.held_out, loop.config.seed)
    prompts = [prompt for prompt, _ in validation_pairs(loop.config, loop.prompts)]
    with new_folder(loop.run.validation_dir(step)) as folder:
        pictures = []
        if prompts:
            settings = {name: getattr(preset, name) for name in ("num_inference_steps", "guidance_scale")}
            latents = sample(components, prompts, starting_latents(loop), **settings)
            save_file({"latents": latents.float().cpu().contiguous()}, folder / "latents.safetensors")
            pictures = to_pil(to_pictures(components, latents))
        for i, picture in enumerate(pictures):
            picture.save(folder / f"{i:03d}.png")
        write_json_atomic(folder / "metrics.json", metrics)
    tracker.log({key: value for key, value in metrics.items() if key != "step"}, step)
    tracker.log_pictures(pictures, prompts, step)


# --- the loop ----------------------------------------------------------------------------------------------------
def train_loop(loop: Loop, optimizer: torch.optim.Optimizer, tracker: Tracker, progress: Progress) -> float:
    """Train from the run's last checkpoint to the end; returns the seconds spent, earlier processes' included."""
    run, config, scaler = loop.run, loop.config, loop.accelerator.scaler
    parts = trained_parts(loop.components, config)
    state = load_last_checkpoint(run, parts, optimizer, scaler)
    loop.accelerator.wait_for_everyone()  # until all have read what the next line may delete
    if loop.writes:
        rewind(run, state["step"])
        keep_checkpoints(run, config)
    began = time.monotonic() - state["seconds"]
    validations = set(validation_steps(config, len(loop.cache)))

    with training_forward(loop) as forward, progress.started(state["step"]):
        for step in range(state["step"], config.steps + 1):
            last, validated = step == config.steps, step in validations
            if loop.writes and validated and not (run.validation_dir(step) / "metrics.json").exists():
                with loop.accelerator.autocast(), averaged(optimizer):
                    validate(loop, step, tracker)
            due = last or step % config.checkpoint_every == 0 or (validated and step == run.best_step())
            if loop.writes and due and step > state["step"]:
                save_checkpoint(run, step, parts, optimizer, time.monotonic() - began, scaler)
                keep_checkpoints(run, config)
            if not last:
                step_began = time.monotonic()
                metrics = forward.step(optimizer, step)
                progress.log(step, metrics, time.monotonic() - step_began)
    return time.monotonic() - began


@contextmanager
def training_forward(loop: Loop) -> Iterator[Loop]:
    """The loop with its U-Net through torch.compile if the settings say so; validation keeps the plain one."""
    if not loop.config.compile:
        yield loop
        return
    try:
        yield replace(loop, components=replace(loop.components, unet=torch.compile(loop.components.unet)))
    finally:
        torch.compiler.reset()


def finish(loop: Loop, seconds: float) -> None:
    """Write the adapter, then done.json: only a run that has both is finished."""
    run, parts = loop.run, trained_parts(loop.components, loop.config)
    with new_folder(run.dir / "adapter") as folder:
        metadata = adapter_metadata(run, loop.config.steps)
        adapters.save_adapter(folder / ADAPTER_FILE, parts.get("unet"), metadata, parts.get("text_encoder"))
        cards.write_card(folder / ADAPTER_FILE)
    hashes = dict(run.config["hashes"], adapter=provenance.tensor_hash(load_file(run.adapter)))
    if loop.prompts:
        hashes["initial_latents"] = provenance.tensor_hash({"latents": run.initial_latents()})
    lines = run.metrics()
    losses = [line["loss"] for line in lines]
    recent = losses[-min(100, len(losses)) :]
    done = {
        "preset": run.preset,
        "dataset": run.dataset,
        "key": run.key,
        "model": loop.components.title,
        "steps": loop.config.steps,
        "skipped_steps": sum("skipped" in line for line in lines),
        "pictures": loop.counts,
        "lora_parameters": sum(p.numel() for part in parts.values() for p in lora.lora_parameters(part)),
        "losses": {"first": losses[0], "last": losses[-1], "mean_of_last_100": sum(recent) / len(recent)},
        "held_out_losses": {m["step"]: m["held_out_loss"] for m in run.validation_metrics() if "held_out_loss" in m},
        "best_step": run.best_step(),
        "hashes": hashes,
        "versions": provenance.versions(),
        "seconds": round(seconds, 1),
    }
    write_json_atomic(run.dir / "done.json", done)


# --- before and after it -----------------------------------------------------------------------------------------
def load_caches(
    preset: Preset, dataset_name: str, components: Components, hashes: dict[str, str]
) -> tuple[LatentCache, LatentCache | None]:
    """Latents and caption embeddings of the training rows, and of the held-out rows if the preset measures them."""
    spec, wanted = preset.datasets[dataset_name], preset.train.held_out_eval
    folder = runs_folder() / "cache"
    code = provenance.code_hash(*caches.CODE)

    def key(split: str, rows: int, orders: int = 1) -> str:  # it changes with whatever the numbers depend on
        parts = hashes["weights"], hashes["data"], code, preset.resolution, preset.dtype, spec.name
        return digest([*parts, split, rows, orders])

    train_set, orders = data.load_pictures(spec, "train", preset.resolution), preset.train.caption_orders
    cache = build_cache(components, train_set, folder, key("train", len(train_set), orders), orders)
    if not spec.held_out_rows or not wanted:
        return cache, None
    held_out = data.load_pictures(spec, "held_out", preset.resolution)
    held_out = held_out.select(range(min(wanted, len(held_out))))
    if not len(held_out):  # a dataset with fewer rows than the preset thought
        return cache, None
    return cache, build_cache(components, held_out, folder, key("held_out", len(held_out)))


def prepare(run: Run, preset: Preset, components: Components | None, device: str | None) -> Loop:
    """Load model and data for a run. Raises TrainingError when the model is not what the preset says."""
    hashes = run_config(preset, run.dataset, components)["hashes"]
    accelerator = new_accelerator(preset.train, components.device if components else device)
    with memory_errors(preset):
        components = components or load_components(preset, device or accelerator.device)
    check_model(components, preset)
    with memory_errors(preset), accelerator.main_process_first():  # the first computes what the others then find
        cache, held_out = load_caches(preset, run.dataset, components, hashes)
    check_latents(components, cache)
    return Loop(run, preset, components, cache, held_out, accelerator)


def train(
    preset: Preset,
    dataset_name: str,
    from_scratch: bool = False,
    force: bool = False,
    progress: bool = True,
    tracker: str | Sequence[str] | None = None,
    device: str | None = None,
    on_log: OnLog | None = None,
    components: Components | None = None,
) -> Run:
    """The finished run of this preset on this dataset: found, or trained now.

    A finished run in the runs folder is returned as it is; then a reference run of the repository, unless
    `from_scratch`; otherwise the run is trained, from its last checkpoint if an earlier process was stopped.
    `force` throws an existing run away and trains anew. `on_log(step, metrics)` is called after each step.
    tracker: None, "wandb", "tensorboard" or several. device: "cuda", "mps", "cpu", or None for the best there is.
    components: another base model than the preset's own; the hash of its weights then enters the key.

    Raises ValueError for an unknown dataset or tracker, ComponentsError or DataError when model or pictures are
    missing, TrainingError when the loss is not a number, the disk is full, or another process trains the same run
    (the last checkpoint stays).
    """
    config = run_config(preset, dataset_name, components)
    key = config_key(config)
    if not force and (found := find_run(preset, dataset_name, key, from_scratch)):
        return found
    run = Run(run_dir(preset, dataset_name, key), preset.name, dataset_name, key)
    loop = prepare(run, preset, components, device)
    with locked(run) if loop.writes else nullcontext(), disk_errors(run), memory_errors(preset):
        if loop.writes:
            if force:
                shutil.rmtree(run.dir, ignore_errors=True)
            about = {"preset": preset.name, "model": loop.components.title, "dataset_name": dataset_name, "key": key}
            write_json_atomic(run.dir / "config.json", {**about, **config})
        loop.accelerator.wait_for_everyone()
        train_and_file(loop, tracker, progress, on_log)
    return run


def train_and_file(loop: Loop, tracker: str | Sequence[str] | None, progress: bool, on_log: OnLog | None) -> None:
    """From injection to done.json, with the trackers closed and the base model restored at the end."""
    tracked = Tracker(tracker if loop.writes else None, loop.run.dir, loop.run.dir.name, loop.run.config)
    counts = loop.counts
    if loop.writes and progress and (counts["empty_captions"] or counts["cut_captions"]):
        print(f"{loop.run.dataset}: {data.caption_sentence(counts)}")
    shown = Progress(loop.run, loop.config, loop.components.device, loop.writes, tracked, progress, on_log)
    try:
        with injected(loop.components, loop.config, loop.accelerator) as optimizer:
            seconds = train_loop(loop, optimizer, tracked, shown)
            if loop.writes:
                with averaged(optimizer):
                    finish(loop, seconds)
            loop.accelerator.wait_for_everyone()
    finally:
        tracked.finish()
        if note := tracked.take_note():  # of the last validation, or of closing: no step is left to note it
            warnings.warn(note, stacklevel=2)


def resume_from(
    run: Run,
    target: Path,
    preset: Preset | None = None,
    components: Components | None = None,
    device: str | None = None,
    progress: bool = False,
    step: int | None = None,
) -> Run:
    """Train a copy of a run from one of its checkpoints to the end, in the new folder `target`.

    step: which checkpoint; by default the last one before the end. preset: the run's own, where it was trained with
    other settings than the preset of its name has. It shows that a finished run is what its settings give: compare the
    adapters. Raises TrainingError when the run has no such checkpoint, when that is damaged, or when base model,
    dataset or settings are not the run's.
    """
    preset = preset or get_preset(run.preset)
    earlier = [known for known in run.checkpoints() if known < preset.train.steps]
    if not earlier or step not in (None, *earlier):
        wanted = f"before step {preset.train.steps}" if step is None else f"of step {step}; known: {earlier}"
        raise TrainingError(f"the run {run.dir.name} has no checkpoint {wanted}")
    step = earlier[-1] if step is None else step
    try:
        read_checkpoint(run, step)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise TrainingError(f"the checkpoint of step {step} of {run.dir.name} is damaged: {error}") from error
    check_same_run(run, run_config(preset, run.dataset, components))
    again = Run(Path(target), run.preset, run.dataset, run.key)
    loop = prepare(again, preset, components, device)
    with locked(again), disk_errors(again):
        copy_run(run, again.dir, step)
        train_and_file(loop, None, progress, None)
    return again


def replay(
    run: Run,
    steps: int = 50,
    preset: Preset | None = None,
    components: Components | None = None,
    device: str | None = None,
) -> list[dict]:
    """Train the first `steps` steps of a run again, and return their metrics. Nothing is written but caches.

    preset: as for `resume_from`. Raises TrainingError when base model, dataset or settings are not the run's.
    """
    preset = preset or get_preset(run.preset)
    check_same_run(run, run_config(preset, run.dataset, components))
    loop = prepare(run, preset, components, device)
    with injected(loop.components, loop.config, loop.accelerator) as optimizer:
        return [loop.step(optimizer, step) for step in range(steps)]

"""Checks before the first step: mistakes that raise nothing by themselves and spoil a run from its beginning."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from helpers.base import paths
from helpers.base.errors import is_out_of_memory
from helpers.data.caches import LatentCache
from helpers.diffusion.components import Components
from helpers.presets import machine
from helpers.presets.configuration import Preset
from helpers.training.runs import BusyError, Run, TrainingError

LATENT_SIZE = (0.25, 4.0)  # root mean square of latents that are scaled as the U-Net knows them


def check_model(components: Components, preset: Preset) -> None:
    """Raises TrainingError when the model predicts something else than the preset says, or pads captions wrongly."""
    if components.prediction_type != preset.prediction_type:
        raise TrainingError(
            f"{components.name} predicts {components.prediction_type}, the preset {preset.name!r} says "
            f"{preset.prediction_type}: it would learn nonsense"
        )
    tokenizer, encoder = components.tokenizer, components.text_encoder
    # Stable Diffusion 2 (text encoder 1024 wide) was trained with token 0 after the caption's end
    if encoder.config.hidden_size == 1024 and tokenizer.pad_token_id != 0:
        raise TrainingError(
            f"{components.name} pads captions with token {tokenizer.pad_token_id}, Stable Diffusion 2 was trained with "
            "token 0 there: every caption would mean something else to it"
        )
    if len(tokenizer) > encoder.config.vocab_size:
        raise TrainingError(
            f"the tokenizer of {components.name} knows {len(tokenizer)} tokens, its text encoder "
            f"{encoder.config.vocab_size}: they do not belong together"
        )


def check_latents(components: Components, cache: LatentCache) -> None:
    """Raises TrainingError when latents are far from size 1, as without, or with twice, the VAE's scaling factor."""
    some = cache.mean[:256].float()
    size = some.square().mean().sqrt().item()
    if not LATENT_SIZE[0] <= size <= LATENT_SIZE[1]:
        raise TrainingError(
            f"the latents of the dataset have the root mean square {size:.3g}, where the U-Net of {components.name} "
            f"expects about 1: is the VAE's scaling factor {components.vae.config.scaling_factor} the right one?"
        )


def check_same_run(run: Run, config: dict) -> None:
    """Raises TrainingError unless base model, pictures and settings are those that the run was trained with.

    config: of the run that is about to be trained, see `run_config`.
    """
    then = run.config
    for name, what in {"weights": "base model", "data": "dataset"}.items():
        if then["hashes"][name] != config["hashes"][name]:
            raise TrainingError(f"the {what} is not the one that the run {run.dir.name} was trained with")
    # a setting that is newer than the run has its default, which changes nothing
    other = [name for name, value in config["train"].items() if then["train"].get(name, value) != value]
    if other:
        raise TrainingError(f"the run {run.dir.name} was trained with other settings: {', '.join(other)}")


@contextmanager
def locked(run: Run) -> Iterator[None]:
    """Keep other processes from training the same run; the system frees the lock however this process ends."""
    name = hashlib.sha256(str(run.dir.resolve()).encode()).hexdigest()[:12]
    path = paths.runs_folder() / "locks" / f"{run.dir.name}-{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=0):
            yield
    except Timeout:
        raise BusyError(f"another process is training the run {run.dir.name}: wait for it, or stop it") from None


@contextmanager
def memory_errors(preset: Preset) -> Iterator[None]:
    """Out of memory, of whatever device, as one sentence that says which settings take less."""
    try:
        yield
    except RuntimeError as error:  # CUDA raises a kind of its own, an Apple GPU and a CPU this one
        if not is_out_of_memory(type(error).__name__, str(error)):
            raise
        raise TrainingError(machine.out_of_memory(preset.name)) from error


@contextmanager
def disk_errors(run: Run) -> Iterator[None]:
    """A full disk, or a folder that cannot be written to, as one sentence that says what is left."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        kept = run.checkpoints()
        left = f"the checkpoint after step {kept[-1]} is kept, and the same command goes on from there" if kept else ""
        raise TrainingError(f"cannot write to {run.dir}: {error}" + (f"; {left}" if left else "")) from error

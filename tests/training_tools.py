"""A tiny training run, and what several test files do with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers import lora
from helpers.data.caches import LatentCache
from helpers.presets.configuration import Datasets, DatasetSpec
from helpers.presets.variants import get_preset
from helpers.training.loop import train
from helpers.training.runs import Run

STEPS = 10


def write_pictures(folder):
    """13 captioned pictures of 16 pixels: 10 to train on, 3 held out."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    for i in range(13):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"a {'cat' if i % 2 else 'man'}")


def make_preset(folder, **settings):
    """10 steps of 4 of the 10 pictures: batches of 4, 4 and 2, a validation after each epoch."""
    defaults = dict(steps=STEPS, batch_size=4, rank=2, alpha=4.0, validation_epochs=1, checkpoint_every=2,
                    held_out_eval=3, num_inference_steps=2, resolution=16)  # fmt: skip
    return get_preset(
        "smoke",
        datasets=Datasets((DatasetSpec("own", f"folder:{folder}", train_rows=10, held_out_rows=3),)),
        validation_prompts={"own": ("a cat", "a man")},
        **{**defaults, **settings},
    )


def random_cache():
    """23 rows of random latents [C, 4, 4] of the tiny MiniSD, 5 captions."""
    from helpers.minisd.architecture import TINY

    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return LatentCache(
        mean=normal(23, TINY.latent_channels, 4, 4),
        std=normal(23, TINY.latent_channels, 4, 4).abs() * 0.1,
        caption_embeddings=normal(5, 24, 16),
        caption_ids=torch.arange(5 * 24).reshape(5, 24) % 50,
        caption_index=torch.arange(23) % 5,
        empty_embedding=normal(1, 24, 16),
        empty_ids=torch.zeros(1, 24, dtype=torch.int64),
    )


def quiet(preset, components, **settings) -> Run:
    return train(preset, "own", progress=False, components=components, **settings)


def weights(run: Run) -> dict:
    return {name: value.clone() for name, value in load_file(run.adapter).items()}


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def distance(a: dict, b: dict) -> float:
    """The Euclidean norm of the difference of all tensors."""
    assert a.keys() == b.keys()
    return torch.sqrt(sum((a[k].double() - b[k].double()).square().sum() for k in a)).item()


class Stop(Exception):
    """Stands for a process that ends in the middle."""


def stop_at(step):
    def on_log(at, metrics):
        if at == step:
            raise Stop

    return on_log


def stopped_and_resumed(preset, components, at) -> tuple[Run, list[int]]:
    """A run that was stopped in step `at` and went on, and the steps that it took after that."""
    with pytest.raises(Stop):
        quiet(preset, components, force=True, on_log=stop_at(at))
    assert not lora.lora_layers(components.unet) and not lora.lora_layers(components.text_encoder)
    steps = []
    return quiet(preset, components, on_log=lambda step, metrics: steps.append(step)), steps


def only_run(world) -> Run:
    """The one run in the runs folder, finished or not."""
    (folder,) = (world / "runs" / "smoke").iterdir()
    return Run(folder, "smoke", "own", folder.name.removeprefix("own-"))


def temporary_files(folder: Path) -> list[str]:
    """What is there under a name that nothing finished has."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob(".*"))


def same_run(resumed: Run, whole: Run) -> list[str]:
    """What differs between a resumed run and an undisturbed one: nothing, if resuming works."""
    different = []
    if not same_tensors(weights(resumed), weights(whole)):
        different.append("adapter")
    if resumed.metrics() != whole.metrics():
        different.append("metrics")
    last = whole.checkpoint_dir(whole.config["train"]["steps"]).relative_to(whole.dir)
    for file in (f"{last}/adapter.safetensors", f"{last}/optimizer.safetensors", "initial_latents.safetensors"):
        if not same_tensors(load_file(resumed.dir / file), load_file(whole.dir / file)):
            different.append(file)
    files = {path.relative_to(whole.dir).as_posix() for path in whole.dir.glob("validation/*/*")}
    if files != {path.relative_to(resumed.dir).as_posix() for path in resumed.dir.glob("validation/*/*")}:
        different.append("names in validation")
    different += [file for file in sorted(files) if not _same_bytes(resumed.dir / file, whole.dir / file)]
    for name in ("losses", "held_out_losses", "best_step", "hashes", "pictures"):
        if resumed.done[name] != whole.done[name]:
            different.append(f"{name} in done.json")
    return different + temporary_files(resumed.dir)


def _same_bytes(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.read_bytes() == b.read_bytes()

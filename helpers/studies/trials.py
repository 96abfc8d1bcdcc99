"""One trial of a study: train one point with one seed, then draw, judge and compare, after each measured step.

Every adapter of a study draws the same prompts from the same noise and is judged by the same two judges: the drawn
world's classifier, and a probe on EfficientNet-Lite0, which has never seen that world. What is kept is a value for
each prompt, so that intervals can be taken later (`helpers.studies.effects`).
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.base import provenance
from helpers.base.files import atomic_path
from helpers.base.paths import runs_folder
from helpers.base.provenance import digest
from helpers.data import caches
from helpers.data import loading as data
from helpers.data.caches import LatentCache, build_cache
from helpers.data.fingerprint import data_fingerprint
from helpers.diffusion.components import Components, load_components
from helpers.diffusion.sampling import generate
from helpers.diffusion.weights import weights_fingerprint
from helpers.evaluation.classifier import WEIGHTS, load_classifier
from helpers.evaluation.distances import copy_share, mmd, nearest
from helpers.evaluation.encoders import PictureEncoder, WorldEncoder
from helpers.evaluation.imagenet import ImageNetEncoder
from helpers.evaluation.measures import (
    Evaluation,
    Verdict,
    adapted,
    content_shares,
    evaluate,
    evaluation_scenes,
    judge,
    random_adapter,
)
from helpers.evaluation.probe import load_probe
from helpers.presets.configuration import DatasetSpec, Preset
from helpers.presets.variants import get_preset
from helpers.studies.questions import Point, Study
from helpers.training.full import full_fine_tuning
from helpers.training.loop import train
from helpers.training.runs import BusyError, Run
from helpers.training.validation import loss_by_timestep
from helpers.world.captions import ENDINGS, LEADS, prompt
from helpers.world.scenes import SUBJECTS
from helpers.world.styles import render

# As in notebook 07: fewer steps than the figures take
SAMPLING: dict[str, Any] = {"num_inference_steps": 12, "guidance_scale": 4.0}
UNPROMPTED = ("headwear", "eyewear", "neckwear", "background", "expression")
DIGITS = 4  # of the values kept
WAIT = 5.0  # seconds between two looks whether another worker is done
FLOOR_ROWS = 200  # real held-out pictures that a style distance is taken to


@dataclass(frozen=True)
class Judges:
    """Two classifiers, and two encoders on the same networks, by the names under which values are kept."""

    classifiers: dict[str, torch.nn.Module]
    encoders: dict[str, PictureEncoder]

    @classmethod
    def load(cls, style: str) -> Judges:
        """Those for pictures of a style."""
        classifier, probe = load_classifier(), load_probe()
        encoders: dict[str, PictureEncoder] = {"world": WorldEncoder(style, classifier), "imagenet": ImageNetEncoder()}
        return cls({"world": classifier, "imagenet": probe}, encoders)


@lru_cache(maxsize=1)
def model() -> Components:
    """MiniSD, loaded once a process; adapters go in and out of it."""
    return load_components(get_preset("mini"))


@lru_cache(maxsize=4)
def judges(style: str) -> Judges:
    """The judges for a style, loaded once a process."""
    return Judges.load(style)


# --- one trial ----------------------------------------------------------------------------------------------------
def run_trial(study: Study, point: Point, seed: int) -> dict[str, Any]:
    """Train and measure one point with one seed: {"measures": {step: …}, "run", "trained", "bytes", "adapter", …}.

    trained: how many numbers; bytes: of the file; adapter: how its hash begins; device: that it was trained on.
    A finished run whose checkpoints are gone is trained again if they are needed.

    A control trains nothing of its own ("random" takes its norm from the centre's adapter of the same seed, "other" is
    the centre's settings on another style) and is measured once, as of the last step.
    """
    if control := point.settings.get("control"):
        return {"measures": {str(study.steps): measure_control(study, control, seed)}}
    preset, spec = study.preset(point, seed)
    if point.settings.get("method") == "full":
        return full_trial(study, preset, spec)
    fill_caches(study, spec, preset)
    run = trained(preset, spec.name)
    if not all(adapter_after(run, step).exists() for step in study.measured_at):
        run = trained(preset, spec.name, force=True)
    measured = {}
    for step in study.measured_at:
        with adapted(model(), adapter_after(run, step)):
            measured[str(step)] = measure(study, spec, preset)
    shutil.rmtree(run.dir / "checkpoints", ignore_errors=True)  # a study has many runs, and each has some MB of these
    size = run.adapter.stat().st_size
    return {
        "measures": measured,
        "run": run.dir.name,
        "trained": run.done["lora_parameters"],
        "bytes": size,
        "adapter": run.hashes["adapter"][:16],
        "device": "{device}, torch {torch}".format_map(run.done["versions"]),
    }


def trained(preset: Preset, dataset: str, force: bool = False) -> Run:
    """`train`; while another worker trains that run, which studies share and controls ask for, wait for it."""
    while True:
        try:
            return train(preset, dataset, progress=False, force=force)
        except BusyError:
            time.sleep(WAIT)


def adapter_after(run: Run, step: int) -> Path:
    """Where the adapter's file as of a measured step is, or would be if its checkpoint were still there."""
    if step == run.config["train"]["steps"]:
        return run.adapter
    return run.checkpoint_dir(step) / "adapter.safetensors"


def full_trial(study: Study, preset: Preset, spec: DatasetSpec) -> dict[str, Any]:
    """The same with every weight of the U-Net trained instead of an adapter. Nothing of it is kept but the measures."""
    fill_caches(study, spec, preset)
    components, measured = load_components(preset), {}
    count = sum(p.numel() for p in components.unet.parameters())
    cache = latents(components, preset, spec, "train", spec.train_rows)
    for step in full_fine_tuning(components, cache, preset.train):
        if step in study.measured_at:
            measured[str(step)] = measure(study, spec, preset, components)
    return {"measures": measured, "trained": count, "bytes": 4 * count}


@contextmanager
def control_of(study: Study, control: str, seed: int) -> Iterator[None]:
    """Within the block the model is that control."""
    other = "vintage" if study.style == "doodles" else "doodles"
    path = None
    if control in ("random", "other"):
        preset, spec = study.preset(study.points[0], seed, other if control == "other" else None)
        path = trained(preset, spec.name).adapter
    with adapted(model(), path) as unet, random_adapter(unet, seed) if control == "random" else nullcontext():
        yield


def measure_control(study: Study, control: str, seed: int) -> dict[str, Any]:
    """What is measured of a control; "drawn" are the renderer's own pictures of the same scenes."""
    preset, spec = study.preset(study.points[0], seed)
    if control == "drawn":
        scenes = evaluation_scenes(study.prompts)
        pictures = [render(scene, study.style, preset.resolution) for scene in scenes]
        texts = [prompt(scene, study.style) for scene in scenes]
        return of_pictures(study, spec, preset, Evaluation(scenes, texts, pictures, judge(pictures)))
    fill_caches(study, spec, preset)
    with control_of(study, control, seed):
        return measure(study, spec, preset)


# --- what is measured ---------------------------------------------------------------------------------------------
def measure(study: Study, spec: DatasetSpec, preset: Preset, components: Components | None = None) -> dict[str, Any]:
    """All that a study keeps of the model as it is now: judged pictures, and losses on training and held-out rows."""
    components = components or model()
    done = evaluate(components, study.style, study.prompts, **SAMPLING)
    found = of_pictures(study, spec, preset, done) | losses(study, spec, preset, components)
    if study.unprompted:
        texts = bare_prompts(study.style, study.prompts)
        found["unprompted"] = counts(judge(generate(components, texts, range(len(texts)), **SAMPLING)))
    return found


def of_pictures(study: Study, spec: DatasetSpec, preset: Preset, done: Evaluation) -> dict[str, Any]:
    """For each judge: style probability and content share of every picture, style distance, and how many are copies.

    nearest: which picture is the most similar one to each, of all training pictures and then the held-out ones.
    """
    found: dict[str, Any] = {}
    for name, classifier in judges(study.style).classifiers.items():
        verdict = done.verdict if name == "world" else judge(done.pictures, classifier)
        content = content_shares(done.scenes, verdict, study.style)
        found[f"style.{name}"] = rounded(verdict.style_probability(study.style))
        found[f"content.{name}"] = rounded(content)
        if name == "world":
            found["attributes"] = {a: [round(m.value * m.n), m.n] for a, m in done.content(study.style).items()}
    for name, encoder in judges(study.style).encoders.items():
        features = encoder.pictures(done.pictures)
        held_out = references(encoder, spec, preset, "held_out", max(FLOOR_ROWS, spec.held_out_rows))
        found[f"distance.{name}"] = round(mmd(features, held_out[:FLOOR_ROWS]), DIGITS)
        if study.copies:
            train_rows = references(encoder, spec, preset, "train", spec.train_rows)
            others = held_out[: spec.train_rows]
            share = copy_share(features, train_rows, others)
            found[f"copies.{name}"] = [round(share.value * share.n), share.n]
            chosen = nearest(features, torch.cat([train_rows, others]))[0].tolist()
            found[f"nearest.{name}"] = {"chosen": chosen, "pool": len(train_rows) + len(others)}
    return found


def bare_prompts(style: str, count: int) -> list[str]:
    """Prompts in the style's words that name a subject and nothing else, all subjects in turn."""
    lead = "a portrait of" if style == "vintage" else next(iter(LEADS[style]))
    nouns = ["bat hero" if subject == "hero" else subject for subject in SUBJECTS]
    articles = ["an" if noun[0] in "aeiou" else "a" for noun in nouns]
    things = [f"{article} {noun}{ENDINGS.get(style, '')}" for article, noun in zip(articles, nouns, strict=True)]
    return [f"{lead} {things[k % len(things)]}" for k in range(count)]


def counts(verdict: Verdict) -> dict[str, dict[str, int]]:
    """How often the judge sees each value of the attributes that no prompt asked for."""
    return {attribute: dict(sorted(Counter(verdict.names[attribute]).items())) for attribute in UNPROMPTED}


def losses(study: Study, spec: DatasetSpec, preset: Preset, components: Components) -> dict[str, Any]:
    """Denoising loss by timestep, and of each picture, on as many training as held-out rows."""
    found = {}
    for split in ("train", "held_out"):
        rows = min(study.loss_rows, spec.train_rows)
        cache = latents(components, preset, spec, split, rows)
        loss = loss_by_timestep(components, cache)
        found[f"loss.{split}"] = rounded(loss.mean(1), 5)
        found[f"loss_by_timestep.{split}"] = rounded(loss.mean(0), 5)
    return found


def rounded(values: np.ndarray | Tensor, digits: int = DIGITS) -> list[float]:
    """The values as plain numbers with so many digits after the point."""
    return [round(float(value), digits) for value in values]


# --- what it is compared with, computed once -------------------------------------------------------------------------
def rows_of(spec: DatasetSpec, preset: Preset, split: str, count: int):
    """The first rows of a split of a drawn dataset, as many as asked for."""
    rows: dict[str, Any] = {"train_rows": count} if split == "train" else {"held_out_rows": count}
    return data.load_pictures(replace(spec, **rows), split, preset.resolution)


def fill_caches(study: Study, spec: DatasetSpec, preset: Preset) -> None:
    """Compute the latents and captions that `losses` compares with, while the model is still the base model."""
    for split in ("train", "held_out"):
        latents(model(), preset, spec, split, min(study.loss_rows, spec.train_rows))


def latents(components: Components, preset: Preset, spec: DatasetSpec, split: str, count: int) -> LatentCache:
    """Latents and caption embeddings of the first rows of a split, by the base model's VAE and text encoder."""
    hashes = {"weights": weights_fingerprint(preset)}
    hashes["code"] = provenance.code_hash(*caches.CODE)
    hashes["data"] = data_fingerprint(spec, preset.resolution)
    key = digest([hashes, preset.resolution, split, count])
    return build_cache(components, rows_of(spec, preset, split, count), runs_folder() / "cache", key)


def references(encoder: PictureEncoder, spec: DatasetSpec, preset: Preset, split: str, count: int) -> Tensor:
    """An encoder's features [count, D] of the first rows of a split, kept on the disk."""
    data_hash, network = data_fingerprint(spec, preset.resolution), provenance.file_hash(WEIGHTS)
    key = digest([encoder.name, network, data_hash, preset.resolution, split, count])[:16]
    path = runs_folder() / "cache" / f"features-{key}.safetensors"
    if not path.exists():
        rows = rows_of(spec, preset, split, count)
        features = encoder.pictures([data.read_picture(rows, row) for row in range(len(rows))])
        with atomic_path(path) as writing:
            save_file({"features": features}, writing)
    return load_file(path)["features"]

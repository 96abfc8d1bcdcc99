"""What a preset is made of: numbers of the training loop, datasets, base model and budgets."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from helpers.base.paths import ROOT

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
    caption_orders: int = 1  # orders of a caption's parts between commas that training sees; the first part stays first
    noise_offset: float = 0.0  # noise that a whole channel shares: pictures may then be darker or lighter as a whole
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False  # train the length of each weight row too (see helpers.lora.dora)
    targets: tuple[str, ...] = ATTENTION
    train_text_encoder: bool = False  # a LoRA on the text encoder's attention too, of the same rank and alpha
    seed: int = 0
    lora_plus: float = 1.0  # LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns so many times as fast as A
    ema_decay: float = 0.0  # validate and keep the moving average of the weights (see helpers.training.steps)
    lr_warmup_steps: int = 0
    lr_schedule: str = "constant"  # "constant", "linear" or "cosine": what follows the warm-up, down to zero
    validation_epochs: int = 2  # validation pictures every so many epochs, and before the first and after the last step
    validation_steps: int = 0  # if not 0: every so many steps instead
    early_validations: tuple[int, ...] = ()  # after these steps too: a style comes in long before the second epoch ends
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
        for name in (*at_least_one, "keep_checkpoints", "gradient_accumulation_steps", "caption_orders"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        not_negative = ("validation_steps", "lr_warmup_steps", "held_out_eval", "max_grad_norm", "weight_decay")
        for name in (*not_negative, "noise_offset"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, and is {getattr(self, name)}")
        if any(step < 1 for step in self.early_validations):
            raise ValueError(f"early_validations are steps from 1, not {self.early_validations}")
        if self.learning_rate <= 0 or self.alpha <= 0 or self.lora_plus <= 0:
            raise ValueError("learning_rate, alpha and lora_plus must be positive")
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise ValueError(f"snr_gamma must be positive, or None, and is {self.snr_gamma}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError("ema_decay must lie in [0, 1)")
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

    source: "drawn:STYLE" (the drawn world; with changes behind a "?", see `helpers.data.recipes`), "hub:OWNER/NAME" (a
    dataset of the Hugging Face hub), "folder:PATH" (pictures with metadata.csv, metadata.jsonl or .txt captions, or
    parquet files) or "parquet:PATH" (one file).
    image_column, text_column: where pictures and captions are. In a metadata file the pictures' column is "file_name"
    unless image_column is another name than "image"; .txt captions need no columns.
    revision: of a hub dataset, a commit, tag or branch; None means what is there at the first download, which is then
    kept (see `helpers.base.hub`). licence, download_gb: what its source says, and of a hub dataset its size.
    caption: of every picture that has none of its own, such as a trigger word.
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
    caption: str = ""


class Datasets(tuple):
    """A tuple of `DatasetSpec` that can also be asked by name: `preset.datasets["doodles"]`.

    more: datasets that answer to their names too, and that the notebooks' loops over all datasets leave out.
    """

    more: tuple[DatasetSpec, ...]

    def __new__(cls, specs=(), more=()):
        made = super().__new__(cls, specs)
        made.more = tuple(more)
        return made

    def __getitem__(self, key):
        if not isinstance(key, str):
            return super().__getitem__(key)
        for spec in (*self, *self.more):
            if spec.name == key:
                return spec
        raise ValueError(f"unknown dataset {key!r}; known: {', '.join(self.known)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The datasets' names, in order, without those of `more`."""
        return tuple(spec.name for spec in self)

    @property
    def known(self) -> tuple[str, ...]:
        """All names that it answers to."""
        return tuple(spec.name for spec in (*self, *self.more))


@dataclass(frozen=True)
class Preset:
    """A base model, its datasets and the budgets of everything that is run on them.

    model: a folder in diffusers layout (relative to the repository, or absolute) when `revision` is None, else a
    repository of the Hugging Face hub at that revision; `mirrors` are (repository, revision) pairs, tried in order.
    dtype: of the U-Net's weights; "auto" is bfloat16 or float16 on a GPU, whichever it has, and float32 on a CPU.
    trial: budgets so small that the pictures mean nothing. gates: what lessons claim of learning is tried at full
    length nevertheless.
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
    gates: bool = False
    licence: str = ""
    download_gb: float = 0.0  # of the model, as float32 safetensors

    @property
    def on_hub(self) -> bool:
        """Whether the base model lives on the Hugging Face hub; MiniSD, or a folder of one's own, does not."""
        return self.revision is not None

    @property
    def repositories(self) -> tuple[tuple[str, str], ...]:
        """(repository, revision) pairs that have the model, in the order in which they are tried; () if it is local."""
        return () if self.revision is None else ((self.model, self.revision), *self.mirrors)

    @property
    def model_folder(self) -> Path | None:
        """The folder of the base model, or None when it lives on the hub. (An absolute `model` stays as it is.)"""
        return ROOT / self.model if self.revision is None else None

"""Three loops that train the same LoRA: the course's, a bare one, and one that does what stock scripts do.

Each has `train(steps)` and starts from the same weights of U-Net and LoRA.

- CourseLoop: `Loop.step` and `Progress.log`, as `helpers.training.loop.train_loop` calls them.
- BareLoop: forward, loss, backward and AdamW on tensors that are ready; nothing can train with less.
- StockLoop: what diffusers' train_text_to_image_lora.py does at each step, with PEFT's LoRA. It opens the pictures and
  asks the VAE and the text encoder every time, since it keeps no cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.pair import BATCHES, adapt, load_model
from benchmarks.timing import Piece
from helpers import lora
from helpers.data.caches import LatentCache
from helpers.data.loading import load_pictures
from helpers.diffusion.components import Components
from helpers.diffusion.pictures import to_tensor
from helpers.diffusion.schedule import add_noise, diffusion_target
from helpers.presets.configuration import Preset, TrainConfig
from helpers.presets.variants import get_preset
from helpers.training import loop as training
from helpers.training import steps as course_steps
from helpers.training.draws import draw_step, seeded
from helpers.training.progress import Progress
from helpers.training.runs import Run
from helpers.training.tracking import Tracker

DATASET = "doodles"


@dataclass(frozen=True)
class Settings:
    """What a measurement depends on besides the device.

    model: "mini" (MiniSD) or "tiny" (a few thousand random weights, to try the benchmark itself).
    pictures, held_out: rows of the drawn doodles; picture_size: pixels on a side that they are stored with, 0 for those
    of the model. rows: sizes of the caches whose step costs are compared.
    rounds, size_rounds: blocks timed for each loop, and for each size, of `steps` steps each, after `warmup` steps.
    loss_steps: after how many steps the held-out losses are compared; 0 leaves that out. piece_steps: steps whose
    pieces are timed. processes: how many tell each peak memory, before and after `memory_steps` steps; 0 leaves it out.
    """

    model: str = "mini"
    batch_size: int = 8
    rank: int = 16
    pictures: int = 1000
    held_out: int = 32
    picture_size: int = 0
    rounds: int = 25
    size_rounds: int = 16
    steps: int = 4
    warmup: int = 3
    loss_steps: int = 150
    piece_steps: int = 20
    rows: tuple[int, ...] = (100, 1_000, 10_000, 100_000)
    processes: int = 3
    memory_steps: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "size_rounds", "steps", "warmup", "piece_steps", "memory_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.rows or min(self.rows) < self.batch_size:
            raise ValueError(f"each size needs at least one batch of {self.batch_size} pictures: {self.rows}")

    def train_config(self) -> TrainConfig:
        """The mini preset's training with these numbers, at a constant learning rate since there is no last step."""
        numbers = {"batch_size": self.batch_size, "rank": self.rank, "seed": self.seed}
        return replace(get_preset("mini").train, lr_schedule="constant", **numbers)


def doodles(settings: Settings, split: str, resolution: int) -> Dataset:
    """Drawn pictures with captions, stored as PNG files are and decoded when they are asked for.

    resolution: the model's, which they get unless the settings say another size.
    """
    spec = get_preset("mini").datasets[DATASET]
    spec = replace(spec, train_rows=settings.pictures, held_out_rows=settings.held_out)
    return load_pictures(spec, split, settings.picture_size or resolution)


# --- the course's ------------------------------------------------------------------------------------------------


@dataclass
class CourseLoop:
    """The training loop of the course, without validations and checkpoints. `step` is the next one."""

    loop: training.Loop
    optimizer: torch.optim.Optimizer
    progress: Progress
    step: int = 0

    @property
    def components(self) -> Components:
        return self.loop.components

    def train(self, steps: int) -> None:
        """So many steps. An epoch's last batch is left out where it is smaller, and so cheaper, than the others."""
        for _ in range(steps):
            if len(self.loop.cache) % self.loop.config.batch_size and (self.step + 1) % self.loop.epoch_steps == 0:
                self.step += 1
            began = time.monotonic()
            metrics = self.loop.step(self.optimizer, self.step)
            self.progress.log(self.step, metrics, time.monotonic() - began)
            self.step += 1

    def pieces(self) -> list[Piece]:
        """Where a step's time may go. What is left is bookkeeping: RNG states, moving tensors, the line of metrics."""
        return [
            (training, "draw_step", "draw"),
            (course_steps, "add_noise", "noising_and_target"),
            (course_steps, "diffusion_target", "noising_and_target"),
            (course_steps, "loss_weights", "noising_and_target"),
            (self.components.unet, "forward", "unet_forward"),
            (self.loop.accelerator, "backward", "backward"),
            (self.loop.accelerator, "clip_grad_norm_", "clip"),
            (self.optimizer, "step", "adamw"),
            (self.optimizer, "zero_grad", "adamw"),
        ]


@contextmanager
def course_loop(
    settings: Settings, cache: LatentCache, folder: Path, components: Components, held_out: LatentCache | None = None
) -> Iterator[CourseLoop]:
    """The course's loop with the mini preset and these settings; see `preset_loop`."""
    preset = replace(get_preset("mini"), train=settings.train_config())
    with preset_loop(preset, cache, folder, components, held_out) as course:
        yield course


@contextmanager
def preset_loop(
    preset: Preset, cache: LatentCache, folder: Path, components: Components, held_out: LatentCache | None = None
) -> Iterator[CourseLoop]:
    """The course's loop on a cache. folder: of its run, for metrics.jsonl; no tracker, no bar."""
    config = preset.train
    run = Run(folder, preset.name, DATASET, "benchmark")
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = course_steps.new_accelerator(config, components.device)
    loop = training.Loop(run, preset, components, cache, held_out, accelerator)
    progress = Progress(run, config, components.device, True, Tracker(None, folder, "", {}), bar=False, on_log=None)
    with course_steps.injected(components, config, accelerator) as optimizer, progress.started(0):
        yield CourseLoop(loop, optimizer, progress)


# --- the bare minimum --------------------------------------------------------------------------------------------


@dataclass
class BareLoop:
    """Forward, loss, backward and AdamW of the course's injected U-Net, going round a few prepared batches."""

    unet: nn.Module
    optimizer: torch.optim.Optimizer
    batches: list[tuple[Tensor, Tensor, Tensor, Tensor]]  # noisy latents, timesteps, text states, target
    step: int = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            noisy, timesteps, states, target = self.batches[self.step % len(self.batches)]
            F.mse_loss(self.unet(noisy, timesteps, states).sample, target).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1


def bare_loop(settings: Settings, cache: LatentCache, device: torch.device) -> BareLoop:
    config, components = settings.train_config(), load_model(settings.model, device)
    with seeded(config.seed, "init", 0, device):
        lora.inject(components.unet, config.targets, config.rank, config.alpha)
    parameters = lora.lora_parameters(components.unet)
    own = {"betas": config.betas, "weight_decay": config.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, **own)
    schedule = components.noise_scheduler.alphas_cumprod.to(device)
    batches = []
    for step in range(BATCHES):
        draw = draw_step(config, cache, step, len(schedule)).to(device)
        numbers = draw.latents, draw.noise, draw.timesteps, schedule
        target = diffusion_target(components.prediction_type, *numbers)
        batches.append((add_noise(*numbers), draw.timesteps, draw.encoder_hidden_states, target))
    return BareLoop(components.unet.train(), optimizer, batches)


# --- what stock scripts do ---------------------------------------------------------------------------------------


@dataclass
class StockLoop:
    """Pictures are opened, captions read and both encoded at each step; PEFT's LoRA, PyTorch's AdamW as it comes."""

    components: Components
    config: TrainConfig
    loader: DataLoader
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    batches: Iterator = field(default_factory=lambda: iter(()))
    losses: list[float] = field(default_factory=list)

    @property
    def step(self) -> int:
        return len(self.losses)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            pixels, input_ids = self.next_batch()
            latents, states = self.encode_pictures(pixels), self.encode_captions(input_ids)
            self.losses.append(self.update(latents, states))

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Pictures [b, 3, H, W] in -1..1 and tokens [b, L] of the next rows; after the last, those of a new order."""
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        return tuple(tensor.to(self.components.device) for tensor in batch)

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        vae = self.components.vae
        return vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor

    def encode_captions(self, input_ids: Tensor) -> Tensor:
        return self.components.text_encoder(input_ids)[0]

    def loss(self, latents: Tensor, states: Tensor) -> Tensor:
        """Noise, forward and mean squared error in float32, a scalar."""
        scheduler = self.components.noise_scheduler
        noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        is_velocity = self.components.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
        return F.mse_loss(self.components.unet(noisy, timesteps, states).sample.float(), target.float())

    def update(self, latents: Tensor, states: Tensor) -> float:
        """Noise, forward, loss, backward, clip and AdamW; returns the loss."""
        loss = self.loss(latents, states)
        self.backward(loss)
        self.clip()
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.item()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)

    def pieces(self) -> list[Piece]:
        names = {"next_batch": "decoding", "encode_pictures": "vae", "encode_captions": "text_encoder"}
        return [(self, name, piece) for name, piece in {**names, "update": "unet"}.items()]


def stock_loader(components: Components, dataset: Dataset, config: TrainConfig) -> DataLoader:
    """Batches of pictures and tokens, in a new order each epoch. Pictures are decoded and captions read at access."""
    # Not the components themselves: datasets hashes everything that `prepare` refers to
    tokenizer, size = components.tokenizer, components.resolution
    length = components.text_encoder.config.max_position_embeddings
    fixed = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}

    def prepare(rows: dict) -> dict:
        pixels = [to_tensor(picture, size) for picture in rows["image"]]
        return {"pixels": pixels, "input_ids": tokenizer(list(rows["text"]), **fixed).input_ids}

    def collate(rows: list[dict]) -> tuple[Tensor, Tensor]:
        return tuple(torch.stack([row[name] for row in rows]) for name in ("pixels", "input_ids"))

    generator = torch.Generator().manual_seed(config.seed)
    order = {"shuffle": True, "generator": generator, "num_workers": 0}
    return DataLoader(dataset.with_transform(prepare), config.batch_size, collate_fn=collate, **order)


def stock_loop(settings: Settings, dataset: Dataset, device: torch.device) -> StockLoop:
    config, components = settings.train_config(), load_model(settings.model, device)
    with seeded(config.seed, "init", 0, device):  # the same A and B as ours: B is zero
        adapt("peft", components.unet, config)
    parameters = [p for p in components.unet.train().parameters() if p.requires_grad]
    own = {"betas": config.betas, "weight_decay": config.weight_decay}
    optimizer = torch.optim.AdamW(parameters, config.learning_rate, **own)
    schedule = get_scheduler("constant", optimizer)
    torch.manual_seed(config.seed)  # latents, noise and timesteps come from the global generator
    return StockLoop(components, config, stock_loader(components, dataset, config), parameters, optimizer, schedule)

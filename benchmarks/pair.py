"""The two sides of the comparison: one U-Net, adapted by helpers.lora or by PEFT, in the course's training step.

Both start from the same weights, draw the same numbers and go through `helpers.training.steps.training_step`, so
whatever
differs between them is the adapter's code. PEFT is imported for both sides: its import is not what is compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from peft import LoraConfig
from torch import Tensor, nn

from helpers import lora
from helpers.data.caches import LatentCache
from helpers.diffusion.components import Components, load_components
from helpers.presets.configuration import ATTENTION, LINEAR, TrainConfig
from helpers.presets.variants import get_preset
from helpers.training.draws import StepDraw, draw_step, generator_for, seeded
from helpers.training.steps import new_accelerator, training_step

SIDES = ("ours", "peft")
TARGETS = {"attention": ATTENTION, "linear": LINEAR}
BATCHES = 8  # different batches that training goes round in


class DifferentModels(RuntimeError):
    """The two sides do not compute the same, so their costs cannot be compared."""


@dataclass(frozen=True)
class Settings:
    """What a measurement depends on besides the device.

    model: "mini" (MiniSD) or "tiny" (a few thousand random weights, to try the benchmark itself). pairs: blocks timed
    for each side, of `steps` steps each, after `warmup` steps. processes: how many tell each side's peak memory, after
    `memory_steps` steps; 0 leaves it out.
    """

    model: str = "mini"
    targets: str = "linear"
    rank: int = 16
    alpha: float = 16.0
    batch_size: int = 8
    pairs: int = 30
    steps: int = 5
    warmup: int = 3
    processes: int = 3
    memory_steps: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pairs", "steps", "memory_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def train_config(self) -> TrainConfig:
        """The mini preset's training with these numbers, at a constant learning rate since there is no last step."""
        numbers = {name: getattr(self, name) for name in ("rank", "alpha", "batch_size", "seed")}
        targets = TARGETS[self.targets]
        return replace(get_preset("mini").train, targets=targets, lr_schedule="constant", **numbers)


def load_model(name: str, device: torch.device) -> Components:
    """MiniSD ("mini") or a model of its structure with a few thousand random weights ("tiny"), float32, frozen."""
    if name == "mini":
        return load_components(get_preset("mini"), device)
    from helpers.minisd.architecture import build_tiny

    parts = build_tiny(seed=0)
    noise_scheduler = DDPMScheduler.from_config(parts.pop("scheduler").config)
    for part in ("text_encoder", "vae", "unet"):
        parts[part].to(device).eval().requires_grad_(False)
    return Components(**parts, noise_scheduler=noise_scheduler, name="tiny", is_minisd=True)


def random_cache(components: Components, rows: int, seed: int) -> LatentCache:
    """Random latents [rows, C, h, w] and text states [rows, L, D] of the model's shapes.

    What a step costs depends on shapes and not on values, so no pictures are needed. Nothing reads the tokens.
    """
    length = components.text_encoder.config.max_position_embeddings
    width = components.unet.config.cross_attention_dim
    generator = generator_for(seed, "benchmark", 0)
    mean = torch.randn(rows, *components.latent_shape, generator=generator)
    states = torch.randn(rows + 1, length, width, generator=generator)
    ids = torch.zeros(rows + 1, length, dtype=torch.int64)
    std = torch.full_like(mean, 0.1)
    return LatentCache(mean, std, states[1:], ids[1:], torch.arange(rows), states[:1], ids[:1])


def adapt(side: str, unet: nn.Module, config: TrainConfig) -> None:
    """Freeze the U-Net and give it a LoRA: ours, or PEFT's in the way of diffusers' own training script."""
    if side == "ours":
        lora.inject(unet, config.targets, config.rank, config.alpha)
    else:
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets)))


@dataclass
class Side:
    """One adapted U-Net in training: it goes round its draws, and `losses` are those of the steps so far."""

    components: Components
    optimizer: torch.optim.Optimizer
    draws: list[StepDraw]
    config: TrainConfig
    accelerator: Accelerator
    losses: list[float] = field(default_factory=list)

    @property
    def unet(self) -> nn.Module:
        return self.components.unet

    def train(self, steps: int) -> None:
        """So many training steps: forward, backward, clip, AdamW."""
        for _ in range(steps):
            step = len(self.losses)
            draw = self.draws[step % len(self.draws)]
            args = (self.components, self.optimizer, draw, self.config, step, self.accelerator)
            self.losses.append(training_step(*args)["loss"])

    def gradients(self) -> dict[str, Tensor]:
        """What the last step left in A and B, by parameter; both sides name them alike."""
        trained = {name: p.grad for name, p in self.unet.named_parameters() if p.requires_grad}
        return {name.replace(".default.", "."): grad for name, grad in trained.items()}


def build_side(side: str, settings: Settings, device: torch.device) -> Side:
    """A fresh U-Net adapted by "ours" or "peft", its optimizer and its draws. The seed decides every number in it."""
    components = load_model(settings.model, device)
    config = settings.train_config()
    with seeded(config.seed, "init", 0, device):
        adapt(side, components.unet, config)
    trained = [p for p in components.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)
    cache = random_cache(components, BATCHES * config.batch_size, config.seed)
    timesteps = len(components.noise_scheduler.alphas_cumprod)
    # Drawn here and moved to the device, so that the clock sees the training step alone
    draws = [draw_step(config, cache, step, timesteps).to(device) for step in range(BATCHES)]
    return Side(components, optimizer, draws, config, new_accelerator(config, device))


def largest_difference(one: Side, other: Side, steps: int = 2) -> float:
    """Train both for some steps; max|difference| of their losses and (clipped) gradients. Infinite if names differ.

    At the first step A has no gradient, because B is zero: two steps are the least that says anything about A.
    """
    difference = 0.0
    for _ in range(steps):
        one.train(1), other.train(1)
        a, b = one.gradients(), other.gradients()
        if list(a) != list(b):
            return float("inf")
        gaps = [(a[name] - b[name]).abs().max().item() for name in a]
        difference = max(difference, abs(one.losses[-1] - other.losses[-1]), *gaps)
    return difference


def check_equal(one: Side, other: Side) -> float:
    """The largest difference of two training steps. Raises DifferentModels when it is not 0 (CPU) or not small."""
    difference = largest_difference(one, other)
    # On a GPU some sums run in no fixed order, and AdamW's second step enlarges the last bits of the first
    on_cpu = next(one.unet.parameters()).device.type == "cpu"
    if not difference <= (0.0 if on_cpu else 1e-3):
        raise DifferentModels(
            f"our LoRA and PEFT's differ by {difference:.3g} after two steps: what they cost cannot be compared"
        )
    return difference

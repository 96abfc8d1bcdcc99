"""Stable Diffusion 2.1-base with random weights for the benchmark of a GPU, and the operations that it takes.

What a step costs depends on shapes and not on values, so no weights need be downloaded. Operations are counted on
PyTorch's "meta" device, which executes nothing and knows every shape: the count is the same on all machines. It holds
what the matrix products, convolutions and attention execute, two for each multiplication and addition; gradients that
nobody asks for (those of frozen weights) are not executed and not counted, activations that are computed again are.
(A fused attention kernel computes its scores once more in the backward pass, which is not counted.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.pair import random_cache
from helpers import lora
from helpers.diffusion.components import Components
from helpers.presets.configuration import TrainConfig
from helpers.presets.sd_configs import CONFIGS, build_part
from helpers.training.draws import draw_step
from helpers.training.steps import part_loss

SD = "sd21-base"
# What makes Stable Diffusion 2.1 tiny: latents of 16 x 16, a few thousand weights, the same structure.
TINY = {
    "unet": {
        "sample_size": 16,
        "block_out_channels": [8, 16, 16, 16],
        "attention_head_dim": [1, 2, 2, 2],
        "cross_attention_dim": 16,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    "vae": {"sample_size": 128, "block_out_channels": [4, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 4},
    "text_encoder": {
        "vocab_size": 64,
        "max_position_embeddings": 8,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    },
}
CHANGES = {"sd21-base": {part: {} for part in TINY}, "tiny": TINY}  # by the benchmark's --model
BATCH = 1  # pictures that operations are counted for: they grow in proportion


# --- the model ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StandInTokenizer:
    """In the place of CLIP's, which has to be downloaded: a prompt becomes as many tokens, chosen by its length."""

    vocabulary: int
    model_max_length: int

    def __call__(self, prompts: list[str] | str, return_tensors: str | None = None, **_: object) -> SimpleNamespace:
        """input_ids [B, L], as a tensor int64 if return_tensors says so."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        ids = [[len(prompt) % self.vocabulary] * self.model_max_length for prompt in prompts]
        return SimpleNamespace(input_ids=torch.tensor(ids) if return_tensors else ids)


def build_model(size: str, device: torch.device | str, unet_dtype: torch.dtype, others: torch.dtype) -> Components:
    """All parts with random weights, frozen, in evaluation mode. size: "sd21-base" or "tiny".

    others: the dtype of VAE and text encoder. Raises KeyError for an unknown size.
    """
    parts = {part: build_part(SD, part, device, **changes) for part, changes in CHANGES[size].items()}
    for part, module in parts.items():
        # nn.Module's own `to`: that of diffusers warns of modules to be kept in float32, also when there are none
        nn.Module.to(module, unet_dtype if part == "unet" else others)
    # As helpers.diffusion.components reads it from a folder and leaves it on the device
    settings = {name: value for name, value in CONFIGS[SD]["scheduler"].items() if name != "skip_prk_steps"}
    scheduler = DDPMScheduler.from_config(settings, clip_sample=False, steps_offset=1)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    text = parts["text_encoder"].config
    tokenizer = StandInTokenizer(text.vocab_size, text.max_position_embeddings)
    return Components(tokenizer, **parts, noise_scheduler=scheduler, name=f"{size}, random weights", is_minisd=False)


# --- its operations ----------------------------------------------------------------------------------------------


def executed(run: Callable[[], object]) -> int:
    """Floating-point operations that a call executes: matrix products, convolutions and attention."""
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


@lru_cache(maxsize=2)
def meta_model(size: str) -> Components:
    return build_model(size, "meta", torch.float32, torch.float32)


@lru_cache
def operations(size: str) -> dict[str, int]:
    """Operations for one picture: "forward" of the U-Net, "encode" and "decode" of the VAE, "text" of one caption."""
    model = meta_model(size)
    text, pixels = model.text_encoder.config, (BATCH, 3, model.resolution, model.resolution)
    latents = torch.empty(BATCH, *model.latent_shape, device="meta")
    ids = torch.empty(BATCH, text.max_position_embeddings, dtype=torch.int64, device="meta")
    states = torch.empty(*ids.shape, model.unet.config.cross_attention_dim, device="meta")
    timesteps = torch.empty(BATCH, dtype=torch.int64, device="meta")
    runs = {
        "forward": lambda: model.unet(latents, timesteps, states),
        "encode": lambda: model.vae.encode(torch.empty(pixels, device="meta")),
        "decode": lambda: model.vae.decode(latents),
        "text": lambda: model.text_encoder(ids),
    }
    with torch.no_grad():
        return {name: executed(run) // BATCH for name, run in runs.items()}


@lru_cache
def lora_step_operations(size: str, rank: int, targets: tuple[str, ...], checkpointing: bool) -> int:
    """Operations of the course's forward and backward pass for one picture, with a LoRA on the U-Net."""
    model = meta_model(size)
    config = TrainConfig(batch_size=BATCH, rank=rank, targets=targets)
    draw = draw_step(config, random_cache(model, BATCH, seed=0), 0).to("meta")
    lora.inject(model.unet, targets, rank, config.alpha)
    model.unet.train()
    if checkpointing:
        model.unet.enable_gradient_checkpointing()
    try:
        return executed(lambda: part_loss(model, draw, config).backward()) // BATCH
    finally:
        model.unet.disable_gradient_checkpointing()
        lora.remove(model.unet)
        model.unet.eval()


def step_operations(size: str, config: TrainConfig, stock: bool = False) -> int:
    """Operations of one training step. stock: the loop that asks the VAE and the text encoder at each step."""
    each = lora_step_operations(size, config.rank, config.targets, config.gradient_checkpointing)
    if stock:
        each += operations(size)["encode"] + operations(size)["text"]
    return config.batch_size * each


def drawing_operations(size: str, pictures: int, steps: int) -> int:
    """Operations to draw so many pictures with guidance: two forward passes a step, two texts, and decoding."""
    each = operations(size)
    return pictures * (2 * steps * each["forward"] + 2 * each["text"] + each["decode"])


def random_pixels(model: Components, pictures: int, seed: int) -> Tensor:
    """Pictures of noise float32 [pictures, 3, H, W] in -1..1, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(pictures, 3, model.resolution, model.resolution, generator=generator) * 2 - 1

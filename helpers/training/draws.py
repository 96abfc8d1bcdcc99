"""What one training step draws: pictures, noise, timesteps and dropped captions, as a function of the step's number.

What step k draws depends on (seed, purpose, k) and on nothing else: each draw has its own generator, seeded by a hash
of the three. So a run that was killed and resumed, validated more often, spread over several processes or cut into
smaller parts trains on the same numbers. (Only the masks of LoRA dropout are drawn for each part.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from helpers.data.caches import LatentCache
from helpers.presets.configuration import TrainConfig


def seed_for(seed: int, purpose: str, step: int) -> int:
    """A 64-bit seed that depends on all three and on nothing else."""
    digest = hashlib.sha256(f"{seed}:{purpose}:{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def generator_for(seed: int, purpose: str, step: int) -> torch.Generator:
    """A CPU generator of its own for one purpose at one step, so that every device draws the same numbers."""
    return torch.Generator().manual_seed(seed_for(seed, purpose, step))


@contextmanager
def seeded(seed: int, purpose: str, step: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators inside the block and put them back after it, for code that draws from nothing else."""
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed_for(seed, purpose, step))
        yield


@dataclass(frozen=True)
class StepDraw:
    """All that is random in one step, for a batch of b pictures.

    indices: int64 [b], rows of the dataset; latents, noise: float32 [b, C, h, w]; timesteps: int64 [b], 0 … T-1;
    encoder_hidden_states: float32 [b, L, D], of the caption or, where it was dropped, of the empty one;
    input_ids: int64 [b, L], the tokens of the same.
    """

    indices: Tensor
    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    encoder_hidden_states: Tensor
    input_ids: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device | str) -> StepDraw:
        """The same on a device. To a CUDA GPU the copies do not wait for what it still computes."""
        to_gpu = torch.device(device).type == "cuda"

        def moved(tensor: Tensor) -> Tensor:
            # Only from pinned memory can a GPU copy by itself
            return tensor.pin_memory().to(device, non_blocking=True) if to_gpu else tensor.to(device)

        return StepDraw(**{f.name: moved(getattr(self, f.name)) for f in fields(self)})

    def split(self, count: int) -> list[StepDraw]:
        """The same draw in `count` parts, whose sizes differ by at most one; some are empty if b < count."""
        parts = {f.name: getattr(self, f.name).tensor_split(count) for f in fields(self)}
        return [StepDraw(**{name: part[i] for name, part in parts.items()}) for i in range(count)]


def steps_per_epoch(config: TrainConfig, rows: int) -> int:
    """How many batches see each picture once; the last batch may be smaller. 685 rows by 8 are 86."""
    return math.ceil(rows / config.batch_size)


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, rows: int) -> Tensor:
    """The order of the rows in that epoch (from 0), int64 [rows]: a permutation of its own."""
    return torch.randperm(rows, generator=generator_for(seed, "order", epoch))


def batch_indices(config: TrainConfig, rows: int, step: int) -> Tensor:
    """The rows of step `step` (from 0), int64 [b]: a slice of its epoch's order."""
    epoch, position = divmod(step, steps_per_epoch(config, rows))
    first = position * config.batch_size
    return epoch_order(config.seed, epoch, rows)[first : first + config.batch_size]


def draw_step(config: TrainConfig, cache: LatentCache, step: int, num_train_timesteps: int = 1000) -> StepDraw:
    """What step `step` (from 0) trains on. The same arguments give the same bits, whatever was drawn before."""
    indices = batch_indices(config, len(cache), step)
    # One memory layout, whatever the cache's: kernels round each layout differently
    mean, std = (part[indices].float().contiguous() for part in (cache.mean, cache.std))

    def generator(purpose: str) -> torch.Generator:
        return generator_for(config.seed, purpose, step)

    # z = mean + std * n, n ~ N(0, 1): a sample of the VAE's posterior, new at every visit of the picture
    latents = mean + std * torch.randn(mean.shape, generator=generator("posterior"))
    noise = torch.randn(mean.shape, generator=generator("noise"))
    if config.noise_offset:
        # the same number for a whole channel of a picture
        noise = noise + config.noise_offset * torch.randn(*mean.shape[:2], 1, 1, generator=generator("noise offset"))
    timesteps = torch.randint(num_train_timesteps, (len(indices),), generator=generator("timesteps"))
    # Dropping the caption now and then preserves the unconditional prediction that guidance needs
    dropped = torch.rand(len(indices), generator=generator("dropout")) < config.caption_dropout
    rows = cache.caption_index[indices]
    if rows.ndim == 2:  # several orders of each caption: one of them, new at every visit of the picture
        order = torch.randint(rows.shape[1], (len(rows), 1), generator=generator("caption order"))
        rows = rows.gather(1, order).squeeze(1)
    states = torch.where(dropped[:, None, None], cache.empty_embedding, cache.caption_embeddings[rows]).float()
    input_ids = torch.where(dropped[:, None], cache.empty_ids, cache.caption_ids[rows])
    return StepDraw(indices, latents, noise, timesteps, states, input_ids)

"""Full fine-tuning: the same loop without LoRA, so that every weight of the U-Net moves.

It is what LoRA is measured against. The draws, the loss and the schedule of the learning rate are those of
`helpers.training.steps`; a run is kept in memory only, since its result is as large as the model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from helpers.data.caches import LatentCache
from helpers.diffusion.components import Components
from helpers.presets.configuration import TrainConfig
from helpers.training.draws import draw_step
from helpers.training.steps import learning_rate, part_loss


def full_fine_tuning(components: Components, cache: LatentCache, config: TrainConfig) -> Iterator[int]:
    """Train all weights of the U-Net in place, as `config` says; yields the number of updates after each of them.

    Of the settings those of LoRA have no meaning here, and precision and accumulation are left out. Afterwards,
    also where the caller stops early, the U-Net is frozen and in evaluation mode. Between two updates it is in
    evaluation mode too; whoever changes that need not put it back.
    """
    unet, device = components.unet.requires_grad_(True), components.device
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(
        parameters, config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    try:
        for step in range(config.steps):
            unet.train()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            draw = draw_step(config, cache, step, len(components.noise_scheduler.alphas_cumprod)).to(device)
            loss = part_loss(components, draw, config) / len(draw)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            unet.eval()
            yield step + 1
    finally:
        unet.eval().requires_grad_(False)

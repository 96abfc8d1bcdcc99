"""Pretraining the judge on drawn pictures, before and after the autoencoder."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from helpers.base.files import atomic_path
from helpers.evaluation.classifier import HEADS, WEIGHTS, Classifier, labels, load_classifier
from helpers.minisd.budget import Budget, Ema

# Weights of the heads' losses, where not 1: the two that every claim about content rests on, and the hardest to see.
EMPHASIS = {"subject": 3.0, "headwear": 3.0, "expression": 3.0}


def augment(x: Tensor, g: torch.Generator) -> Tensor:
    """Shift by up to 3 pixels, blur a third of the pictures, add a little noise and contrast. x [B, 3, S, S].

    x and the generator are on one device.
    """

    def rand(*shape: int, draw=torch.rand) -> Tensor:
        return draw(shape, generator=g, device=x.device)

    dx, dy = torch.randint(-3, 4, (2,), generator=g, device=x.device).tolist()
    x = torch.roll(F.pad(x, (3, 3, 3, 3), mode="replicate"), (dy, dx), (2, 3))[..., 3:-3, 3:-3]
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.where(rand(len(x), 1, 1, 1) < 0.33, blurred, x)
    gain = 1 + 0.15 * rand(len(x), 1, 1, 1, draw=torch.randn)
    return x * gain + 0.08 * rand(len(x), 1, 1, 1) * rand(*x.shape, draw=torch.randn)


def visible(name: str, styles: Tensor) -> Tensor:
    """Mask [B] of the pictures in which an attribute can be seen: no colours in styles without colours."""
    if not (name.endswith("color") or name in ("hair", "background")):
        return torch.ones(len(styles), dtype=torch.bool, device=styles.device)
    gray = [HEADS["style"].index(s) for s in ("sketch", "blueprint", "chalkboard")]
    return ~torch.isin(styles, torch.tensor(gray, device=styles.device))


def loss_of(logits: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Weighted sum of the heads' cross-entropies, each over the pictures in which its attribute is visible."""
    total = targets["style"].new_zeros((), dtype=torch.float32)
    for name, out in logits.items():
        mask = visible(name, targets["style"])
        if mask.any():
            total = total + EMPHASIS.get(name, 1.0) * F.cross_entropy(out[mask], targets[name][mask])
    return total


def train_classifier(
    pool, blurred, budget: Budget, batch_size: int = 64, path: Path = WEIGHTS, go_on: bool = False, device: str = "cpu"
) -> None:
    """Train on pool.pictures (uint8 [N, S, S, 3]) and, every other step, on `blurred`, the first of them after the VAE.

    Starts from random weights, or with `go_on` from those at path. Writes fp16 weights to path.
    """
    targets = {name: classes.to(device) for name, classes in labels(pool.scenes, pool.styles).items()}
    torch.manual_seed(0)
    model = (load_classifier(path).train().requires_grad_(True) if go_on else Classifier()).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.02)
    ema = Ema({"classifier": model}, decay=0.998)
    budget.resume({"classifier": model}, optimizer, ema)
    sources = [torch.as_tensor(pictures, device=device) for pictures in (pool.pictures, blurred)]
    for step in budget.steps():
        g = torch.Generator(device).manual_seed(step)
        source = sources[step % 2]
        rows = torch.randint(len(source), (batch_size,), generator=g, device=device)
        x = source[rows].permute(0, 3, 1, 2).float() / 127.5 - 1
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * budget.cosine(warmup_steps=100)
        loss = loss_of(model(augment(x, g)), {k: v[rows] for k, v in targets.items()})
        budget.learn(loss, optimizer, ema, batch_size)
        budget.checkpoint({"classifier": model}, optimizer, ema)
    with atomic_path(path) as temporary:
        save_file({k: v.half().cpu().contiguous() for k, v in ema.weights["classifier"].items()}, temporary)

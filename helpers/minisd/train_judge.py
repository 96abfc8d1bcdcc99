"""Pretraining the judge on drawn pictures, before and after the autoencoder, with whole and with ruined faces."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from helpers.base.files import atomic_path
from helpers.evaluation.classifier import HEADS, WEIGHTS, Classifier, labels, load_classifier
from helpers.evaluation.faces import heat, positions
from helpers.minisd.budget import Budget, Ema
from helpers.minisd.ruin import ruin

# Weights of the heads' losses, where not 1: the two that every claim about content rests on, and the hardest to see.
EMPHASIS = {"subject": 3.0, "headwear": 3.0, "expression": 3.0}
FACE_WEIGHT = 300.0  # of the map's loss, a mean over cells that are nearly all empty
SHIFT = 6  # pixels, at most


def augment(x: Tensor, parts: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Shift by a few pixels, blur a third of the pictures, add a little noise and contrast. x [B, 3, S, S].

    The face's parts [B, P, 3] move along. x and the generator are on one device.
    """

    def rand(*shape: int, draw=torch.rand) -> Tensor:
        return draw(shape, generator=g, device=x.device)

    dx, dy = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=g, device=x.device).tolist()
    padded = F.pad(x, (SHIFT,) * 4, mode="replicate")
    moved = torch.roll(padded, (dy, dx), (2, 3))[..., SHIFT:-SHIFT, SHIFT:-SHIFT]
    parts = parts + torch.tensor([0, dx / x.shape[-1], dy / x.shape[-1]], device=x.device)
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.where(rand(len(x), 1, 1, 1) < 0.33, blurred, moved)
    gain = 1 + 0.15 * rand(len(x), 1, 1, 1, draw=torch.randn)
    return x * gain + 0.08 * rand(len(x), 1, 1, 1) * rand(*x.shape, draw=torch.randn), parts


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


def face_loss(logits: Tensor, parts: Tensor) -> Tensor:
    """Cross-entropy of the maps [B, 3, 32, 32] with the marks of `parts`.

    All cells count alike, so that the map says how probable a part is: ruined ones pass where full cells count more.
    """
    return F.binary_cross_entropy_with_logits(logits, heat(parts)) * FACE_WEIGHT


def train_classifier(
    pool, blurred, budget: Budget, batch_size: int = 64, path: Path = WEIGHTS, go_on: bool = False, device: str = "cpu"
) -> None:
    """Train on pool.pictures (uint8 [N, S, S, 3]) and, every other step, on `blurred`, the first of them after the VAE.

    Starts from random weights, or with `go_on` from those at path. Writes fp16 weights to path.
    """
    targets = {name: classes.to(device) for name, classes in labels(pool.scenes, pool.styles).items()}
    parts = positions(pool.scenes, pool.styles).to(device)
    torch.manual_seed(0)
    model = (load_classifier(path).train().requires_grad_(True) if go_on else Classifier()).to(device)
    model.to(memory_format=torch.channels_last)  # a third faster on a CPU
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
        x, moved = augment(x, parts[rows], g)
        x, left = ruin(x, moved, g)
        x = x.contiguous(memory_format=torch.channels_last)
        maps = model.maps(x)
        loss = loss_of(model.names(maps), {k: v[rows] for k, v in targets.items()}) + face_loss(model.parts(maps), left)
        budget.learn(loss, optimizer, ema, batch_size)
        budget.checkpoint({"classifier": model}, optimizer, ema)
    with atomic_path(path) as temporary:
        save_file({k: v.half().cpu().contiguous() for k, v in ema.weights["classifier"].items()}, temporary)

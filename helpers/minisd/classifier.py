"""The judge: a small residual network that names a picture's attributes and its style.

It is trained on drawn pictures of every style, before and after the autoencoder, with small shifts, blur and noise, so
that it answers for generated pictures too. One head per attribute; every metric on MiniSD comes from it.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers.minisd.budget import Budget, Ema
from helpers.provenance import atomic_path
from helpers.world import scenes

WEIGHTS = Path(__file__).parent / "judge" / "classifier.safetensors"
INPUT = 64  # pixels a side; other sizes are resized to it
HEADS: dict[str, tuple[str, ...]] = {
    "style": scenes.STYLES,
    "subject": scenes.SUBJECTS,
    "color": tuple(sorted({c for colors in scenes.SUBJECT_COLORS.values() for c in colors})),
    "hair": ("none", *scenes.HAIR_COLORS),
    "headwear": scenes.HEADWEAR,
    "headwear_color": ("none", *scenes.WEAR_COLORS),
    "eyewear": scenes.EYEWEAR,
    "neckwear": scenes.NECKWEAR,
    "neckwear_color": ("none", *scenes.WEAR_COLORS),
    "badge": scenes.BADGES,
    "clothes_color": scenes.WEAR_COLORS,
    "background": scenes.BACKGROUNDS,
    "expression": scenes.EXPRESSIONS,
}
# Weights of the heads' losses, where not 1: the two that every claim about content rests on, and the hardest to see.
EMPHASIS = {"subject": 3.0, "headwear": 3.0, "expression": 3.0}


class Block(nn.Module):
    """Residual block: x + conv(relu(norm(conv(relu(norm(x)))))), halving the side when stride is 2."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inputs), nn.GroupNorm(8, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, s, s] to [B, outputs, s / stride, s / stride]."""
        h = self.conv1(F.relu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.relu(self.norm2(h)))


class Classifier(nn.Module):
    """Pictures [B, 3, S, S] in -1..1 to logits per attribute, {name: [B, classes]}."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128, 160)):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 5, 2, 2)
        pairs = zip((widths[0], *widths[:-1]), widths, strict=True)
        self.blocks = nn.Sequential(*[Block(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(pairs)])
        # 4 x 4 cells remain: a hat is above a head, so the position is kept
        self.shared = nn.Linear(widths[-1] * 16, 192)
        self.heads = nn.ModuleDict({name: nn.Linear(192, len(classes)) for name, classes in HEADS.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of every head."""
        if x.shape[-1] != INPUT:
            x = F.interpolate(x, size=(INPUT, INPUT), mode="bilinear", antialias=True, align_corners=False)
        features = F.adaptive_avg_pool2d(F.relu(self.blocks(self.stem(x))), 4).flatten(1)
        features = F.relu(self.shared(features))
        return {name: head(features) for name, head in self.heads.items()}


def load_classifier(path: Path = WEIGHTS) -> Classifier:
    """The trained classifier, in evaluation mode. Raises FileNotFoundError when its weights are missing."""
    if not path.exists():
        raise FileNotFoundError(f"the classifier's weights are missing: {path.name}; run helpers.minisd.pretrain")
    model = Classifier()
    model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return model.eval().requires_grad_(False)


def labels(pool_scenes: list, styles: list[str]) -> dict[str, Tensor]:
    """Class indices [N] of every head."""
    columns = {name: [getattr(s, name) for s in pool_scenes] for name in HEADS if name != "style"} | {"style": styles}
    return {name: torch.tensor([HEADS[name].index(v) for v in values]) for name, values in columns.items()}


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
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ema.update(step)
        budget.log(loss, batch_size)
        budget.checkpoint({"classifier": model}, optimizer, ema)
    with atomic_path(path) as temporary:
        save_file({k: v.half().cpu().contiguous() for k, v in ema.weights["classifier"].items()}, temporary)

"""The second judge: what can be read off EfficientNet-Lite0's features by straight lines.

The network (`helpers.evaluation.imagenet`) is frozen and was trained on photographs. On its features one linear layer
for each attribute learns to name what is in a drawn picture: multinomial logistic regression, which has one optimum. It
knows styles, subjects, headwear and neckwear; small glasses and colours it sees too badly to be asked.

    python -m helpers.evaluation.probe        4 minutes on two cores: fit, measure on other pictures, write the weights
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.base.files import atomic_path
from helpers.diffusion.components import Components, load_components
from helpers.diffusion.pictures import to_latents, to_pictures, to_tensor
from helpers.evaluation.classifier import HEADS, labels, load_frozen
from helpers.evaluation.imagenet import BANDS, WIDTH, ImageNetEncoder
from helpers.presets.variants import get_preset
from helpers.world.scenes import STYLES, sample_scene
from helpers.world.styles import render

WEIGHTS = Path(__file__).parent / "judge" / "probe.safetensors"
PROBED = ("style", "subject", "headwear", "neckwear")
PER_STYLE = 400  # drawn pictures to learn from; each also after the VAE, which blurs
PENALTY = 0.01  # times the sum of the squared weights
STEPS = 150  # of L-BFGS


class Probe(nn.Module):
    """Pictures [B, 3, S, S] in -1..1 to logits per attribute, {name: [B, classes]}, as `judge` wants its classifier."""

    def __init__(self, encoder: ImageNetEncoder | None = None):
        super().__init__()
        self.encoder = encoder or ImageNetEncoder()
        width = WIDTH * (1 + BANDS)
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(HEADS[name])) for name in PROBED})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of every head."""
        return self.read(self.encoder.regions(x))

    def read(self, features: Tensor) -> dict[str, Tensor]:
        """Logits of every head for features [B, 4 * 1280] of `ImageNetEncoder.regions`."""
        return {name: head(features) for name, head in self.heads.items()}


def load_probe(path: Path = WEIGHTS) -> Probe:
    """The fitted probe, in evaluation mode. Raises FileNotFoundError when its weights are missing."""
    return load_frozen(Probe, path, "the probe's weights are missing: {}; run `python -m helpers.evaluation.probe`")


def fit(features: Tensor, target: Tensor, classes: int) -> nn.Linear:
    """Multinomial logistic regression of target int64 [N] on features [N, D], with an L2 penalty.

    It is fitted to features of mean 0 and deviation 1; the layer returned takes them as they are.
    """
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    x = (features - mean) / std
    layer = nn.Linear(features.shape[1], classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        # cross-entropy + PENALTY |W|^2
        loss = F.cross_entropy(layer(x), target) + PENALTY * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():  # W ((f - mean) / std) + b = (W / std) f + (b - W mean / std)
        layer.weight /= std
        layer.bias.sub_(layer.weight @ mean)
    return layer.requires_grad_(False)


def examples(components: Components, purpose: str, per_style: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Drawn pictures [N, 3, S, S] in -1..1 of every style, the same after the VAE, and their labels.

    purpose: pictures of another purpose are other pictures.
    """
    rows = [(style, random.Random(f"{purpose}/{style}/{k}")) for style in STYLES for k in range(per_style)]
    scenes, size = [sample_scene(rng, "all") for _, rng in rows], components.resolution
    drawn = [to_tensor(render(scene, style, size), size) for scene, (style, _) in zip(scenes, rows, strict=True)]
    x = torch.stack(drawn)
    with torch.no_grad():
        decoded = [to_pictures(components, to_latents(components, part)[0]) for part in x.split(32)]
    return x, torch.cat(decoded) * 2 - 1, labels(scenes, [style for style, _ in rows])


def accuracy(probe: Probe, features: Tensor, targets: dict[str, Tensor]) -> dict[str, float]:
    """Share of the pictures that the probe names right, for every head."""
    logits = probe.read(features)
    return {name: (out.argmax(1) == targets[name]).cpu().double().mean().item() for name, out in logits.items()}


def main() -> None:
    """Fit the probe, print its accuracy on pictures that it has not seen, and write it."""
    components = load_components(get_preset("mini"), "cpu")
    probe = Probe()
    *pictures, targets = examples(components, "probe train", PER_STYLE)
    features = torch.cat([probe.encoder.regions(x) for x in pictures])
    for name in PROBED:
        probe.heads[name] = fit(features, targets[name].repeat(2), len(HEADS[name]))
    *pictures, targets = examples(components, "probe test", 60)
    for what, x in zip(("drawn", "after the VAE"), pictures, strict=True):
        shares = accuracy(probe, probe.encoder.regions(x), targets)
        print(f"{what}: " + ", ".join(f"{name} {share:.3f}" for name, share in shares.items()))
    with atomic_path(WEIGHTS) as temporary:
        save_file({name: tensor.half().contiguous() for name, tensor in probe.state_dict().items()}, temporary)


if __name__ == "__main__":
    main()

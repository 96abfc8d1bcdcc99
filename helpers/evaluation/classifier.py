"""The judge: a small residual network that names a picture's attributes and its style, and finds the face's parts.

It is trained on drawn pictures of every style, before and after the autoencoder, with small shifts, blur and noise, so
that it answers for generated pictures too. One head per attribute, and one that marks eyes, lenses and mouth on a map
(see `helpers.evaluation.faces`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers.world import scenes

Network = TypeVar("Network", bound=nn.Module)
WEIGHTS = Path(__file__).parent / "judge" / "classifier.safetensors"
INPUT = 128  # pixels a side; other sizes are resized to it
PARTS = ("eye", "lens", "mouth")  # what the map of the face marks, one channel each
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
    "backdrop": scenes.BACKDROPS,
    "prop": scenes.PROPS,
    "prop_color": ("none", *scenes.WEAR_COLORS),
    "expression": scenes.EXPRESSIONS,
}


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
    """Pictures [B, 3, S, S] in -1..1 to logits per attribute, {name: [B, classes]}, and to maps of the face."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 160)):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 5, 2, 2)
        pairs = zip((widths[0], *widths[:-1]), widths, strict=True)
        self.blocks = nn.Sequential(*[Block(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(pairs)])
        # 4 x 4 cells remain: a hat is above a head, so the position is kept
        self.shared = nn.Linear(widths[-1] * 16, 192)
        self.heads = nn.ModuleDict({name: nn.Linear(192, len(classes)) for name, classes in HEADS.items()})
        # What an eye looks like is fine detail, what makes it an eye is around it: both levels' maps, 32 x 32
        self.face = nn.Sequential(
            nn.Conv2d(widths[1] + widths[2], 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, len(PARTS), 1)
        )

    def maps(self, x: Tensor) -> list[Tensor]:
        """Feature maps of the four levels: [B, w, s, s] with s = 64, 32, 16, 8."""
        if x.shape[-1] != INPUT:
            x = F.interpolate(x, size=(INPUT, INPUT), mode="bilinear", antialias=True, align_corners=False)
        levels = [self.stem(x)]
        for block in self.blocks:
            levels.append(block(levels[-1]))
        return levels[1:]

    def names(self, maps: list[Tensor]) -> dict[str, Tensor]:
        """Logits of every attribute's head."""
        features = F.adaptive_avg_pool2d(F.relu(maps[-1]), 4).flatten(1)
        features = F.relu(self.shared(features))
        return {name: head(features) for name, head in self.heads.items()}

    def parts(self, maps: list[Tensor]) -> Tensor:
        """Logits [B, 3, 32, 32] that the middle of an eye, of a dark lens, of a mouth lies in a cell."""
        fine, coarse = maps[1], F.interpolate(maps[2], scale_factor=2, mode="nearest")
        return self.face(F.relu(torch.cat([fine, coarse], 1)))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of every attribute's head."""
        return self.names(self.maps(x))


def load_classifier(path: Path = WEIGHTS) -> Classifier:
    """The trained classifier, in evaluation mode. Raises FileNotFoundError when its weights are missing."""
    return load_frozen(Classifier, path, "the classifier's weights are missing: {}; run helpers.minisd.pretrain")


def load_frozen(build: Callable[[], Network], path: Path, missing: str) -> Network:
    """A network with the weights in a file, as float32, in evaluation mode and frozen.

    Raises FileNotFoundError with the sentence `missing`, the file's name in it, where there is no file.
    """
    if not path.exists():
        raise FileNotFoundError(missing.format(path.name))
    network = build()
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return network.eval().requires_grad_(False)


def labels(pool_scenes: list, styles: list[str]) -> dict[str, Tensor]:
    """Class indices [N] of every head."""
    columns = {name: [getattr(s, name) for s in pool_scenes] for name in HEADS if name != "style"} | {"style": styles}
    return {name: torch.tensor([HEADS[name].index(v) for v in values]) for name, values in columns.items()}

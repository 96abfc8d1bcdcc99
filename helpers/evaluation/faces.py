"""Are the faces whole? Eyes and mouth are looked for one by one, since a ruined face does not confuse a classifier.

The judge's map of the face was trained on drawn pictures, where the renderer knows the middle of every eye and mouth,
and on pictures in which one part was smeared, warped or wiped away and is not to be found. A face is complete when
both eyes are found, and no third, and one mouth below them. Dark glasses hide the eyes: their lenses count instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from helpers.diffusion.pictures import to_tensor
from helpers.evaluation.classifier import INPUT, PARTS, Classifier, load_classifier
from helpers.evaluation.measures import Measure, wilson
from helpers.world.scenes import Scene
from helpers.world.styles import parts_in

GRID = 32  # cells a side of the map
BLUR = 0.9  # cells: the spread of the mark around a part's middle
FOUND = 0.4  # a peak at least this high is a part; a certain one has 0.73 to 1, by where in its cell it lies
APART = 2  # cells: a weaker peak this near to a stronger one is the same part


def positions(scenes: Sequence[Scene], styles: Sequence[str]) -> Tensor:
    """Where the parts lie, [N, 3, 3]: for each part its index in PARTS, x and y in 0..1."""
    rows = [[(PARTS.index(name), x, y) for name, x, y in parts_in(*pair)] for pair in zip(scenes, styles, strict=True)]
    return torch.tensor(rows)


def heat(parts: Tensor) -> Tensor:
    """Maps [N, 3, 32, 32] with a mark of height 1 in the middle of each part of `parts` [N, P, 3]; -1 is no part.

    mark(u, v) = exp(-((u - x)^2 + (v - y)^2) / 2 blur^2) in cells; where marks overlap, the higher counts.
    """
    cells = torch.arange(GRID, device=parts.device) + 0.5
    across = (cells - GRID * parts[..., 1:2]) ** 2  # [N, P, 32]
    down = (cells - GRID * parts[..., 2:3]) ** 2
    marks = torch.exp(-(down[..., :, None] + across[..., None, :]) / (2 * BLUR**2))
    kinds = [torch.where((parts[..., 0] == kind)[..., None, None], marks, 0).amax(1) for kind in range(len(PARTS))]
    return torch.stack(kinds, 1)


def peaks(probability: Tensor) -> list[tuple[float, float]]:
    """(x, y) in 0..1 of the parts found on one map [32, 32]: local maxima that are probable enough."""
    window = 2 * APART + 1
    highest = F.max_pool2d(probability[None, None], window, 1, APART)[0, 0]
    found: list[tuple[int, int]] = []
    for y, x in torch.argwhere((probability == highest) & (probability >= FOUND)).tolist():
        if not any(max(abs(x - u), abs(y - v)) <= APART for u, v in found):  # a middle between two equal cells
            found.append((x, y))
    return [((x + 0.5) / GRID, (y + 0.5) / GRID) for x, y in found]


def is_complete(found: dict[str, list[tuple[float, float]]], eyes: str = "eye") -> bool:
    """True for two eyes (or lenses, as `eyes` says) and one mouth below and between them."""
    if len(found[eyes]) != 2 or len(found["mouth"]) != 1:
        return False
    (x0, y0), (x1, y1) = found[eyes]
    (x, y), width = found["mouth"][0], abs(x0 - x1)
    return y > (y0 + y1) / 2 and width > 0.05 and abs(x - (x0 + x1) / 2) < width


@torch.inference_mode()
def find_parts(pictures: Sequence[Image.Image], judge: Classifier | None = None) -> list[dict]:
    """For each picture, {part: [(x, y), …]} with x and y in 0..1. Raises ValueError when there are no pictures."""
    if not pictures:
        raise ValueError("there are no pictures to judge")
    judge = judge or load_classifier()
    out = []
    for start in range(0, len(pictures), 64):
        batch = pictures[start : start + 64]
        maps = judge.parts(judge.maps(torch.stack([to_tensor(picture, INPUT) for picture in batch]))).sigmoid()
        out += [{part: peaks(maps[i, k]) for k, part in enumerate(PARTS)} for i in range(len(batch))]
    return out


def complete(pictures: Sequence[Image.Image], scenes: Sequence[Scene], judge: Classifier | None = None) -> list[bool]:
    """Whether each picture shows the whole face that its scene asks for. Raises ValueError when there are none."""
    eyes = ["lens" if scene.eyewear == "sunglasses" else "eye" for scene in scenes]
    return [is_complete(found, kind) for found, kind in zip(find_parts(pictures, judge), eyes, strict=True)]


def faces(pictures: Sequence[Image.Image], scenes: Sequence[Scene], judge: Classifier | None = None) -> Measure:
    """Share of pictures with a whole face, with Wilson's interval."""
    return wilson(sum(complete(pictures, scenes, judge)), len(pictures))

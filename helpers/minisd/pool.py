"""Pools of drawn pictures to pretrain on: pixels, scenes, styles and several captions each.

Picture i of a pool depends on (seed, i) alone, so any number of worker processes draws the same pool.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from os import cpu_count

import numpy as np

from helpers.minisd.vectors import random_drawing
from helpers.world.captions import caption
from helpers.world.scenes import Scene, sample_scene
from helpers.world.styles import render

CAPTIONS_PER_PICTURE = 3
NO_STYLE = "vectors"  # drawings of nothing in particular, without scene and captions


@dataclass
class Pool:
    """`pictures` is uint8 [N, size, size, 3]; the lists have N entries."""

    pictures: np.ndarray
    scenes: list[Scene | None]
    styles: list[str]
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.scenes)


def _draw(index: int, seed: int, size: int, styles: Mapping[str, float], pairs: str):
    rng = random.Random(f"{seed}/{index}")
    style = rng.choices(list(styles), list(styles.values()))[0]
    if style == NO_STYLE:
        return np.asarray(random_drawing(rng, size)), None, style, []
    scene = sample_scene(rng, pairs)
    words = [caption(scene, style, rng) for _ in range(CAPTIONS_PER_PICTURE)]
    return np.asarray(render(scene, style, size)), scene, style, words


def drawing_processes(workers: int | None = None) -> ProcessPoolExecutor:
    """Worker processes that draw, by default one a core."""
    return ProcessPoolExecutor(workers or cpu_count(), mp_context=get_context("spawn"))


def start_drawing(
    processes: ProcessPoolExecutor, count: int, styles: Mapping[str, float], size: int, seed: int, pairs: str = "train"
) -> Iterator:
    """Have `count` random pictures of `size` pixels a side drawn in the background; `styles` maps each to its share."""
    draw = partial(_draw, seed=seed, size=size, styles=dict(styles), pairs=pairs)
    return processes.map(draw, range(count), chunksize=64)


def collect(rows: Iterator) -> Pool:
    """The pool that `start_drawing` began, when all of it is drawn."""
    pictures, scenes, names, captions = zip(*rows, strict=True)
    return Pool(np.stack(pictures), list(scenes), list(names), list(captions))


def draw_pool(
    count: int, styles: Mapping[str, float], size: int, seed: int = 0, pairs: str = "train", workers: int | None = None
) -> Pool:
    """Draw `count` random pictures of `size` pixels a side; `styles` maps each style to its share."""
    with drawing_processes(workers) as processes:
        return collect(start_drawing(processes, count, styles, size, seed, pairs))

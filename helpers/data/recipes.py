"""Datasets of the drawn world with something wrong on purpose: shuffled captions, or a skewed choice of scenes.

A source names the changes behind a question mark, "drawn:doodles?shuffled=0.3" or
"drawn:doodles?skew=headwear:crown:0.8":

- shuffled: this share of the captions goes round among its pictures, so that each of them describes another one;
- skew: this share of the rows has the named value of a scene's attribute, whatever its share in the world.

Like all drawn datasets these are functions of their names, and held-out rows are never changed.
"""

from __future__ import annotations

import json
import random
from dataclasses import fields
from typing import TYPE_CHECKING

from helpers.data.folders import quiet_datasets
from helpers.world import datasets as drawn
from helpers.world.scenes import Scene

if TYPE_CHECKING:
    from datasets import Dataset

KNOWN = ("shuffled", "skew")
DRAWN_FOR_SKEW = 8  # scenes looked at for each one that is kept, at most


def parse(place: str) -> tuple[str, dict[str, str]]:
    """("doodles", {"shuffled": "0.3"}) from "doodles?shuffled=0.3". Raises ValueError for an unknown change."""
    style, _, query = place.partition("?")
    changes = dict(change.partition("=")[::2] for change in query.split("&")) if query else {}
    for name in changes:
        if name not in KNOWN:
            raise ValueError(f"unknown change {name!r} of the drawn dataset {place!r}; known: {', '.join(KNOWN)}")
    return style, changes


def share_of(text: str, place: str) -> float:
    """A share in 0..1. Raises ValueError for another number and for what is none."""
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"a share in {place!r} should be a number from 0 to 1, not {text!r}")
    return share


def fingerprint(place: str, split: str, size: int, n: int, seed: int = 0) -> str:
    """As `world.datasets.fingerprint`, of a place that may have changes: those are part of the style's name there."""
    style, changes = parse(place)
    found = drawn.fingerprint(style, split, size, n, seed)
    return f"{found} {sorted(changes.items())}" if changes else found


def drawn_by(place: str, split: str, size: int, n: int) -> Dataset:
    """The rows of a drawn dataset with its changes. Raises ValueError for changes that make no sense."""
    style, changes = parse(place)
    if split == "held_out" or "skew" not in changes:
        dataset = drawn.drawn_dataset(style, split, size=size, n=n)
    else:
        dataset = skewed(style, split, size, n, changes["skew"], place)
    if split == "held_out" or "shuffled" not in changes:
        return dataset
    return shuffled(dataset, share_of(changes["shuffled"], place))


def shuffled(dataset: Dataset, share: float) -> Dataset:
    """The dataset with `share` of its captions each moved to the next row of a random choice: none of them stays.

    (One caption alone has nowhere to go.)
    """
    rng = random.Random(f"shuffled captions of {len(dataset)} rows")
    rows = rng.sample(range(len(dataset)), round(share * len(dataset)))
    captions = list(dataset["text"])
    moved = {row: captions[rows[i - 1]] for i, row in enumerate(rows)}
    features = dataset.features
    texts = [moved.get(row, caption) for row, caption in enumerate(captions)]
    with quiet_datasets():
        changed = dataset.remove_columns("text").add_column("text", texts)
        return changed.select_columns(list(features)).cast(features)


def skewed(style: str, split: str, size: int, n: int, rule: str, place: str) -> Dataset:
    """n rows, of which a share has one value of an attribute: "headwear:crown:0.8". Rows keep the world's order.

    Raises ValueError for an attribute or value that no scene has, and for a share that cannot be reached.
    """
    attribute, _, rest = rule.partition(":")
    value, _, text = rest.partition(":")
    share = share_of(text, place)
    if attribute not in {field.name for field in fields(Scene)}:
        raise ValueError(f"scenes have no attribute {attribute!r}, which {place!r} names")
    many = drawn.drawn_dataset(style, split, size=size, n=n * DRAWN_FOR_SKEW)
    has = [json.loads(scene)[attribute] == value for scene in many["scene"]]
    wanted = {True: round(share * n), False: n - round(share * n)}
    kept = []
    for row, yes in enumerate(has):
        if wanted[yes]:
            wanted[yes] -= 1
            kept.append(row)
    if any(wanted.values()):
        raise ValueError(f"too few scenes for {place!r}: {attribute} is {value!r} in {sum(has)} of {len(has)}")
    return many.select(kept)

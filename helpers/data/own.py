"""A preset with one more dataset: the reader's own pictures."""

from __future__ import annotations

from dataclasses import replace

from helpers.presets.configuration import Datasets, DatasetSpec, Preset


def with_own_pictures(preset: Preset, everything: DatasetSpec, held_out: int) -> tuple[Preset, str]:
    """The preset with one more dataset, and its name; of all its rows the last `held_out` are not trained on.

    The validation prompts are the first four different captions that are not empty.
    """
    from helpers.base.errors import DataError
    from helpers.data.loading import load_pictures

    name = everything.name
    if name in preset.datasets.known:
        raise DataError(f"preset {preset.name!r} has a dataset {name!r} already: give this one another --dataset name")
    captions = list(load_pictures(everything, "train", preset.resolution)["text"])
    if not 0 <= held_out < len(captions):
        raise DataError(f"{name} has {len(captions)} pictures; --held-out {held_out} would leave none to train on")
    spec = replace(everything, train_rows=len(captions) - held_out, held_out_rows=held_out)
    prompts = preset.validation_prompts | {name: tuple(filter(None, dict.fromkeys(captions)))[:4]}
    datasets = Datasets((*preset.datasets, spec), preset.datasets.more)
    return replace(preset, datasets=datasets, validation_prompts=prompts), name

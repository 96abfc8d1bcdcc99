"""A preset by its name and variants: `sd21-base@8gb@trial` is Stable Diffusion on 8 GB, tried in a few minutes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace

from helpers.presets.catalogue import PRESETS
from helpers.presets.configuration import ATTENTION, LINEAR, Datasets, Preset, TrainConfig
from helpers.presets.memory import MEMORY, cut_to_fit

PRECISION: dict[str, dict] = {
    "fp32": {"dtype": "float32", "mixed_precision": "no"},
    "bf16": {"dtype": "bfloat16", "mixed_precision": "bf16"},
    "fp16": {"dtype": "float16", "mixed_precision": "fp16"},
}
# The settings of two trainers that many people know, to compare with the homework's.
TRAINERS: dict[str, dict] = {
    # diffusers' train_text_to_image_lora.py as its documentation calls it: 15,000 steps of 4 pictures
    "hf": {
        **{"steps": 15_000, "batch_size": 4, "rank": 4, "alpha": 4.0, "targets": ATTENTION, "learning_rate": 1e-4},
        **{"lr_schedule": "cosine", "caption_dropout": 0.0, "validation_steps": 1500, "checkpoint_every": 500},
    },
    # the defaults of kohya's train_network.py, with its example's rate: alpha 1, the text encoder's attention too
    "kohya": {
        **{"steps": 1600, "batch_size": 1, "rank": 4, "alpha": 1.0, "targets": LINEAR, "learning_rate": 1e-4},
        **{"lr_schedule": "constant", "caption_dropout": 0.0, "train_text_encoder": True, "validation_steps": 400},
    },
}
VARIANTS = (*MEMORY, *PRECISION, *TRAINERS, "trial", "gates")


def as_trial(preset: Preset) -> Preset:
    """The preset with the smallest budgets with which everything still runs: 2 steps, a few pictures."""
    rows = {"train_rows": 8, "held_out_rows": 4}
    datasets = Datasets(
        replace(spec, **rows if spec.held_out_rows else {"train_rows": rows["train_rows"]}) for spec in preset.datasets
    )
    train = replace(
        preset.train,
        steps=2,
        batch_size=2,
        gradient_accumulation_steps=min(2, preset.train.gradient_accumulation_steps),
        validation_epochs=1000,
        early_validations=(),
        checkpoint_every=1,
        held_out_eval=2,
    )
    few = replace(preset, num_inference_steps=2, eval_prompts=4, control_prompts=2)
    return replace(few, datasets=datasets, train=train, trial=True)


def with_variant(preset: Preset, variant: str) -> Preset:
    """The preset in one of its VARIANTS, or at a size such as "256px" (a multiple of 64, as the U-Net halves it).

    Raises ValueError for an unknown one, or one that is not for this model.
    """
    size = int(variant[:-2]) if variant.endswith("px") and variant[:-2].isdecimal() else 0
    if variant not in VARIANTS and (not size or size % 64):
        known = ", ".join(VARIANTS)
        raise ValueError(f"unknown variant {variant!r} of a preset; known: {known}, and sizes such as 256px")
    if not preset.on_hub and variant not in PRECISION:
        raise ValueError(f"{variant!r} is for Stable Diffusion; MiniSD is small, and its trial is the preset 'smoke'")
    if variant == "trial":
        return as_trial(preset)
    if variant == "gates":
        return replace(preset, gates=True)
    if size:
        return replace(preset, resolution=size)
    return (
        cut_to_fit(preset, MEMORY[variant]) if variant in MEMORY else replaced(preset, (PRECISION | TRAINERS)[variant])
    )


def variant_kind(variant: str) -> str:
    """What a variant chooses: "memory", "precision", "trainer", "trial", "gates" or, as the sizes do, "size"."""
    kinds: dict[str, Collection[str]] = {"memory": MEMORY, "precision": PRECISION, "trainer": TRAINERS}
    kinds |= {"trial": ("trial",), "gates": ("gates",)}
    return next((kind for kind, known in kinds.items() if variant in known), "size")


def replaced(preset: Preset, settings: dict) -> Preset:
    """The preset with fields of its own, or of its `TrainConfig`, replaced. Raises ValueError for an unknown one."""
    own = {f.name for f in fields(Preset)}
    training = {f.name for f in fields(TrainConfig)}
    for key in settings:
        if key not in own | training:
            raise ValueError(f"unknown setting {key!r}; known: {', '.join(sorted(own | training))}")
    changed = {k: v for k, v in settings.items() if k in training}
    preset = replace(preset, **{k: v for k, v in settings.items() if k in own})
    return replace(preset, train=replace(preset.train, **changed)) if changed else preset


def get_preset(name: str, **overrides) -> Preset:
    """The preset of that name, in its variants if there are any behind an "@", with some fields replaced.

    overrides: fields of `Preset` (`guidance_scale=3.0`) or of its `TrainConfig` (`steps=10`).
    Raises ValueError for an unknown preset, variant or field, naming those that are known.
    """
    base, *variants = name.split("@")
    if base not in PRESETS:
        raise ValueError(f"unknown preset {base!r}; known: {', '.join(PRESETS)}")
    kinds = [variant_kind(variant) for variant in variants]
    if twice := [variant for variant, kind in zip(variants, kinds, strict=True) if kinds.count(kind) > 1]:
        raise ValueError(f"the variants {' and '.join(twice)} of {name!r} contradict each other: take one of them")
    preset = PRESETS[base]
    # What fits depends on size and precision; a trial makes small what the others say
    order = ("size", "precision", "trainer", "memory", "gates", "trial")
    for variant in sorted(variants, key=lambda variant: order.index(variant_kind(variant))):
        preset = with_variant(preset, variant)
    return replaced(replace(preset, name=name), overrides)

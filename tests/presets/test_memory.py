"""What training takes: bytes counted from Stable Diffusion's shapes at its own size, and the variants that follow."""

import pytest
from kept_bytes import kept_bytes

from helpers.presets import memory
from helpers.presets.configuration import LINEAR
from helpers.presets.memory import MEMORY, cut_to_fit, rungs, training_gib
from helpers.presets.variants import get_preset

REAL = ("sd21-base", "sd21", "sd15")


@pytest.mark.parametrize(
    ("name", "settings", "precision"),
    [
        ("sd21-base", {}, "bf16"),
        ("sd21", {}, "fp16"),
        ("sd15", {}, "bf16"),
        ("sd21-base", {"targets": LINEAR}, "bf16"),
        ("sd21-base", {}, "no"),
        ("sd21-base", {"gradient_checkpointing": True}, "bf16"),
        ("sd21-base", {"gradient_checkpointing": True}, "no"),
    ],
)
def test_the_table_is_what_a_step_keeps(name, settings, precision):
    """Never less than what is counted, and at most a sixth more."""
    preset = get_preset(name, **settings)
    area = (preset.resolution / memory.KEPT_SIDE) ** 2
    key = ("full" if precision == "no" else "half", preset.train.gradient_checkpointing)
    said = memory.KEPT_GB[key] * area * (memory.MORE_TARGETS if settings.get("targets") else 1)
    counted = kept_bytes(name, preset, precision) / memory.GB
    assert counted <= said <= 1.17 * counted, counted


def test_what_is_kept_grows_with_the_pictures():
    one, two = (kept_bytes("sd21-base", get_preset("sd21-base@256px"), "bf16", count) for count in (1, 2))
    assert one < two <= 2 * one


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("size", ["", "@256px", "@512px"])
@pytest.mark.parametrize("variant", MEMORY)
def test_every_variant_fits_its_gpu(name, size, variant):
    assert training_gib(get_preset(f"{name}@{variant}{size}")) <= MEMORY[variant]


def test_parts_are_as_large_as_the_memory_allows():
    """Of each variant that cuts a batch, parts twice as large would not fit; checkpointing comes last of all."""
    for name in REAL:
        preset = get_preset(name)
        for variant, gib in MEMORY.items():
            train = cut_to_fit(preset, gib).train
            if train.gradient_accumulation_steps > 1:
                larger = {"gradient_accumulation_steps": train.gradient_accumulation_steps // 2}
                larger["gradient_checkpointing"] = train.gradient_checkpointing
                assert training_gib(get_preset(name, **larger)) > gib, (name, variant)
            if train.gradient_checkpointing:
                one = {"gradient_accumulation_steps": preset.train.batch_size}
                assert training_gib(get_preset(name, **one)) > gib, (name, variant)


def test_the_variants_of_each_size():
    """What README, doctor and benchmark stand on: (parts, checkpointed) by variant, where they differ."""

    def said(name):
        return {variant: tuple(settings.values()) for variant, settings in rungs(get_preset(name)).items()}

    assert said("sd21-base") == said("sd15") == {"16gb": (2, False), "8gb": (8, False)}
    assert said("sd21") == {"24gb": (2, False), "16gb": (4, False), "12gb": (8, False), "8gb": (8, True)}
    assert said("sd21-base@256px") == {"8gb": (2, False)}


def test_float32_takes_more_than_half_precision():
    for name in REAL:
        preset = get_preset(name)
        assert training_gib(get_preset(f"{name}@fp32")) == training_gib(preset, on_gpu=False) > training_gib(preset)
    assert get_preset("sd21-base@12gb@fp32").train.gradient_accumulation_steps > 2

"""What `course train` leaves and says at its end: two pictures beside the adapter, and how to use it elsewhere."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from helpers.base.files import atomic_path
from helpers.base.paths import ROOT, short
from helpers.cli.messages import DEFAULT
from helpers.presets.configuration import Preset

if TYPE_CHECKING:
    from helpers.training.runs import Run

COLUMNS = 8  # validations on the sheet, evenly spread, the first and the last among them


def print_ending(preset: Preset, run: Run) -> None:
    """Write the pictures (not into the repository's own runs) and say where everything goes."""
    if run.source != "reference":
        for what, path in leave_pictures(run).items():
            print(f"{what}: {short(path)}")
    print("\n".join(ways_to_use(preset, run)))


def leave_pictures(run: Run) -> dict[str, Path]:
    """{what it shows: path}: the evolution, a row a prompt and a column a validation, and its first and last column.

    The first validation comes before the first step, when the adapter changes nothing: it is the base model. Empty
    for a run with fewer than two validations.
    """
    from helpers.course.figures import contact_sheet

    steps = [step for step, _ in run.validations()]
    if len(steps) < 2:
        return {}
    last = len(steps) - 1
    some = sorted({steps[i * last // (COLUMNS - 1)] for i in range(COLUMNS)})
    left = {}
    for what, chosen in {"evolution": some, "before and after": [some[0], some[-1]]}.items():
        columns = [run.validation_pictures(step) for step in chosen]
        left[what] = run.adapter.parent / f"{what.replace(' ', '_')}.png"
        with atomic_path(left[what]) as temporary:
            # one picture after another goes along the rows
            contact_sheet([p for row in zip(*columns, strict=True) for p in row], len(chosen)).save(temporary)
    return left


def ways_to_use(preset: Preset, run: Run) -> list[str]:
    """The adapter in this course, in diffusers and in ComfyUI or AUTOMATIC1111, each as a command or a place."""
    chosen = "" if preset.name == DEFAULT else f" --preset {preset.name}"
    name = shlex.quote(run.dataset)
    prompt = shlex.quote(" ".join(next(iter(preset.validation_prompts.get(run.dataset, ())), "a prompt").split()))
    base = preset.model if preset.on_hub else str(short(ROOT / preset.model))
    lines = [
        f"draw with it: course sample{chosen} --prompt {prompt} --adapter {name}",
        "in diffusers:",
        "    from diffusers import StableDiffusionPipeline",
        f"    pipeline = StableDiffusionPipeline.from_pretrained({base!r})",
        f"    pipeline.load_lora_weights({short(run.adapter.parent)!r}, weight_name={run.adapter.name!r})",
    ]
    if not preset.on_hub:
        return [
            *lines,
            "in ComfyUI or AUTOMATIC1111: they have no MiniSD; for them train with --preset sd15 or sd21-base",
        ]
    return [
        *lines,
        f"in ComfyUI or AUTOMATIC1111: course adapter convert{chosen} {name} {name}.safetensors,",
        "    then put it into ComfyUI/models/loras or stable-diffusion-webui/models/Lora",
    ]

"""`course sample`: pictures from prompts, with an adapter or without."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from helpers.base.paths import runs_folder
from helpers.cli.adapter import find_adapter, origin_of
from helpers.cli.messages import warn_without_gpu
from helpers.presets.configuration import Preset
from helpers.presets.variants import get_preset


def sample_pictures(given: argparse.Namespace) -> int:
    """`course sample`: one picture for each prompt and seed, in one PNG with a row a prompt."""
    from helpers.base.errors import CourseError
    from helpers.base.paths import short

    preset = get_preset(given.preset)
    if given.count < 1 or (given.steps is not None and given.steps < 1):
        raise CourseError("--count and --steps must be at least 1")
    warn_without_gpu(preset)
    adapter = find_adapter(preset, given.adapter) if given.adapter else None
    pictures = draw(preset, given, adapter)
    words = "-".join(re.findall(r"\w+", given.prompt[0].lower())[:8]) or "empty"
    output = given.output or runs_folder() / preset.name / "samples" / f"{words}-seed{given.seed}.png"
    if output.suffix.lower() != ".png":
        raise CourseError(f"--output must end in .png, not {output.name!r}")
    from helpers.base.files import atomic_path
    from helpers.course.figures import contact_sheet

    with atomic_path(output) as temporary:
        contact_sheet(pictures, columns=given.count).save(temporary)
    print(f"{len(pictures)} pictures: {short(output.resolve())}")
    return 0


def draw(preset: Preset, given: argparse.Namespace, adapter: Path | None) -> list[Any]:
    """The pictures that `course sample` was asked for, prompt by prompt."""
    from contextlib import nullcontext

    from helpers import lora
    from helpers.adapters.loading import load_adapter
    from helpers.diffusion.components import load_components
    from helpers.diffusion.sampling import generate

    components = load_components(preset, given.device)
    if adapter is not None:
        expect = origin_of(preset, given.other_base)
        for note in load_adapter(adapter, components.unet, components.text_encoder, expect)["notes"]:
            print(f"note: {adapter.name}: {note}")
    prompts = [prompt for prompt in given.prompt for _ in range(given.count)]
    seeds = [given.seed + number for _ in given.prompt for number in range(given.count)]
    settings = {
        "num_inference_steps": given.steps or preset.num_inference_steps,
        "guidance_scale": preset.guidance_scale if given.guidance is None else given.guidance,
    }
    with lora.scaled(components.unet, given.scale) if adapter is not None else nullcontext():
        return generate(components, prompts, seeds, **settings)

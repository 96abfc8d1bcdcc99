"""`course train`: what notebook 04 does, from the shell, on a preset's dataset or on one's own pictures."""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.base.errors import CourseError
from helpers.base.paths import ROOT, short
from helpers.cli.adapter import find_adapter
from helpers.cli.messages import DEFAULT
from helpers.presets.configuration import DatasetSpec, Preset, TrainConfig
from helpers.presets.variants import get_preset

if TYPE_CHECKING:
    from helpers.training.runs import Run

# Options: those that go with --data, and those that are settings of a `TrainConfig`.
OF_DATA = ("image_column", "text_column", "caption", "revision", "held_out")
SETTINGS = ("rank", "alpha", "steps", "batch_size", "learning_rate", "seed")
COLUMNS = 8  # validations on the sheet, evenly spread, the first and the last among them


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options, all but --preset."""
    parser.add_argument("--dataset", help="a dataset of the preset, or a name for the pictures of --data")
    text = "your own pictures: a folder, a .parquet file, or a dataset of the Hugging Face hub as OWNER/NAME"
    parser.add_argument("--data", metavar="WHERE", help=text)
    parser.add_argument("--image-column", metavar="NAME", help="of --data, the column of pictures (default: image)")
    text = "of --data, the column of captions (default: text)"
    parser.add_argument("--text-column", "--caption-column", metavar="NAME", help=text)
    parser.add_argument("--caption", metavar="TEXT", help="of --data, the caption of every picture without one")
    text = "of a hub dataset, the commit, tag or branch (default: what its first download finds)"
    parser.add_argument("--revision", help=text)
    parser.add_argument("--held-out", type=int, metavar="N", help="of --data, keep the last N to measure with (0)")
    parser.add_argument("--rank", type=int, help="of the LoRA; alpha becomes the same unless it is given too")
    parser.add_argument("--alpha", type=float, help="the LoRA is scaled by alpha / rank")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, help="pictures a step")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--seed", type=int)
    text = "any other setting, such as use_rslora=True; those not given are the preset's"
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=text)
    parser.add_argument("--from-scratch", action="store_true", help="do not take the repository's finished run")
    parser.add_argument("--force", action="store_true", help="throw an existing run away and train again")
    text = "log there too; may be repeated (Weights & Biases stays offline unless WANDB_MODE=online)"
    parser.add_argument("--tracker", action="append", choices=["wandb", "tensorboard"], help=text)
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    text = "keep the finished run in the repository as its reference"
    parser.add_argument("--export-reference", action="store_true", help=text)


def train_adapter(given: argparse.Namespace) -> int:
    """`course train`: one adapter of a preset's dataset, or of one's own captioned pictures."""
    first = is_first()
    preset = preset_with(given.preset, train_settings(given))
    if given.data:
        from helpers.data.look import look_at
        from helpers.data.own import with_own_pictures

        source = source_of(given)
        if first and not source.source.startswith("hub:"):
            print(look_at(source, whole=False))
        preset, name = with_own_pictures(preset, source, given.held_out or 0)
    elif needless := [name for name in OF_DATA if getattr(given, name) is not None]:
        raise CourseError(f"{option(needless[0])} goes with --data WHERE")
    elif given.dataset is None:
        raise CourseError(f"name a dataset: --dataset {' or '.join(preset.datasets.known)}, or pictures: --data WHERE")
    else:
        name = preset.datasets[given.dataset].name
    from helpers.presets.machine import notes_without_gpu
    from helpers.training.loop import train

    for note in notes_without_gpu(preset):
        print(f"note: {note}")
    run = train(preset, name, given.from_scratch, given.force, tracker=given.tracker, device=given.device)
    if not first:
        return 0
    print(f"{run.source}: {short(run.dir)}/")
    print(f"adapter: {short(run.adapter)}")
    if skipped := run.done.get("skipped_steps"):
        print(f"skipped: {skipped} of {run.done['steps']} steps, whose gradients overflowed in fp16")
    print_ending(preset, run)
    if given.export_reference and run.source != "reference":
        from helpers.training.runs import export_reference

        print(f"reference: {short(export_reference(run))}/")
    return 0


def is_first() -> bool:
    """Whether this process tells what is done, of several that torchrun may have started."""
    return os.environ.get("RANK", "0") == "0"


def option(name: str) -> str:
    """A setting's name as an option of the command line."""
    return "--" + name.replace("_", "-")


def train_settings(given: argparse.Namespace) -> dict[str, Any]:
    """What --set and the options of their own name say. A --rank alone brings an equal alpha."""
    settings = parse_settings(given.set)
    options = {name: getattr(given, name) for name in SETTINGS if getattr(given, name) is not None}
    if twice := [name for name in options if name in settings]:
        raise ValueError(f"{twice[0]} is given twice: by {option(twice[0])} and by --set")
    if "rank" in options and "alpha" not in options | settings:
        options["alpha"] = float(options["rank"])
    return settings | options


def source_of(given: argparse.Namespace) -> DatasetSpec:
    """All rows of --data as a dataset to train on: a folder, a .parquet file, else a name on the hub."""
    path = Path(given.data).expanduser()
    if path.is_dir():
        source, name = f"folder:{path.resolve()}", path.resolve().name
    elif path.is_file() and path.suffix == ".parquet":
        source, name = f"parquet:{path.resolve()}", path.stem
    elif path.exists():
        raise ValueError(f"{path} is neither a folder nor a .parquet file")
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", given.data) and path.suffix != ".parquet":
        source, name = f"hub:{given.data}", path.name
        print(f"there is no folder {path} here: this is {given.data} of the Hugging Face hub")
    else:
        raise ValueError(f"there is no folder or .parquet file {path}, and it is no OWNER/NAME of the Hugging Face hub")
    if given.revision and not source.startswith("hub:"):
        raise ValueError(f"--revision is for datasets of the Hugging Face hub, and {path} is on this machine")
    name = given.dataset or re.sub(r"\W+", "_", name) or "pictures"
    if not re.fullmatch(r"\w[\w .-]*", name):
        raise ValueError(f"--dataset {name!r} must be letters, digits, dots, hyphens or underscores: it names a folder")
    image, text = given.image_column or "image", given.text_column or "text"
    spec = DatasetSpec(name, source, image, text, train_rows=sys.maxsize, held_out_rows=0, revision=given.revision)
    return replace(spec, caption=(given.caption or "").strip())


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """{"steps": 200} from ["steps=200"]: Python's numbers, True, None and tuples, anything else a string."""
    settings = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip().isidentifier():
            raise ValueError(f"--set takes NAME=VALUE, not {pair!r}")
        try:
            settings[name.strip()] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            settings[name.strip()] = text.strip()
    return settings


def preset_with(name: str, settings: dict[str, Any]) -> Preset:
    """The preset with settings replaced. Raises ValueError for an unknown one, and for one of the wrong kind."""
    preset = get_preset(name)
    known = {f.name: getattr(preset.train, f.name) for f in fields(TrainConfig)}
    known |= {f.name: getattr(preset, f.name) for f in fields(Preset)}
    for key, value in settings.items():
        default = known.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(default, bool) != isinstance(value, bool) and isinstance(default, bool):
            raise ValueError(f"{key} is True or False, not {value!r}")
        if isinstance(default, int) and not isinstance(default, bool) and not isinstance(value, int):
            raise ValueError(f"{key} is a whole number, not {value!r}")
        if isinstance(default, float) and not is_number:
            raise ValueError(f"{key} is a number, not {value!r}")
        if isinstance(default, tuple) and not isinstance(value, tuple):
            raise ValueError(f"{key} is a tuple such as {default!r}, not {value!r}")
    # One spelling for one value, since a run's key is made from it: alpha=8 is alpha=8.0
    settings = {key: float(v) if isinstance(known.get(key), float) else v for key, v in settings.items()}
    return get_preset(name, **settings)


# --- its end --------------------------------------------------------------------------------------------------------
def print_ending(preset: Preset, run: Run) -> None:
    """Write the pictures (not into the repository's own runs) and say where everything goes."""
    if run.source != "reference":
        for what, path in leave_pictures(run).items():
            print(f"{what}: {short(path)}")
    print("\n".join(ways_to_use(preset, run)))


def leave_pictures(run: Run) -> dict[str, Path]:
    """{what it shows: path}: the evolution, a row a prompt and a column a validation, and its first and last column.

    The first validation comes before the first step, when the adapter changes nothing: it is the base model. Empty
    for a run with fewer than two validations, or without prompts to validate with.
    """
    from helpers.base.files import atomic_path
    from helpers.course.figures import contact_sheet

    steps = [step for step, _ in run.validations()]
    if len(steps) < 2 or not run.validation_pictures(steps[0]):
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
    adapter, file = shlex.quote(adapter_of(preset, run)), shlex.quote(f"{run.dataset}.safetensors")
    prompt = shlex.quote(" ".join(next(iter(preset.validation_prompts.get(run.dataset, ())), "a prompt").split()))
    base = preset.model if preset.on_hub else typed(ROOT / preset.model)
    lines = [
        f"draw with it: course sample{chosen} --prompt {prompt} --adapter {adapter}",
        "in diffusers:",
        "    from diffusers import StableDiffusionPipeline",
        f"    pipeline = StableDiffusionPipeline.from_pretrained({base!r})",
        f"    pipeline.load_lora_weights({typed(run.adapter.parent)!r}, weight_name={run.adapter.name!r})",
    ]
    if not preset.on_hub:
        return [
            *lines,
            "in ComfyUI or AUTOMATIC1111: they have no MiniSD; for them train with --preset sd15 or sd21-base",
        ]
    return [
        *lines,
        f"in ComfyUI or AUTOMATIC1111: course adapter convert{chosen} {adapter} {file},",
        "    then put it into ComfyUI/models/loras or stable-diffusion-webui/models/Lora",
    ]


def adapter_of(preset: Preset, run: Run) -> str:
    """The run's adapter as `--adapter` takes it: the dataset's name where that stands for this very run, else the file.

    A dataset of the course stands for its run with the preset's own settings.
    """
    try:
        found = find_adapter(get_preset(preset.name), run.dataset)
    except CourseError:  # no such run
        found = None
    return run.dataset if found == run.adapter else typed(run.adapter)


def typed(path: Path) -> str:
    """The path as commands and programs take it where one is: relative if it lies below, else whole."""
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else str(path)

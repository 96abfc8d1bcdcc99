"""`course adapter show | convert | merge | extract`: adapter files at the prompt.

An adapter is a file, a folder, or the name of a dataset, which stands for the adapter of its finished run.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from helpers.presets.catalogue import PRESETS
from helpers.presets.configuration import Preset
from helpers.presets.variants import get_preset


def add_commands(parser: argparse.ArgumentParser, default: str) -> None:
    """The four commands, below `course adapter`."""
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        command.add_argument("--preset", default=default, help=f"one of {', '.join(PRESETS)} (default: {default})")
        return command

    show = add("show", show_adapter, "say what is in an adapter's file")
    show.add_argument("adapter", help="a file, a folder, or a dataset with a finished run")

    convert = add("convert", convert_adapter, "write an adapter in another layout")
    convert.add_argument("adapter", help="a file, a folder, or a dataset with a finished run")
    convert.add_argument("output", type=Path, metavar="FILE.safetensors")
    convert.add_argument("--layout", default="kohya", choices=["diffusers", "kohya"], help="default: kohya")

    merge = add("merge", merge_adapters, "write a base model with adapters merged into its weights")
    merge.add_argument(
        "adapters", nargs="+", metavar="ADAPTER[=WEIGHT]", help="several are added up, as in doodles=0.6"
    )
    merge.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="in diffusers layout")
    merge.add_argument("--other-base", action="store_true", help="they were made for another base model: try it")

    extract = add("extract", extract_adapter, "cut an adapter out of the difference of two U-Nets")
    extract.add_argument("tuned", type=Path, metavar="FOLDER", help="a fine-tuned model in diffusers layout")
    extract.add_argument("--output", type=Path, required=True, metavar="FILE.safetensors")
    extract.add_argument("--rank", type=int, default=16, help="default: 16")
    extract.add_argument("--targets", help="names or ends of names, with commas (default: the preset's)")


def find_adapter(preset: Preset, adapter: str) -> Path:
    """A file or folder as it is; the name of a dataset stands for its finished run's adapter.

    The name of pictures of one's own (`course train --data my_pictures`) stands for the newest finished run on them,
    also where the folder of pictures lies here under that name. Raises CourseError for a dataset without such a run.
    """
    from helpers.adapters.reading import adapter_file
    from helpers.base.errors import CourseError
    from helpers.base.hub import HubError
    from helpers.training.runs import find_run, newest_run, run_key

    if adapter not in preset.datasets.known or Path(adapter).exists():
        own = None if adapter_file(adapter).exists() else newest_run(preset, Path(adapter).name)
        return own.adapter if own else Path(adapter)
    try:
        run, reason = find_run(preset, adapter, run_key(preset, adapter)), None
    except HubError as error:  # without its data set a run cannot be told from others
        run, reason = None, error
    if run is None:
        raise CourseError(
            f"there is no finished run on {adapter!r}: `course train --preset {preset.name} --dataset {adapter}`"
        ) from reason
    return run.adapter


def origin_of(preset: Preset, other_base: bool) -> dict[str, str]:
    """What an adapter's metadata must not contradict to be used with the preset's model; see `check_origin`.

    other_base: another base model may be tried. Another prediction type may not: what the adapter has learned would be
    read as what it is not. Raises ComponentsError when the base model is missing.
    """
    from helpers.diffusion.weights import weights_fingerprint

    expect = {"prediction_type": preset.prediction_type}
    return expect if other_base else expect | {"base_model_hash": weights_fingerprint(preset)}


def show_adapter(given: argparse.Namespace) -> int:
    """`course adapter show`: layout, rank, alpha, targets, size, the norm of each block, provenance."""
    from helpers.adapters.cards import inspect

    print(inspect(find_adapter(get_preset(given.preset), given.adapter)))
    return 0


def convert_adapter(given: argparse.Namespace) -> int:
    """`course adapter convert`: the same adapter in the layout of diffusers or of kohya's trainers."""
    from helpers.adapters.reading import read_adapter
    from helpers.adapters.writing import write_adapter

    adapter = read_adapter(find_adapter(get_preset(given.preset), given.adapter))
    if given.output.suffix != ".safetensors":
        raise ValueError(f"the output must end in .safetensors, not {given.output.name!r}")
    print(f"{adapter.layout} → {given.layout}: {write_adapter(given.output, adapter, given.layout)}")
    return 0


def merge_adapters(given: argparse.Namespace) -> int:
    """`course adapter merge`: the preset's model, with one adapter or a weighted sum merged in, as a folder."""
    from transformers.utils.logging import disable_progress_bar

    from helpers import lora
    from helpers.adapters.loading import put_into
    from helpers.base.files import atomic_path
    from helpers.diffusion.components import as_pipeline, load_components

    preset = get_preset(given.preset)
    adapter = weighted_sum(preset, given.adapters, origin_of(preset, given.other_base))
    components = load_components(preset, "cpu")
    put_into(adapter, components.unet, components.text_encoder, " + ".join(given.adapters))
    for model in (components.unet, components.text_encoder):
        layers = lora.lora_layers(model)
        lora.merge(model)
        merged = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        lora.remove(model)
        for name, weight in merged.items():
            model.get_submodule(name).weight.data = weight
    disable_progress_bar()
    with atomic_path(given.output) as unfinished:
        as_pipeline(components).save_pretrained(unfinished)
    print(f"{len(adapter.layers)} layers merged into {components.title}: {given.output}/")
    return 0


def weighted_sum(preset: Preset, given: list[str], expect: dict[str, Any]) -> Any:
    """One adapter from ["doodles"] or ["doodles=0.6", "vintage=0.4"], each checked by `check_origin`."""
    from helpers.adapters.configuration import Adapter
    from helpers.adapters.loading import read_matching
    from helpers.lora.lowrank import compose

    found = []
    for text in given:
        name, equals, weight = text.rpartition("=") if not Path(text).exists() else (text, "", "")
        if equals and not is_finite(weight):
            raise ValueError(f"{text!r}: what follows the = is the adapter's weight, a number such as 0.6")
        path = find_adapter(preset, name if equals else text)
        found.append((read_matching(path, expect), float(weight) if equals else 1.0))
    if len(found) == 1 and found[0][1] == 1:
        return found[0][0]
    return Adapter(compose([(adapter.layers, weight) for adapter, weight in found]))


def is_finite(text: str) -> bool:
    """Whether the text is a number, neither infinite nor NaN."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def extract_adapter(given: argparse.Namespace) -> int:
    """`course adapter extract`: the best adapter of a rank for what fine-tuning changed, and what it leaves out."""
    from helpers.adapters.configuration import Adapter
    from helpers.adapters.writing import write_adapter
    from helpers.diffusion.components import load_components
    from helpers.diffusion.weights import weights_fingerprint
    from helpers.lora.lowrank import extract

    preset = get_preset(given.preset)
    targets = given.targets.split(",") if given.targets else list(preset.train.targets)
    if given.rank < 1 or given.output.suffix != ".safetensors":
        raise ValueError("--rank must be at least 1, and --output end in .safetensors")
    components = load_components(preset, "cpu")
    tuned = read_unet(given.tuned)
    layers, errors = extract(components.unet, tuned, given.rank, targets)
    said = {"base_model": components.name, "base_model_hash": weights_fingerprint(preset)}
    said |= {"extracted_from": given.tuned.name, "prediction_type": components.prediction_type}
    adapter = Adapter({f"unet.{name}": weights for name, weights in layers.items()}, {"unet": targets}, said)
    path = write_adapter(given.output, adapter)
    for name, error in sorted(errors.items(), key=lambda item: -item[1])[:5]:
        print(f"  {name:64} error {error:7.2%}")
    share, outside = left_out(components.unet, tuned, layers)
    print(f"{len(layers)} layers of rank {given.rank}: {share:.2%} of the update's norm is left out")
    print(f"{outside} other tensors differ too and are in no adapter of these targets")
    print(f"adapter: {path}")
    return 0


def read_unet(folder: Path) -> Any:
    """The U-Net of a folder in diffusers layout: the whole model's, or the U-Net's own."""
    import torch
    from diffusers import UNet2DConditionModel

    folder = folder / "unet" if (folder / "unet").is_dir() else folder
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: there is no U-Net in diffusers layout here (no config.json)")
    return UNet2DConditionModel.from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32)


def left_out(base: Any, tuned: Any, layers: dict[str, Any]) -> tuple[float, int]:
    """||Delta W - B A|| / ||Delta W|| over all the adapter's layers together, and how many other tensors differ."""
    old, new = base.state_dict(), tuned.state_dict()
    missed = whole = 0.0
    for name, weights in layers.items():
        delta = (new[f"{name}.weight"].float() - old[f"{name}.weight"].float()).cpu().double()
        whole += delta.square().sum().item()
        missed += (delta - weights.delta()).square().sum().item()
    adapted = {f"{name}.weight" for name in layers}
    outside = sum(1 for key in old.keys() - adapted if key not in new or not old[key].equal(new[key]))
    return (missed / whole) ** 0.5 if whole else 0.0, outside

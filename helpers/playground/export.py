"""A model and its adapters as files that a browser draws from: `python -m helpers.playground.export --out FOLDER`.

    text_encoder.onnx      token ids [B, L] to embeddings [B, L, D]
    unet.onnx              latents, a timestep, embeddings and an adapter's A and B to the U-Net's output
    decoder.onnx           latents [B, C, h, w] to pictures [B, 3, H, W] in 0..1
    doodles.safetensors …  the adapters as `course train` writes them, but in half precision
    tokenizer.json         vocabulary, merges, special tokens
    before.png, after.png  what the page shows before anything is loaded: without and with the adapter
    manifest.json          sizes, schedule and words: all else that the page knows of the model

There is no adapter in unet.onnx. A and B of all layers are two of its inputs: A side by side [r, sum of widths in],
B below each other [sum of widths out, r]. So one file serves every adapter, of every rank.
The page that draws from these files is `site/try/`; `make site` brings both together.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers import lora
from helpers.adapters.configuration import Adapter
from helpers.adapters.writing import short_targets, write_adapter
from helpers.base.errors import CourseError
from helpers.base.provenance import file_hash
from helpers.diffusion.components import Components
from helpers.lora.lowrank import LoRAWeights
from helpers.playground.engine import (
    FIRST,
    LIMITS,
    VERSION,
    Engine,
    Settings,
    build_prompt,
    known_words,
    png_with_settings,
)
from helpers.playground.widgets import PARTS, WORDS
from helpers.presets.variants import get_preset
from helpers.world.captions import COLORLESS_STYLES, LEADS
from helpers.world.scenes import HAIR_COLORS, SUBJECT_COLORS

OPSET = 17
SCALE = (-0.5, 1.5)  # of the adapter, on the page
FIRST_SEED = 1


# ---------------------------------------------------------------------------------------- the parts as modules
class TextEncoder(nn.Module):
    """Token ids int32 [B, L] to embeddings float32 [B, L, D], as `encode_tokens`."""

    def __init__(self, components: Components):
        super().__init__()
        self.text_encoder = components.text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings."""
        return self.text_encoder(input_ids.long())[0]


class Decoder(nn.Module):
    """Latents [B, C, h, w] to pictures float32 [B, 3, H, W] in 0..1, as `to_pictures`."""

    def __init__(self, components: Components):
        super().__init__()
        self.vae, self.scale = components.vae, components.vae.config.scaling_factor

    def forward(self, latents: Tensor) -> Tensor:
        """Pictures."""
        return (self.vae.decode(latents / self.scale).sample / 2 + 0.5).clamp(0, 1)


class Slot(nn.Module):
    """A linear layer and the place in the flat matrices where its A and B are."""

    def __init__(self, base: nn.Linear, first_column: int, first_row: int):
        super().__init__()
        self.base, self.first_column, self.first_row = base, first_column, first_row
        self.flat: list[Tensor] = []  # A and B of all layers, put here for the time of a call

    @property
    def weight(self) -> Tensor:
        """The base's weight, for model code that asks a layer for its weight's dtype or device."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the adapter's part, shaped as base(x)."""
        A = self.flat[0].narrow(1, self.first_column, self.base.in_features)
        B = self.flat[1].narrow(0, self.first_row, self.base.out_features)
        # y = W x + B A x: the scaling is in B
        return self.base(x) + F.linear(F.linear(x, A), B)


def linear(unet: nn.Module, name: str) -> nn.Linear:
    """The layer of this name. Raises CourseError for one that is not linear."""
    layer = unet.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise CourseError(f"the adapter changes {name}, which is not linear: the page has no place for it")
    return layer


class AdaptedUNet(nn.Module):
    """The U-Net as a function of its adapter. It takes the U-Net over: `restore` gives it back as it was.

    latents [B, C, h, w], timestep float32 [1], encoder_hidden_states [B, L, D], lora_A [r, sum of widths in] and
    lora_B [sum of widths out, r] give the output [B, C, h, w]. Raises CourseError for a layer that is not linear.
    """

    def __init__(self, unet: nn.Module, names: list[str]):
        super().__init__()
        self.unet, self.slots = unet, {}
        columns = rows = 0
        for name, base in [(name, linear(unet, name)) for name in names]:  # all are looked at before one is replaced
            self.slots[name] = Slot(base, columns, rows)
            columns, rows = columns + base.in_features, rows + base.out_features
            lora.replace_module(unet, name, self.slots[name])
        self.shape = columns, rows

    def forward(
        self, latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, lora_A: Tensor, lora_B: Tensor
    ) -> Tensor:
        """The U-Net's output: noise or velocity."""
        for slot in self.slots.values():
            slot.flat = [lora_A, lora_B]
        return self.unet(latents, timestep, encoder_hidden_states=encoder_hidden_states).sample

    def restore(self) -> None:
        """Take the slots out of the U-Net."""
        for name, slot in self.slots.items():
            lora.replace_module(self.unet, name, slot.base)


# ---------------------------------------------------------------------------------------------------- to files
def write_onnx(module: nn.Module, inputs: dict[str, Tensor], axes: dict[str, dict[int, str]], path: Path) -> None:
    """One module as an ONNX file. axes: which dimensions of which inputs are free, and their names."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer's, about sizes that are constant here, and of its age
        torch.onnx.export(
            module.eval(), tuple(inputs.values()), str(path), input_names=list(inputs), output_names=["output"],
            dynamic_axes=axes | {"output": {0: "batch"}}, opset_version=OPSET, dynamo=False,
        )  # fmt: skip
    model = onnx.load(str(path))
    halve(model)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def halve(model: onnx.ModelProto) -> None:
    """Store as float16 each weight that loses nothing by it; a Cast widens it again when the file is loaded."""
    casts = []
    for weight in model.graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.size < 16:
            continue
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if np.array_equal(half.astype(np.float32), values):
            name, stored = weight.name, f"{weight.name}.half"
            weight.CopyFrom(onnx.numpy_helper.from_array(half, stored))
            casts.append(onnx.helper.make_node("Cast", [stored], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def layer_names(unet: nn.Module, adapters: Mapping[str, Mapping[str, LoRAWeights]]) -> list[str]:
    """The layers that any of the adapters changes, in the U-Net's order."""
    changed = {name for adapter in adapters.values() for name in adapter}
    return [name for name, _ in unet.named_modules() if name in changed]


def flat(adapter: Mapping[str, LoRAWeights], unet: nn.Module, names: list[str]) -> tuple[Tensor, Tensor]:
    """A [r, sum of widths in] and B [sum of widths out, r] of all layers, the scaling in B: what the page computes too.

    r is the largest rank; what a layer lacks of it, or of an adapter, is zero.
    """
    rank = max((weights.rank for weights in adapter.values()), default=1)
    columns, rows = [], []
    for name in names:
        width_out, width_in = linear(unet, name).weight.shape
        A, B = torch.zeros(rank, width_in), torch.zeros(width_out, rank)
        if name in adapter:
            weights = adapter[name]
            A[: weights.rank], B[:, : weights.rank] = weights.A, weights.B * weights.scaling
        columns.append(A)
        rows.append(B)
    return torch.cat(columns, 1), torch.cat(rows, 0)


def write_json(path: Path, facts: Mapping[str, Any]) -> None:
    """Facts as a JSON file."""
    path.write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def write_models(components: Components, names: list[str], folder: Path) -> None:
    """The three networks as ONNX files."""
    c, batch = components, {0: "batch"}
    length = c.text_encoder.config.max_position_embeddings
    ids = torch.zeros(2, length, dtype=torch.int32)
    write_onnx(TextEncoder(c), {"input_ids": ids}, {"input_ids": batch}, folder / "text_encoder.onnx")
    latents = torch.zeros(2, *c.latent_shape)
    write_onnx(Decoder(c), {"latents": latents}, {"latents": batch}, folder / "decoder.onnx")
    adapted = AdaptedUNet(c.unet, names)
    try:
        columns, rows = adapted.shape
        inputs = {
            "latents": latents,
            "timestep": torch.ones(1),
            "encoder_hidden_states": torch.zeros(2, length, c.unet.config.cross_attention_dim),
            "lora_A": torch.zeros(2, columns),
            "lora_B": torch.zeros(rows, 2),
        }
        axes = {"latents": batch, "encoder_hidden_states": batch, "lora_A": {0: "rank"}, "lora_B": {1: "rank"}}
        write_onnx(adapted, inputs, axes, folder / "unet.onnx")
    finally:
        adapted.restore()


def write_adapters(engine: Engine, folder: Path) -> dict[str, str]:
    """Each adapter as NAME.safetensors; returns {name: file name}."""
    files = {}
    for name, layers in engine.adapters.items():
        halves = {
            f"unet.{layer}": dataclasses.replace(weights, A=weights.A.half(), B=weights.B.half())
            for layer, weights in layers.items()
        }
        targets: dict[str, list[str] | str] = {"unet": short_targets(engine.components.unet, layers)}
        about = {"base_model": engine.components.name, "dataset": name, "run": engine.keys.get(name, "")}
        files[name] = f"{name}.safetensors"
        write_adapter(folder / files[name], Adapter(halves, targets, about)).chmod(0o644)  # for a server to read
    return files


def tokenizer_facts(components: Components) -> dict[str, Any]:
    """Vocabulary, merges, special tokens and length of a CLIP tokenizer."""
    tokenizer = components.tokenizer
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return {
        "vocab": model["vocab"],
        "merges": [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]],
        "start": tokenizer.bos_token,
        "end": tokenizer.eos_token,
        "pad": tokenizer.pad_token,
        "length": components.text_encoder.config.max_position_embeddings,
    }


def first_settings(engine: Engine) -> Settings:
    """The picture that the page opens with: a portrait in the first adapter's style."""
    adapter = engine.choices[1] if len(engine.choices) > 1 else "none"
    text = build_prompt(adapter if adapter in LEADS else "render", **FIRST)
    return dataclasses.replace(engine.default(text), seed=FIRST_SEED, adapter=adapter)


def write_first(engine: Engine, first: Settings, folder: Path) -> None:
    """The first picture without and with its adapter, as before.png and after.png."""
    for name, settings in {"before": first.of_base, "after": first}.items():
        (folder / f"{name}.png").write_bytes(png_with_settings(engine.draw(settings), engine, settings))


def world() -> dict[str, Any]:
    """What the prompt builder offers, and the words that captions had in training."""
    return {
        "styles": [{"label": label, **style_words(style)} for label, style in WORDS.items()],
        "parts": {name: {"label": label, "options": options} for name, (label, options) in PARTS.items()},
        "first": FIRST,
        "hair": HAIR_COLORS,
        "colors": SUBJECT_COLORS,
        "known": sorted(known_words()),
    }


def style_words(style: str) -> dict[str, Any]:
    """How `build_prompt` begins and ends a sentence in a style, and whether it names colours."""
    text = build_prompt(style, subject="man", clothes_color="red", background="blue")
    lead, _, rest = text.partition(" a man")
    colors = style not in COLORLESS_STYLES
    return {
        "style": style,
        "lead": lead,
        "ending": rest.partition("background")[2] if colors else rest,
        "colors": colors,
    }


def export(engine: Engine, folder: Path, first: Settings | None = None) -> dict[str, Any]:
    """Write all files into a new folder, and return the manifest. Raises CourseError for what the page cannot draw.

    first: of the picture that the page opens with, by default `first_settings`.
    """
    first = first or first_settings(engine)
    c = engine.components
    schedule = c.noise_scheduler.config
    if schedule.beta_schedule != "scaled_linear":
        raise CourseError(f"the page knows the scaled-linear schedule, not {schedule.beta_schedule}")
    if any(weights.magnitude is not None for adapter in engine.adapters.values() for weights in adapter.values()):
        raise CourseError("the page draws with LoRA adapters, and one of these is DoRA")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    names = layer_names(c.unet, engine.adapters)
    write_models(c, names, folder)
    write_json(folder / "tokenizer.json", tokenizer_facts(c))
    adapters = write_adapters(engine, folder)
    write_first(engine, first, folder)
    manifest: dict[str, Any] = {
        "version": VERSION,
        "preset": engine.preset.name,
        "runs": engine.keys,
        "model": c.title,
        "picture": c.resolution,
        "latents": c.latent_shape,
        "prediction_type": c.prediction_type,
        "schedule": {name: schedule[name] for name in ("num_train_timesteps", "beta_start", "beta_end")},
        "layers": [[name, *reversed(linear(c.unet, name).weight.shape)] for name in names],
        "adapters": adapters,
        "limits": LIMITS | {"scale": SCALE},
        "first": dataclasses.asdict(first),
        "world": world(),
    }
    paths = sorted(folder.iterdir())
    manifest["files"] = {path.name: {"bytes": path.stat().st_size, "hash": file_hash(path)[:12]} for path in paths}
    write_json(folder / "manifest.json", manifest)
    return manifest


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Write a model and its adapters as files that a browser draws from.")
    parser.add_argument("--out", type=Path, required=True, help="the folder; what is in it is replaced")
    parser.add_argument("--preset", default="mini")
    given = parser.parse_args(arguments)
    try:
        manifest = export(Engine(get_preset(given.preset)), given.out)
    except CourseError as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    sizes = {name: file["bytes"] / 1e6 for name, file in manifest["files"].items()}
    listed = ", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items() if size > 0.1)
    print(f"export: {manifest['model']}, {sum(sizes.values()):.1f} MB: {listed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

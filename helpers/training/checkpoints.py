"""Checkpoints of a training run: a few MB after some optimizer steps, from any of which the run goes on.

    checkpoints/step-000950/
        adapter.safetensors      the LoRA matrices, as an adapter file that can be used by itself
        optimizer.safetensors    AdamW's moments of each of them (and their moving average, if there is one)
        state.json               step, seconds spent, versions (and the loss scale in fp16)

A checkpoint appears under its name when it is complete, and not before. No state of a random generator is kept: what
step k draws depends on k alone (see `helpers.training.draws`).
"""

from __future__ import annotations

import json
import shutil
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers import lora
from helpers.adapters import loading
from helpers.adapters import writing as adapters
from helpers.adapters.reading import read_adapter
from helpers.base import provenance
from helpers.base.files import new_folder, write_json_atomic
from helpers.presets.configuration import TrainConfig
from helpers.training.runs import Run, adapter_metadata
from helpers.training.steps import AVERAGE

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for each parameter


def named_parameters(parts: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The LoRA parameters of the trained parts ("unet", "text_encoder") by name, in the models' order."""
    return {
        f"{part}.{name}": parameter
        for part, model in parts.items()
        for name, parameter in zip(lora.lora_state_dict(model), lora.lora_parameters(model), strict=True)
    }


def save_checkpoint(run: Run, step: int, parts: dict[str, nn.Module], optimizer, seconds: float, scaler=None) -> None:
    """Adapter and optimizer state after `step` updates. parts: the trained ones; scaler: of the loss, in fp16."""
    moments = {}
    for name, parameter in named_parameters(parts).items():
        for kind, value in optimizer.state.get(parameter, {}).items():
            moments[f"{name}.{kind}"] = torch.as_tensor(value).detach().cpu().contiguous()
    with new_folder(run.checkpoint_dir(step)) as folder:
        metadata = adapter_metadata(run, step)
        unet, text_encoder = parts.get("unet"), parts.get("text_encoder")
        adapters.save_adapter(folder / "adapter.safetensors", unet, metadata, text_encoder)
        save_file(moments, folder / "optimizer.safetensors")
        state = {"step": step, "seconds": round(seconds, 1), "versions": provenance.versions()}
        if scaler is not None:
            state["scaler"] = scaler.state_dict()
        write_json_atomic(folder / "state.json", state)


def keep_checkpoints(run: Run, config: TrainConfig) -> None:
    """Delete all but the last `keep_checkpoints` regular checkpoints and the one with the lowest held-out loss."""
    steps = run.checkpoints()
    regular = [step for step in steps if step % config.checkpoint_every == 0 or step == config.steps]
    for step in steps:
        if step != run.best_step() and step not in regular[-config.keep_checkpoints :]:
            shutil.rmtree(run.checkpoint_dir(step), ignore_errors=True)


def read_checkpoint(run: Run, step: int) -> tuple[dict[str, Any], adapters.Adapter, dict[str, Tensor]]:
    """state.json, the adapter and the optimizer's moments of that checkpoint.

    Raises OSError, ValueError, KeyError or SafetensorError when a file is missing or broken.
    """
    folder = run.checkpoint_dir(step)
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    adapter = read_adapter(folder / "adapter.safetensors")
    return state, adapter, load_file(folder / "optimizer.safetensors")


@torch.no_grad()
def load_checkpoint(run: Run, step: int, parts: dict[str, nn.Module], optimizer, scaler=None) -> dict[str, Any]:
    """Put that checkpoint into the injected parts and their optimizer, bit for bit; returns state.json.

    Raises OSError, ValueError, KeyError or SafetensorError, and changes nothing, when it is broken or does not fit.
    """
    state, adapter, moments = read_checkpoint(run, step)
    weights: dict[str, torch.Tensor] = {}
    for part, model in parts.items():
        for name, layer in loading.with_prefix(part, model, adapter.of(part)).items():
            weights |= {f"{part}.{name}.{kind}": tensor for kind, tensor in layer.tensors().items()}
    parameters, loaded = named_parameters(parts), {}
    place = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    for name, parameter in parameters.items():
        i = place[id(parameter)]
        kinds = [*MOMENTS, AVERAGE] if f"{name}.{AVERAGE}" in moments else MOMENTS
        loaded[i] = {kind: moments[f"{name}.{kind}"] for kind in kinds}
        if not loaded[i]["exp_avg"].shape == weights[name].shape == parameter.shape:
            raise ValueError(f"{name} or its optimizer state has the wrong shape")
    if scaler is not None and "scaler" in state:  # begun in another precision: this one's scale starts anew
        scaler.load_state_dict(state["scaler"])
    optimizer.load_state_dict({"state": loaded, "param_groups": optimizer.state_dict()["param_groups"]})
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
    return state


def load_last_checkpoint(run: Run, parts: dict[str, nn.Module], optimizer, scaler=None) -> dict[str, Any]:
    """Load the newest checkpoint that can be read; {"step": 0, "seconds": 0.0} when there is none."""
    for step in reversed(run.checkpoints()):
        try:
            return load_checkpoint(run, step, parts, optimizer, scaler)
        except (OSError, ValueError, KeyError, SafetensorError):
            shutil.rmtree(run.checkpoint_dir(step), ignore_errors=True)  # torn by a crash: the one before will do
    return {"step": 0, "seconds": 0.0}

"""Training against the clock: a step counter with a time budget, a cosine schedule, a log, checkpoints and an EMA."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from helpers.base.files import atomic_path


class Ema:
    """Exponential moving average of the weights of several modules, with a warm-up: min(decay, (1+k)/(10+k))."""

    def __init__(self, modules: dict[str, nn.Module], decay: float):
        self.modules, self.decay = modules, decay
        self.weights = {name: _state(m) for name, m in modules.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average = decay * average + (1 - decay) * weights"""
        average = get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))
        for name, module in self.modules.items():
            now = {key: value for key, value in module.state_dict().items() if value.is_floating_point()}
            average([self.weights[name][key] for key in now], list(now.values()), None)

    def copy_to(self, modules: dict) -> None:
        """Load the average into the modules of these names."""
        for name, weights in self.weights.items():
            modules[name].load_state_dict(weights)


def _state(module: nn.Module) -> dict:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


class Budget:
    """Seconds of training for one stage, spent over any number of sittings in `folder`."""

    def __init__(self, folder: Path, seconds: float, log_every: int = 25, checkpoint_seconds: float = 300):
        self.folder, self.seconds = Path(folder), seconds
        self.log_every, self.checkpoint_seconds = log_every, checkpoint_seconds
        self.folder.mkdir(parents=True, exist_ok=True)
        self.step, self.pictures, self.spent, self._since = 0, 0, 0.0, time.monotonic()
        self._saved_at, self._losses = 0.0, []  # type: float, list[Tensor]
        self.state_file = self.folder / "state.json"
        if self.state_file.exists():
            state = json.loads(self.state_file.read_text())
            self.step, self.pictures, self.spent = state["step"], state["pictures"], state["seconds"]
            self._saved_at = self.spent

    def elapsed(self) -> float:
        """Seconds of training so far, earlier sittings included."""
        return self.spent + time.monotonic() - self._since

    def steps(self) -> Iterator[int]:
        """Step numbers until the budget is spent."""
        self._since = time.monotonic()
        while self.elapsed() < self.seconds:
            yield self.step
            self.step += 1

    def cosine(self, warmup_steps: int, floor: float = 0.02) -> float:
        """Multiplier of the learning rate: linear warm-up in steps, then half a cosine over the time budget."""
        warm = min(1.0, (self.step + 1) / warmup_steps)
        return warm * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, self.elapsed() / self.seconds))))

    def learn(self, loss: Tensor, optimizer: torch.optim.Optimizer, ema: Ema, pictures: int) -> None:
        """One update of what the optimizer trains, from a gradient of norm 1 at most, and of the average; logged."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        ema.update(self.step)
        self.log(loss, pictures)

    def log(self, loss: Tensor, pictures: int) -> None:
        """Count the pictures of this step; append the mean loss of the last `log_every` steps to log.jsonl.

        Reading a loss waits for the GPU, so that it is done only then.
        """
        self.pictures += pictures
        self._losses.append(loss.detach().clone())
        if (self.step + 1) % self.log_every == 0:
            mean = float(sum(self._losses)) / len(self._losses)
            row = {"step": self.step + 1, "seconds": round(self.elapsed(), 1), "loss": round(mean, 5)}
            row["pictures"] = self.pictures
            with (self.folder / "log.jsonl").open("a") as f:
                f.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
            self._losses.clear()

    def checkpoint(self, modules: dict[str, nn.Module], optimizer, ema: Ema, force: bool = False) -> bool:
        """Save everything needed to go on, every `checkpoint_seconds`; True when it did."""
        if not force and self.elapsed() - self._saved_at < self.checkpoint_seconds:
            return False
        self._saved_at = self.elapsed()
        tensors = {f"weights.{n}.{k}": v for n, m in modules.items() for k, v in m.state_dict().items()}
        tensors |= {f"ema.{n}.{k}": v for n, weights in ema.weights.items() for k, v in weights.items()}
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
        with atomic_path(self.folder / "checkpoint.safetensors") as path:
            save_file({k: v.contiguous().cpu().clone() for k, v in tensors.items()}, path)
        with atomic_path(self.state_file) as path:
            state = {"step": self.step + 1, "seconds": self._saved_at, "pictures": self.pictures}
            path.write_text(json.dumps(state))
        return True

    def resume(self, modules: dict[str, nn.Module], optimizer, ema: Ema) -> None:
        """Load the last checkpoint of `folder`, if there is one, into modules, optimizer and average."""
        path = self.folder / "checkpoint.safetensors"
        if self.step == 0 or not path.exists():
            return
        tensors = load_file(path)
        for name, module in modules.items():
            module.load_state_dict(_under(tensors, f"weights.{name}."))
            device = next(module.parameters()).device
            ema.weights[name] = {k: v.to(device) for k, v in _under(tensors, f"ema.{name}.").items()}
        flat, state = _under(tensors, "optimizer."), {}  # type: dict[str, Tensor], dict[int, dict[str, Tensor]]
        for key, value in flat.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _under(tensors: dict, prefix: str) -> dict:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def captured(module: nn.Module, example: tuple[Tensor, ...]) -> nn.Module:
    """A module whose forward and backward pass are replayed as two CUDA graphs on a GPU, for inputs like the example.

    A model this small spends its time launching kernels, and a graph launches them all at once. On a CPU, and where a
    GPU cannot capture the module, it is returned as it is. (torch.compile is no help on a CPU: in PyTorch 2.13 the
    U-Net's and the autoencoder's compiled backward pass leaves some group norms without a gradient.)
    """
    if example[0].device.type != "cuda":
        return module
    try:
        return torch.cuda.make_graphed_callables(module, example, allow_unused_input=True)  # type: ignore[return-value]
    except RuntimeError as error:
        print(f"no CUDA graph: {error}", flush=True)
        return module

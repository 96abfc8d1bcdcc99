"""Weights on their way in few megabytes: `python -m second_generation.keep FOLDER` writes what `warm_start` reads.

Six bits a weight: of each row, value / (largest of the row) * 31, rounded, and the largest in half precision. That is
enough to go on training from, and a fifth of the history that float32 would take. Vectors are kept in half precision.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
LEVELS = 31
PARTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


def pack(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Arrays of every tensor, for `unpack`."""
    out = {}
    for name, tensor in state.items():
        if tensor.ndim < 2:
            out[name] = tensor.half().numpy()
            continue
        rows = tensor.float().flatten(1)
        top = rows.abs().amax(1, keepdim=True).clamp(min=1e-8).half().float()
        out[name] = (rows / top * LEVELS).round().clamp(-LEVELS, LEVELS).to(torch.int8).view(tensor.shape).numpy()
        out[name + "@"] = top[:, 0].half().numpy()
    return out


def unpack(arrays) -> dict[str, torch.Tensor]:
    """float32 tensors of what `pack` gave."""
    state = {}
    for name in arrays:
        if name.endswith("@"):
            continue
        tensor = torch.from_numpy(arrays[name]).float()
        if name + "@" in arrays:
            top = torch.from_numpy(arrays[name + "@"]).float()
            tensor = tensor * (top / LEVELS).view(-1, *[1] * (tensor.ndim - 1))
        state[name] = tensor
    return state


def main() -> None:
    """Write one file a part."""
    for part, file in PARTS.items():
        np.savez_compressed(HERE / f"{part}.npz", **pack(load_file(Path(sys.argv[1]) / file)))
    shutil.copytree(Path(sys.argv[1]) / "tokenizer", HERE / "tokenizer", dirs_exist_ok=True)


if __name__ == "__main__":
    main()

"""Put a folder together from which the U-Net of the second generation starts: `… warm_start.py --out FOLDER`.

Tokenizer and text encoder for the new captions, the autoencoder that lies here, and of the first generation's U-Net and
text encoder all that has the same shape: everything but the first and last convolution, and known words' embeddings.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTokenizer

from helpers.minisd import architecture
from helpers.minisd.pretrain import WEIGHTS
from helpers.world.captions import vocabulary_corpus
from second_generation.keep import unpack

HERE = Path(__file__).parent


def carry(module: torch.nn.Module, state: dict) -> None:
    """Copy every tensor of the same name and shape."""
    new = module.state_dict()
    new |= {name: value for name, value in state.items() if name in new and new[name].shape == value.shape}
    module.load_state_dict(new)


def main() -> None:
    """Write the folder."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, required=True)
    old = StableDiffusionPipeline.from_pretrained(WEIGHTS, torch_dtype=torch.float32)
    parts = architecture.build(architecture.MINI, vocabulary_corpus(20000, seed=0))
    parts["vae"] = AutoencoderKL.from_pretrained(HERE / "vae", torch_dtype=torch.float32)
    carry(parts["unet"], old.unet.state_dict())
    newest = {name: HERE / f"{name}.npz" for name in ("unet", "text_encoder")}
    if all(path.exists() for path in newest.values()):
        for name, path in newest.items():
            parts[name].load_state_dict(unpack(dict(np.load(path))))
        parts["tokenizer"] = CLIPTokenizer.from_pretrained(HERE / "tokenizer")
        return architecture.save(parts, p.parse_args().out)
    words = old.text_encoder.get_input_embeddings().weight.data
    state = {name: t for name, t in old.text_encoder.state_dict().items() if "token_embedding" not in name}
    carry(parts["text_encoder"], state)
    before, now = old.tokenizer.get_vocab(), parts["tokenizer"].get_vocab()
    for token in before.keys() & now.keys():
        parts["text_encoder"].get_input_embeddings().weight.data[now[token]] = words[before[token]]
    return architecture.save(parts, p.parse_args().out)


if __name__ == "__main__":
    main()

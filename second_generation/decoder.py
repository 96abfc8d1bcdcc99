"""One sitting of the decoder alone: `python -m second_generation.decoder --folder FOLDER --seed N --minutes M`.

The encoder stays as it is, since the U-Net learns its latents. It draws this sitting's own pictures of the styles that
the autoencoder may see, trains FOLDER/pipeline's decoder for M minutes, and prints the PSNR of others before and after.
Stopped, it goes on from its last checkpoint with the same command.
"""

import argparse
from pathlib import Path

import torch

from helpers.minisd import architecture, pretrain
from helpers.minisd.budget import Budget
from helpers.minisd.pool import draw_pool
from helpers.minisd.train_vae import psnr, reconstruct, train_vae

p = argparse.ArgumentParser(description=__doc__)
p.add_argument("--folder", type=Path, required=True)
p.add_argument("--seed", type=int, required=True)
p.add_argument("--minutes", type=float, required=True)
p.add_argument("--pictures", type=int, default=12000)
p.add_argument("--batch", type=int, default=16)
p.add_argument("--learning-rate", type=float, default=6e-4)


def main() -> None:
    """Draw, train, save."""
    args = p.parse_args()
    parts = pretrain.finished_parts(args.folder / "pipeline", ("tokenizer", "text_encoder", "vae", "unet"))
    parts["scheduler"] = architecture.build_scheduler()
    vae, styles = parts["vae"], pretrain.pool_of("vae", args.pictures)["styles"]
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    others = draw_pool(128, styles, architecture.MINI.picture, seed=12).pictures

    def show(label: str) -> None:
        print(f"{label}: {psnr(others, reconstruct(vae, others)).mean():.2f} dB", flush=True)

    show("before")
    pictures = draw_pool(args.pictures, styles, architecture.MINI.picture, seed=args.seed).pictures
    print("drawn", flush=True)
    train_vae(
        vae, pictures, Budget(args.folder / f"decoder-{args.seed}", 60 * args.minutes), args.batch, args.learning_rate
    )
    show("after")
    architecture.save(parts, args.folder / "pipeline")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()

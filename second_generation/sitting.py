"""One sitting of the U-Net: `python -m second_generation.sitting --folder FOLDER --seed N --minutes M`.

FOLDER/pipeline holds the weights to start from. FOLDER gets the latents of this sitting's own pictures, drawn once,
another seed each sitting; a checkpoint and newer weights every five minutes; and sheets. Kill it when time is up.
Set OMP_WAIT_POLICY=active where nothing else computes.
"""

import argparse
import copy
from pathlib import Path

import torch

from helpers.minisd import architecture, pretrain
from helpers.minisd.budget import Budget
from helpers.minisd.pool import draw_pool
from helpers.minisd.train_unet import latent_pool, train_unet
from helpers.minisd.train_vae import encode

p = argparse.ArgumentParser(description=__doc__)
p.add_argument("--folder", type=Path, required=True)
p.add_argument("--seed", type=int, required=True)
p.add_argument("--minutes", type=float, default=300, help="of the cosine; longer than the sitting but in the last one")
p.add_argument("--pictures", type=int, default=20000)
p.add_argument("--batch", type=int, default=32)
p.add_argument("--learning-rate", type=float, default=8e-4)


def latents_of(parts: dict, folder: Path, seed: int, pictures: int):
    """The sitting's latents, from the folder when they are there."""
    path = folder / f"latents-{seed}.pt"
    if not path.exists():
        pool = draw_pool(pictures, pretrain.BASE_SHARES, architecture.MINI.picture, seed=seed)
        print("drawn", flush=True)
        mean, std = encode(parts["vae"].to(memory_format=torch.channels_last), pool.pictures, 64)
        torch.save({"mean": mean.half(), "std": std.flatten()[0].item(), "words": pool.captions}, path)
        print("encoded", flush=True)
    kept = torch.load(path)
    mean = kept["mean"].float()
    pool = latent_pool(mean, torch.full((1,), kept["std"]), kept["words"], parts["tokenizer"])
    pool.std = pool.std.view(1, 1, 1, 1).expand_as(pool.mean)
    return pool


def main() -> None:
    """Draw, encode, train."""
    args = p.parse_args()
    parts = pretrain.finished_parts(args.folder / "pipeline", ("tokenizer", "text_encoder", "vae", "unet"))
    parts["scheduler"] = architecture.build_scheduler()
    latents = latents_of(parts, args.folder, args.seed, args.pictures)
    budget = Budget(args.folder / f"unet-{args.seed}", 60 * args.minutes)
    sheets = iter(range(10**6))

    def on_save(ema):
        averaged = {name: copy.deepcopy(parts[name]) for name in ("unet", "text_encoder")}
        ema.copy_to(averaged)
        averaged = {**parts, **{name: module.eval() for name, module in averaged.items()}}
        architecture.save(averaged, args.folder / "pipeline")
        if next(sheets) % 5 == 4:
            pretrain.sheet(averaged, args.folder / "sheets" / f"{args.seed}-{budget.step + 1:06d}.png")

    train_unet(parts["unet"], parts["text_encoder"], latents, budget, args.batch, args.learning_rate, on_save)
    architecture.save(parts, args.folder / "pipeline")


if __name__ == "__main__":
    main()

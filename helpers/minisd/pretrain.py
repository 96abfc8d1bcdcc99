"""Train MiniSD from the renderer alone: `python -m helpers.minisd.pretrain --minutes 90`.

Stages: the autoencoder, then U-Net and text encoder on its latents, then the classifier of attributes that measures
them. Each stage has its share of the time budget, goes on where it was stopped, and leaves a log, and sample sheets.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers.minisd import architecture
from helpers.minisd.budget import Budget
from helpers.minisd.classifier import train_classifier
from helpers.minisd.grow import deepen
from helpers.minisd.pool import draw_pool
from helpers.minisd.train_unet import LatentPool, latent_pool, train_unet
from helpers.minisd.train_vae import encode, fold_statistics, reconstruct, train_vae
from helpers.presets import RUNS
from helpers.provenance import atomic_path, tensor_hash
from helpers.world.captions import vocabulary_corpus
from helpers.world.scenes import BASE_STYLES, HELD_OUT_STYLES, STYLES

WEIGHTS = Path(__file__).parent / "weights"
BASE_SHARES = {"render": 0.44, "flat": 0.28, "sketch": 0.28}
SHARES = {"vae": 0.35, "unet": 0.55, "classifier": 0.10}  # of the time budget
SHEET_PROMPTS = (
    "a portrait of a black cat with a red cowboy hat and a green scarf, on a yellow background",
    "a drawing of a man with a red scarf",
    "a flat icon of a brown bear with a blue top hat and sunglasses, on a pink background",
    "a pencil sketch of a robot with a crown and a bow tie",
    "a picture of a woman with blond hair, glasses and a purple beanie, on a green background",
    "a bat hero as a sheriff",
    "a portrait of a green alien with a white cap and a black tie, on an orange background",
    "a flat icon of a white rabbit with a yellow crown and a red scarf, on a blue background",
)


def arguments() -> argparse.Namespace:
    """Command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=90, help="time budget of all stages together")
    p.add_argument("--vae-minutes", type=float, help="instead of its share")
    p.add_argument("--unet-minutes", type=float, help="instead of its share")
    p.add_argument("--classifier-minutes", type=float, help="instead of its share")
    p.add_argument("--pictures", type=int, default=36000, help="distinct pictures for the U-Net")
    p.add_argument("--geometry", choices=("cpu", "gpu"), default="cpu")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--work", type=Path, default=RUNS / "pretrain", help="checkpoints, logs and sheets")
    p.add_argument("--out", type=Path, default=WEIGHTS, help="the finished pipeline folder")
    p.add_argument("--stages", default="vae,unet,classifier")
    p.add_argument("--batch-size", type=int, default=16, help="of the U-Net")
    p.add_argument("--go-on", action="store_true", help="start from the weights in --out, deepened if need be")
    return p.parse_args()


def seconds(args: argparse.Namespace, stage: str) -> float:
    """Budget of a stage in seconds."""
    own = getattr(args, f"{stage}_minutes")
    return 60 * (args.minutes * SHARES[stage] if own is None else own)


def vae_stage(parts: dict, args, size: int) -> None:
    """Train the autoencoder on base styles, doodles and vintage; it never sees the extra styles."""
    shares = {**{s: 0.2 for s in BASE_STYLES}, **{s: 0.2 for s in HELD_OUT_STYLES}}
    pool = draw_pool(max(args.pictures // 3, 256), shares, size, seed=1)
    train_vae(parts["vae"], pool.pictures, Budget(args.work / "vae", seconds(args, "vae")))
    fold_statistics(parts["vae"], pool.pictures[:2048])
    architecture.save(parts, args.out)


def sheet(parts: dict, path: Path) -> None:
    """Pictures of the sheet's prompts, two seeds each, side by side."""
    pipe = architecture.pipeline(parts)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for seed in (0, 1):
        noise = torch.Generator().manual_seed(seed)
        pictures += pipe(list(SHEET_PROMPTS), num_inference_steps=20, guidance_scale=4, generator=noise).images
    save_sheet(pictures, len(SHEET_PROMPTS), path)


def save_sheet(pictures: list[Image.Image], columns: int, path: Path, zoom: int = 2) -> None:
    """Paste pictures row by row, enlarged `zoom` times."""
    side = pictures[0].width * zoom
    canvas = Image.new("RGB", (side * columns, side * -(-len(pictures) // columns)))
    for i, picture in enumerate(pictures):
        enlarged = picture.resize((side, side), Image.Resampling.LANCZOS)
        canvas.paste(enlarged, (side * (i % columns), side * (i // columns)))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def cached_latents(parts: dict, args, size: int) -> LatentPool:
    """The U-Net's pool of latents, drawn and encoded once per autoencoder and kept for the next sitting."""
    key = tensor_hash(parts["vae"].state_dict())[:12]
    path = args.work / f"latents-{args.pictures}-{key}.safetensors"
    if not path.exists():
        pool = draw_pool(args.pictures, BASE_SHARES, size, seed=2)
        mean, std = encode(parts["vae"], pool.pictures)
        path.parent.mkdir(parents=True, exist_ok=True)
        latents = latent_pool(mean, std, pool.captions, parts["tokenizer"])
        with atomic_path(path) as temporary:
            save_file({name: value.contiguous() for name, value in vars(latents).items()}, temporary)
    return LatentPool(**load_file(path))


def unet_stage(parts: dict, args, size: int) -> None:
    """Train U-Net and text encoder on the base styles, without the held-out pairs."""
    latents = cached_latents(parts, args, size)
    budget = Budget(args.work / "unet", seconds(args, "unet"))

    def on_save(ema):
        averaged = {**parts, "unet": copy.deepcopy(parts["unet"]), "text_encoder": copy.deepcopy(parts["text_encoder"])}
        ema.copy_to(averaged)
        averaged["unet"].eval(), averaged["text_encoder"].eval()
        architecture.save(averaged, args.out)
        sheet(averaged, args.work / "sheets" / f"step-{budget.step + 1:06d}.png")

    train_unet(parts["unet"], parts["text_encoder"], latents, budget, args.batch_size, on_save=on_save)
    architecture.save(parts, args.out)
    sheet(parts, args.work / "sheets" / "final.png")


def classifier_stage(parts: dict, args, size: int) -> None:
    """Train the judge on drawn pictures of all styles and pairs, before and after the autoencoder."""
    pool = draw_pool(max(args.pictures // 2, 256), {s: 1 / len(STYLES) for s in STYLES}, size, seed=3, pairs="all")
    blurred = reconstruct(parts["vae"], pool.pictures[: len(pool) // 2]).numpy()
    train_classifier(pool, blurred, Budget(args.work / "classifier", seconds(args, "classifier")), go_on=args.go_on)


def finished_parts(folder: Path, names: tuple[str, ...], layers: int) -> dict:
    """The named parts of a finished pipeline folder in float32; a U-Net of fewer layers a block is deepened."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    parts = {name: getattr(pipe, name) for name in names}
    if "unet" in parts and parts["unet"].config.layers_per_block < layers:
        parts["unet"] = deepen(parts["unet"])
    return parts


def main() -> None:
    """Run the stages asked for; finished earlier stages are loaded from --out."""
    args = arguments()
    geometry = architecture.GPU if args.geometry == "gpu" else architecture.CPU
    stages = args.stages.split(",")
    parts = architecture.build(geometry, vocabulary_corpus(4000, seed=0))
    longest = max(len(parts["tokenizer"](c).input_ids) for c in vocabulary_corpus(4000, seed=1))
    print(f"vocabulary {len(parts['tokenizer'])}, longest caption {longest} tokens", flush=True)
    if args.go_on:
        parts |= finished_parts(args.out, ("tokenizer", "text_encoder", "vae", "unet"), geometry.unet_layers)
    elif "vae" not in stages:
        parts |= finished_parts(args.out, ("vae",), geometry.unet_layers)
    for name in ("vae", "unet", "text_encoder"):
        parts[name].to(args.device)
    for stage in stages:
        {"vae": vae_stage, "unet": unet_stage, "classifier": classifier_stage}[stage](parts, args, geometry.picture)


if __name__ == "__main__":
    main()

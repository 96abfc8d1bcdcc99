"""Train MiniSD from the renderer alone: `python -m helpers.minisd.pretrain --minutes 90`.

Stages: the autoencoder, then the classifier of attributes that measures pictures, then U-Net and text encoder on the
autoencoder's latents. Each stage has its share of the time budget, goes on where it was stopped, and leaves a log, and
sample sheets. The defaults suit two CPU cores; the committed weights' own command is in the model card.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from helpers.base.paths import runs_folder
from helpers.minisd import architecture
from helpers.minisd.budget import Budget
from helpers.minisd.pool import NO_STYLE, Pool, collect, drawing_processes, start_drawing
from helpers.minisd.train_judge import train_classifier
from helpers.minisd.train_unet import latent_pool, train_unet
from helpers.minisd.train_vae import encode, fold_statistics, reconstruct, train_vae
from helpers.world.captions import vocabulary_corpus
from helpers.world.scenes import BASE_STYLES, HELD_OUT_STYLES, STYLES

WEIGHTS = Path(__file__).parent / "weights"
BASE_SHARES = {"render": 0.44, "flat": 0.28, "sketch": 0.28}
SHARES = {"vae": 0.35, "classifier": 0.10, "unet": 0.55}  # of the time budget
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
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--work", type=Path, default=runs_folder() / "pretrain", help="checkpoints, logs and sheets")
    p.add_argument("--out", type=Path, default=WEIGHTS, help="the finished pipeline folder")
    p.add_argument("--stages", default=",".join(SHARES))
    p.add_argument("--vae-batch", type=int, default=16)
    p.add_argument("--unet-batch", type=int, default=16)
    p.add_argument("--classifier-batch", type=int, default=64)
    p.add_argument("--unet-learning-rate", type=float, default=7e-4)
    p.add_argument("--seed", type=int, default=0, help="of the drawn pictures: another sitting may see others")
    p.add_argument("--go-on", action="store_true", help="start from the weights in --out")
    return p.parse_args()


def seconds(args: argparse.Namespace, stage: str) -> float:
    """Budget of a stage in seconds."""
    own = getattr(args, f"{stage}_minutes")
    return 60 * (args.minutes * SHARES[stage] if own is None else own)


def pool_of(stage: str, pictures: int, seed: int = 0) -> dict:
    """What `start_drawing` draws for a stage when the U-Net is to see so many pictures; other ones with another seed.

    The autoencoder sees the base styles, doodles and vintage, and never the extra styles; the U-Net the base styles
    without the held-out pairs; the classifier, which judges, all styles and pairs.
    """
    seen_by_judge = dict.fromkeys(STYLES, 1.0)
    seen_by_vae = dict.fromkeys((*BASE_STYLES, *HELD_OUT_STYLES), 1.0) | {NO_STYLE: 3.0}
    return {
        "vae": {"count": max(pictures // 3, 256), "styles": seen_by_vae, "seed": 10 * seed + 1},
        "classifier": {"count": max(pictures // 2, 256), "styles": seen_by_judge, "seed": 10 * seed + 3, "pairs": "all"},
        "unet": {"count": pictures, "styles": BASE_SHARES, "seed": 10 * seed + 2},
    }[stage]


def vae_stage(parts: dict, args: argparse.Namespace, pool: Pool) -> None:
    """Train the autoencoder."""
    budget = Budget(args.work / "vae", seconds(args, "vae"))
    train_vae(parts["vae"], pool.pictures, budget, args.vae_batch)
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


def unet_stage(parts: dict, args: argparse.Namespace, pool: Pool) -> None:
    """Train U-Net and text encoder."""
    latents = latent_pool(*encode(parts["vae"], pool.pictures), pool.captions, parts["tokenizer"])
    budget = Budget(args.work / "unet", seconds(args, "unet"))

    def on_save(ema):
        averaged = {**parts, "unet": copy.deepcopy(parts["unet"]), "text_encoder": copy.deepcopy(parts["text_encoder"])}
        ema.copy_to(averaged)
        averaged["unet"].eval(), averaged["text_encoder"].eval()
        architecture.save(averaged, args.out)
        sheet(averaged, args.work / "sheets" / f"step-{budget.step + 1:06d}.png")

    settings = (args.unet_batch, args.unet_learning_rate, on_save)
    train_unet(parts["unet"], parts["text_encoder"], latents, budget, *settings)
    architecture.save(parts, args.out)
    sheet(parts, args.work / "sheets" / "final.png")


def classifier_stage(parts: dict, args: argparse.Namespace, pool: Pool) -> None:
    """Train the judge on drawn pictures before and after the autoencoder."""
    blurred = reconstruct(parts["vae"], pool.pictures[: len(pool) // 2]).numpy()
    budget = Budget(args.work / "classifier", seconds(args, "classifier"))
    train_classifier(pool, blurred, budget, args.classifier_batch, go_on=args.go_on, device=args.device)


def finished_parts(folder: Path, names: tuple[str, ...]) -> dict:
    """The named parts of a finished pipeline folder in float32."""
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    return {name: getattr(pipe, name) for name in names}


def check_autoencoder(vae: AutoencoderKL, folder: Path) -> None:
    """Raises SystemExit for an earlier generation's, on which judge and U-Net would be trained in vain."""
    found, wanted = vae.config.latent_channels, architecture.MINI.latent_channels
    if found != wanted:
        raise SystemExit(f"the autoencoder in {folder} has {found} latent channels, not {wanted}; is --out right?")


def main() -> None:
    """Run the stages asked for; finished earlier stages are loaded from --out."""
    args = arguments()
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it
    torch.backends.cudnn.benchmark = True
    stages = args.stages.split(",")
    parts = architecture.build(architecture.MINI, vocabulary_corpus(20000, seed=0))
    longest = max(len(parts["tokenizer"](c).input_ids) for c in vocabulary_corpus(4000, seed=1))
    print(f"vocabulary {len(parts['tokenizer'])}, longest caption {longest} tokens", flush=True)
    if args.go_on:
        parts |= finished_parts(args.out, ("tokenizer", "text_encoder", "vae", "unet"))
    elif "vae" not in stages:
        parts |= finished_parts(args.out, ("vae",))
    check_autoencoder(parts["vae"], args.out)
    for name in ("vae", "unet", "text_encoder"):
        parts[name].to(args.device)
    work = {"vae": vae_stage, "unet": unet_stage, "classifier": classifier_stage}
    size = architecture.MINI.picture
    with drawing_processes() as processes:  # which draw for later stages while earlier ones train
        drawn = {stage: start_drawing(processes, size=size, **pool_of(stage, args.pictures, args.seed)) for stage in stages}
        for stage in stages:
            work[stage](parts, args, collect(drawn[stage]))
            print(f"{stage}: done", flush=True)


if __name__ == "__main__":
    main()

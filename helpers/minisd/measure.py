"""Measure MiniSD and its judge, and write the model card: `python -m helpers.minisd.measure`.

Every number of helpers/minisd/README.md comes from metrics.json, which this module writes; none is typed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from helpers.base.files import write_json_atomic
from helpers.base.provenance import versions
from helpers.diffusion.components import Components, load_components
from helpers.diffusion.pictures import to_pil
from helpers.diffusion.sampling import generate
from helpers.diffusion.weights import weights_fingerprint
from helpers.evaluation.faces import faces, positions
from helpers.evaluation.imagenet import ImageNetEncoder
from helpers.evaluation.measures import SCORED, Measure, agreement, bootstrap, evaluation_scenes, judge, wilson
from helpers.evaluation.sight import fidelity_to_drawings, seed_diversity, takes, through_vae
from helpers.minisd.architecture import MINI
from helpers.minisd.pool import Pool, draw_pool
from helpers.minisd.pretrain import save_sheet
from helpers.minisd.ruin import ruin
from helpers.minisd.train_vae import psnr, reconstruct
from helpers.presets.configuration import Preset
from helpers.presets.variants import get_preset
from helpers.world.captions import prompt
from helpers.world.scenes import BASE_STYLES, STYLES, SUBJECTS, Scene

HERE = Path(__file__).parent
METRICS, CARD, TEMPLATE = HERE / "metrics.json", HERE / "README.md", HERE / "card.md"
EYE_SHEET, EYE_LABELS = HERE / "eye_sheet.png", HERE / "eye_labels.json"
EYE_PICTURES, EYE_COLUMNS = 60, 10
JUDGED = ("subject", "headwear", "style")


def measure_autoencoder(components: Components, size: int, per_style: int = 100) -> dict:
    """PSNR in dB of drawn pictures of each style, never seen in training, after the autoencoder."""
    out = {}
    for k, style in enumerate(STYLES):
        pool = draw_pool(per_style, {style: 1.0}, size, seed=100 + k, pairs="all")
        measured = bootstrap(psnr(pool.pictures, reconstruct(components.vae, pool.pictures)).tolist())
        out[style] = row(measured, digits=2)
    return out


def measure_judge(components: Components, size: int, count: int = 1800) -> dict:
    """Accuracy on drawn pictures of all styles and pairs that nothing was trained on, before and after the VAE."""
    pool = draw_pool(count, {s: 1 / len(STYLES) for s in STYLES}, size, seed=200, pairs="all")
    out = {}
    for name, pictures in (("drawn", pool.pictures), ("after the VAE", reconstruct(components.vae, pool.pictures))):
        verdict = judge([Image.fromarray(np.asarray(p)) for p in pictures])
        truth = {a: [getattr(s, a) for s in pool.scenes] for a in JUDGED[:2]} | {"style": pool.styles}
        right = {a: np.array(verdict.names[a]) == np.array(truth[a]) for a in JUDGED}
        out[name] = {a: row(wilson(int(r.sum()), count)) for a, r in right.items()}
        out[name] |= {label: row(share) for label, share in seen_faces(pool, torch.as_tensor(pictures)).items()}
        styles = np.array(pool.styles)
        out[name]["per style"] = {s: {a: round(float(right[a][styles == s].mean()), 4) for a in JUDGED} for s in STYLES}
    return out


def seen_faces(pool: Pool, pictures: Tensor) -> dict[str, Measure]:
    """Shares of the pool's pictures, uint8 [N, S, S, 3], that are called whole: as they are, and one part ruined."""
    x = pictures.permute(0, 3, 1, 2) / 255
    parts = positions(pool.scenes, pool.styles)
    ruined, left = ruin(x, parts, torch.Generator().manual_seed(0))
    hit = torch.nonzero((left[..., 0] < 0).any(1)).flatten().tolist()
    return {
        "whole faces": faces(to_pil(x), pool.scenes),
        "whole faces, one part ruined": faces(to_pil(ruined[hit]), [pool.scenes[i] for i in hit]),
    }


def measure_prompts(components: Components, count: int = 500) -> dict:
    """Agreement with prompts about held-out subject x headwear pairs, the three base styles in turn."""
    preset = get_preset("mini")
    scenes = evaluation_scenes(count, seed=5000, pairs="held_out")
    styles = [BASE_STYLES[k % len(BASE_STYLES)] for k in range(count)]
    prompts = [prompt(scene, style) for scene, style in zip(scenes, styles, strict=True)]
    settings = {"num_inference_steps": 25, "guidance_scale": preset.guidance_scale}
    verdict = judge(generate(components, prompts, list(range(count)), **settings))
    right = {a: [0, 0] for a in SCORED["render"]}
    for style in BASE_STYLES:
        rows = [k for k in range(count) if styles[k] == style]
        part = type(verdict)({a: [v[k] for k in rows] for a, v in verdict.names.items()}, verdict.styles[rows])
        for a, m in agreement([scenes[k] for k in rows], part, style).items():
            right[a] = [right[a][0] + round(m.value * m.n), right[a][1] + m.n]
    out = {a: row(wilson(k, n)) for a, (k, n) in right.items()}
    hits = sum(a == b for a, b in zip(verdict.names["style"], styles, strict=True))
    return {**out, "style": row(wilson(hits, count)), "settings": settings}


def measure_sight(components: Components, count: int = 200, prompts: int = 24) -> dict:
    """What a classifier overlooks, in the base styles: nearness to drawings, whole faces, and variety over seeds.

    Beside the whole faces stand those of drawn pictures after the VAE: the most that the judge could find.
    """
    encoder, out = ImageNetEncoder(), {}
    settings = {"num_inference_steps": 25, "guidance_scale": get_preset("mini").guidance_scale}
    scenes = evaluation_scenes(count, seed=6000)
    for style in BASE_STYLES:
        texts = [prompt(scene, style) for scene in scenes]
        pictures = generate(components, texts, list(range(count)), **settings)
        drawn = through_vae(components, takes(scenes, style, components.resolution, "faces"))
        distance = fidelity_to_drawings(components, scenes, pictures, style, encoder)
        out[f"{style}: distance from drawings, that of the VAE being 1"] = row(distance)
        out[f"{style}: whole faces"] = row(faces(pictures, scenes))
        out[f"{style}: whole faces, drawn and after the VAE"] = row(faces(drawn, scenes))
    variety = seed_diversity(components, scenes[:prompts], None, encoder, **settings)
    return out | {"variety over seeds, the renderer's being 1": row(variety)}


def eye_scenes() -> list[Scene]:
    """What the pictures that were labelled by eye should show: pairs of subject and headwear seen and unseen."""
    return evaluation_scenes(EYE_PICTURES, seed=7000, pairs="all")


def eye_pictures(components: Components) -> list[Image.Image]:
    """The pictures that were labelled by eye, the three base styles in turn; picture k has seed k."""
    prompts = [prompt(scene, BASE_STYLES[k % len(BASE_STYLES)]) for k, scene in enumerate(eye_scenes())]
    guidance_scale = get_preset("mini").guidance_scale
    seeds = list(range(EYE_PICTURES))
    return generate(components, prompts, seeds, num_inference_steps=25, guidance_scale=guidance_scale)


def measure_eye(weights: str) -> dict | None:
    """What readers who saw neither prompts nor the judge's answers named, against both; None without their labels.

    weights: hash of the weights that drew the sheet; labels of another sheet do not count.
    """
    labels = json.loads(EYE_LABELS.read_text()) if EYE_LABELS.exists() else {}
    if labels.get("weights") != weights:
        return None
    sheet = Image.open(EYE_SHEET)
    side = sheet.width // EYE_COLUMNS
    boxes = [(side * (k % EYE_COLUMNS), side * (k // EYE_COLUMNS)) for k in range(EYE_PICTURES)]
    verdict = judge([sheet.crop((x, y, x + side, y + side)) for x, y in boxes])
    out = {}
    for number, reader in enumerate(labels["readers"], start=1):
        for attribute in JUDGED[:2]:
            pairs = [(a, b) for a, b in zip(reader[attribute], verdict.names[attribute], strict=True) if a != "unclear"]
            agree = wilson(sum(a == b for a, b in pairs), len(pairs))
            out[f"{attribute}: the judge sees what reader {number} sees"] = row(agree)
        asked = [[getattr(scene, attribute) for attribute in JUDGED[:2]] for scene in eye_scenes()]
        seen = zip(reader["subject"], reader["headwear"], strict=True)
        right = [list(names) == wanted for names, wanted in zip(seen, asked, strict=True)]
        for count in (20, EYE_PICTURES):
            name = f"subject and headwear: reader {number} sees what was asked, first {count}"
            out[name] = row(wilson(sum(right[:count]), count))
    return out


def row(measure, digits: int = 4) -> dict:
    """A Measure as JSON."""
    interval = [round(measure.low, digits), round(measure.high, digits)]
    return {"value": round(measure.value, digits), "interval": interval, "n": measure.n}


def table(rows: dict, headers: tuple[str, str], scale: float = 100, unit: str = "%") -> str:
    """Markdown table of {name: {"value", "interval", "n"}}."""
    lines = [f"| {headers[0]} | {headers[1]} | 95% interval | n |", "|---|---|---|---|"]
    for name, m in rows.items():
        if isinstance(m, dict) and "value" in m:
            low, high = (scale * x for x in m["interval"])
            lines.append(f"| {name} | {scale * m['value']:.1f}{unit} | {low:.1f} to {high:.1f} | {m['n']} |")
    return "\n".join(lines)


def write_card(metrics: dict) -> None:
    """Fill the placeholders of card.md. Raises KeyError for a placeholder that no metric fills."""
    judge_tables = "\n\n".join(
        f"**{name}**\n\n{table(metrics['judge'][name], ('attribute', 'accuracy'))}" for name in metrics["judge"]
    )
    eye = metrics["eye"] and table(metrics["eye"], ("attribute", "agreement"))
    grid = MINI.picture // MINI.downsampling
    pixels, latents = 3 * MINI.picture**2, MINI.latent_channels * grid**2
    values = {
        "subjects": str(len(SUBJECTS)),
        "channels": str(MINI.latent_channels),
        "grid": str(grid),
        "pixels": f"{pixels:,}",
        "latents": f"{latents:,}",
        "ratio": f"{pixels / latents:.0f}",
        "vae": table(metrics["vae"], ("style", "PSNR"), 1, " dB"),
        "prompts": table(metrics["prompts"], ("attribute", "agreement")),
        "judge": judge_tables,
        "eye": eye or "Not labelled yet for these weights.",
        "parameters": "\n".join(f"- {name}: {count:,}" for name, count in metrics["parameters"].items()),
        "training": "\n".join(
            f"- {r['stage']}: {r['seconds'] / 60:.0f} minutes, {r['step']:,} steps, {r['pictures']:,} pictures seen"
            for r in metrics["training"]
        ),
        "hash": metrics["weights"][:12],
        "size": str(metrics["resolution"]),
    }
    CARD.write_text(TEMPLATE.read_text().format_map(values))


def preset_of(folder: Path) -> Preset:
    """MiniSD's preset for weights that lie elsewhere, such as the first generation's, at their own size of pictures."""
    size = json.loads((folder / "vae" / "config.json").read_text())["sample_size"]
    return get_preset("mini", model=str(folder.resolve()), resolution=size)


def training_log(work: Path, note: str) -> list[dict]:
    """The last line of each stage's log, in the order of training: stage (with the note), steps, seconds, pictures."""
    logs = {stage: work / stage / "log.jsonl" for stage in ("vae", "unet", "classifier")}
    names = {stage: f"{stage}, {note}" if note else stage for stage in logs}
    return [
        {"stage": names[stage], **json.loads(log.read_text().splitlines()[-1])}
        for stage, log in logs.items()
        if log.exists()
    ]


def main() -> None:
    """Measure, write metrics.json and README.md; --sheet writes the pictures to label by eye instead."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sheet", action="store_true", help="only write the sheet of pictures to label by eye")
    p.add_argument("--card", action="store_true", help="only rewrite the card from metrics.json and the labels")
    p.add_argument("--prompts", type=int, default=500)
    p.add_argument("--sight", type=Path, metavar="FOLDER", help="only print what is seen of the weights in a folder")
    p.add_argument("--work", type=Path, default=None, help="folder of the logs of a pretraining from random weights")
    p.add_argument("--went-on", metavar="NOTE", help="the pretraining in --work went on from the weights before it")
    args = p.parse_args()
    if args.card:
        metrics = json.loads(METRICS.read_text())
        metrics["eye"] = measure_eye(metrics["weights"])
        write_json_atomic(METRICS, metrics)
        return write_card(metrics)
    preset = get_preset("mini")
    if args.sight:
        return print(json.dumps(measure_sight(load_components(preset_of(args.sight))), indent=1))
    components = load_components(preset)
    if args.sheet:
        return save_sheet(eye_pictures(components), EYE_COLUMNS, EYE_SHEET, zoom=1)
    old = json.loads(METRICS.read_text()) if METRICS.exists() else {}
    training = old.get("training", []) if args.went_on or not args.work else []
    training = training + (training_log(args.work, args.went_on or "") if args.work else [])
    parts = {"U-Net": components.unet, "VAE": components.vae, "text encoder": components.text_encoder}
    weights = weights_fingerprint(preset)
    metrics = {
        "weights": weights,
        "resolution": preset.resolution,
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "training": training,
        "sight": measure_sight(components),
        "vae": measure_autoencoder(components, preset.resolution),
        "judge": measure_judge(components, preset.resolution),
        "prompts": measure_prompts(components, args.prompts),
        "eye": measure_eye(weights),
        "versions": versions(),
    }
    write_json_atomic(METRICS, metrics)
    write_card(metrics)


if __name__ == "__main__":
    main()

"""Measure MiniSD and its judge, and write the model card: `python -m helpers.minisd.measure`.

Every number of helpers/minisd/README.md comes from metrics.json, which this module writes; none is typed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from helpers.components import Components, load_components
from helpers.evaluation import SCORED, agreement, bootstrap, evaluation_scenes, judge, wilson
from helpers.minisd.pool import draw_pool
from helpers.minisd.pretrain import save_sheet
from helpers.minisd.train_vae import psnr, reconstruct
from helpers.presets import get_preset
from helpers.provenance import folder_weights_hash, versions, write_json_atomic
from helpers.sampling import generate
from helpers.world.captions import prompt
from helpers.world.scenes import BASE_STYLES, STYLES

HERE = Path(__file__).parent
METRICS, CARD, TEMPLATE = HERE / "metrics.json", HERE / "README.md", HERE / "card.md"
EYE_SHEET, EYE_LABELS = HERE / "judge" / "eye_sheet.png", HERE / "judge" / "eye_labels.json"
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
        styles = np.array(pool.styles)
        out[name]["per style"] = {
            s: {a: round(float(right[a][styles == s].mean()), 4) for a in JUDGED} for s in STYLES
        }
    return out


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


def eye_pictures(components: Components) -> tuple[list[Image.Image], list[str]]:
    """The pictures that were labelled by eye, and their prompts: all base styles, pairs seen and unseen."""
    scenes = evaluation_scenes(EYE_PICTURES, seed=7000, pairs="all")
    prompts = [prompt(s, BASE_STYLES[k % 3]) for k, s in enumerate(scenes)]
    return generate(components, prompts, list(range(EYE_PICTURES)), num_inference_steps=25), prompts


def measure_eye() -> dict | None:
    """Agreement of the judge with labels given by eye, without seeing its answers; None before there are labels."""
    if not EYE_LABELS.exists():
        return None
    labels = json.loads(EYE_LABELS.read_text())
    sheet = Image.open(EYE_SHEET)
    side = sheet.width // EYE_COLUMNS
    boxes = [(side * (k % EYE_COLUMNS), side * (k // EYE_COLUMNS)) for k in range(len(labels["subject"]))]
    verdict = judge([sheet.crop((x, y, x + side, y + side)) for x, y in boxes])
    out = {}
    for attribute in ("subject", "headwear"):
        pairs = [(a, b) for a, b in zip(labels[attribute], verdict.names[attribute], strict=True) if a != "unclear"]
        out[attribute] = row(wilson(sum(a == b for a, b in pairs), len(pairs)))
        out[attribute]["unclear"] = len(labels[attribute]) - len(pairs)
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
    values = {
        "vae": table(metrics["vae"], ("style", "PSNR"), 1, " dB"),
        "prompts": table(metrics["prompts"], ("attribute", "agreement")),
        "judge": judge_tables,
        "eye": eye or "Not labelled yet for these weights.",
        "parameters": "\n".join(f"- {name}: {count:,}" for name, count in metrics["parameters"].items()),
        "training": "\n".join(
            f"- {stage}: {r['seconds'] / 60:.0f} minutes, {r['step']:,} steps, {r['pictures']:,} pictures seen"
            for stage, r in metrics["training"].items()
        ),
        "hash": metrics["weights"][:12],
        "size": str(metrics["resolution"]),
    }
    CARD.write_text(TEMPLATE.read_text().format_map(values))


def training_log(work: Path) -> dict:
    """Last line of each stage's log: steps, seconds, pictures."""
    out = {}
    for stage in ("vae", "unet", "classifier"):
        log = work / stage / "log.jsonl"
        if log.exists():
            out[stage] = json.loads(log.read_text().splitlines()[-1])
    return out


def main() -> None:
    """Measure, write metrics.json and README.md; --sheet writes the pictures to label by eye instead."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sheet", action="store_true", help="only write the sheet of pictures to label by eye")
    p.add_argument("--card", action="store_true", help="only rewrite the card from metrics.json and the labels")
    p.add_argument("--prompts", type=int, default=500)
    p.add_argument("--work", type=Path, default=None, help="folder of the pretraining's logs")
    args = p.parse_args()
    if args.card:
        metrics = json.loads(METRICS.read_text()) | {"eye": measure_eye()}
        write_json_atomic(METRICS, metrics)
        return write_card(metrics)
    preset = get_preset("mini")
    components = load_components(preset)
    if args.sheet:
        return save_sheet(eye_pictures(components)[0], EYE_COLUMNS, EYE_SHEET, zoom=1)
    old = json.loads(METRICS.read_text()) if METRICS.exists() else {}
    parts = {"U-Net": components.unet, "VAE": components.vae, "text encoder": components.text_encoder}
    metrics = {
        "weights": folder_weights_hash(preset.model_folder),
        "resolution": preset.resolution,
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "training": training_log(args.work) if args.work else old.get("training", {}),
        "vae": measure_autoencoder(components, preset.resolution),
        "judge": measure_judge(components, preset.resolution),
        "prompts": measure_prompts(components, args.prompts),
        "eye": measure_eye(),
        "versions": versions(),
    }
    write_json_atomic(METRICS, metrics)
    write_card(metrics)


if __name__ == "__main__":
    main()

"""A hub cache folder as the hub's client would have left it, with small random models and datasets in it.

Repository names, revisions and file layouts are the real ones (refs, snapshots of links, blobs), and so are the models'
configurations but for their sizes; the bytes of the weights are random. `python tests/hub_cache.py FOLDER` builds one.
"""

import hashlib
import io
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image

from helpers.base.paths import ROOT
from helpers.presets.catalogue import CLIP, MINISD, PRESETS
from helpers.presets.sd_configs import CONFIGS, build_part

RESOLUTION = {"sd21-base": 512, "sd21": 768, "sd15": 512}
DATA_COMMIT = {spec.name: spec.revision or "e" * 40 for spec in PRESETS["sd21-base"].datasets}
ROWS = {"doodles": 40, "vintage": 40}


# --- the layout of the hub's client ------------------------------------------------------------------------------


def add_repository(cache: Path, kind: str, name: str, commit: str, files: dict[str, bytes], ref: str = "main") -> Path:
    """Put a repository into the cache: each file a blob, and a link to it in the snapshot. Returns the snapshot."""
    folder = cache / f"{kind}s--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    (folder / "blobs").mkdir(parents=True, exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
    for path, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = snapshot / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(Path(*[".."] * len(link.relative_to(folder).parent.parts)) / "blobs" / blob.name)
    return snapshot


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- models ------------------------------------------------------------------------------------------------------


def vocabulary() -> dict[str, int]:
    """MiniSD's tokens, a few hundred, with CLIP's special ones at the end."""
    return tokenizer_model()["vocab"]


def tokenizer_model() -> dict:
    return json.loads((ROOT / MINISD / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]


def tokenizer_files() -> dict[str, bytes]:
    """A small CLIP tokenizer in the hub's files. They say that the end token pads, also where token 0 must."""
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer_model()["merges"]]
    special = {name: "<|endoftext|>" for name in ("eos_token", "pad_token", "unk_token")}
    special["bos_token"] = "<|startoftext|>"
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, "errors": "replace"}
    return {
        "tokenizer/vocab.json": json.dumps(vocabulary()).encode(),
        "tokenizer/merges.txt": ("#version: 0.2\n" + "\n".join(merges) + "\n").encode(),
        "tokenizer/tokenizer_config.json": json.dumps(config | special).encode(),
        "tokenizer/special_tokens_map.json": json.dumps(special).encode(),
    }


def small_sizes(model: str) -> dict[str, dict]:
    """What is smaller in the small model: widths and depths, nothing that says how it works."""
    heads = CONFIGS[model]["unet"]["attention_head_dim"]
    return {
        "unet": {
            "block_out_channels": [8, 16, 16, 16],
            "norm_num_groups": 4,
            "attention_head_dim": [1, 2, 4, 4] if isinstance(heads, list) else 2,
        },
        "vae": {"block_out_channels": [4, 8, 8, 8], "norm_num_groups": 2},
        "text_encoder": {"vocab_size": len(vocabulary()), "num_hidden_layers": 2, "intermediate_size": 64},
    }


def model_files(model: str, folder: Path) -> dict[str, bytes]:
    """A small random Stable Diffusion with the structure of "sd21-base", "sd21" or "sd15", as files of a repository."""
    torch.manual_seed(0)
    for part, sizes in small_sizes(model).items():
        module = build_part(model, part, "cpu", **sizes)
        if part == "vae":
            widen_latents(module)
        module.save_pretrained(folder / part)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(CONFIGS[model]["scheduler"]))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return files_of(folder) | tokenizer_files()


@torch.no_grad()
def widen_latents(vae) -> None:
    """Scale the encoder's last layer, so that latents are as wide as Stable Diffusion's: 1 / scaling_factor."""
    pictures = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    width = vae.encode(pictures).latent_dist.mean.std()
    channels = vae.config.latent_channels
    for parameter in (vae.quant_conv.weight, vae.quant_conv.bias):
        parameter[:channels] *= 1 / (vae.config.scaling_factor * width)


def clip_files(folder: Path) -> dict[str, bytes]:
    """A small random CLIP in the files of OpenAI's ViT-L/14."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(1)
    last = len(vocabulary()) - 1
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = sizes | {"vocab_size": last + 1, "bos_token_id": last - 1, "eos_token_id": last}
    vision = sizes | {"image_size": 224, "patch_size": 32}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    preprocessing = {
        "crop_size": 224,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 224,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    tokenizer = {path.removeprefix("tokenizer/"): content for path, content in tokenizer_files().items()}
    return files_of(folder) | tokenizer


# --- datasets ----------------------------------------------------------------------------------------------------


def dataset_files(name: str, folder: Path) -> dict[str, bytes]:
    """Coloured pictures with captions, in one parquet file, with the real columns: image and text."""
    rng, features = random.Random(name), Features({"image": ImageColumn(), "text": Value("string")})
    rows = {"image": [], "text": []}
    ending = ", vintage style" if name == "vintage" else ""
    for number in range(ROWS[name]):
        size = (96, 80) if name == "vintage" else (64, 64)
        pixels = np.full((size[1], size[0], 3), [rng.randrange(256) for _ in range(3)], dtype=np.uint8)
        pixels[:: rng.randrange(2, 9)] = rng.randrange(256)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
        rows["text"].append(f"a drawing of a cat number {number}{ending}")
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows, features=features).to_parquet(folder / "data.parquet")
    table = (folder / "data.parquet").read_bytes()
    about = {"README.md": b"---\nlanguage: en\n---\n"} if name == "vintage" else {"dataset_infos.json": dataset_infos()}
    return {"data/train-00000-of-00001-0123456789abcdef.parquet": table, **about}


def dataset_infos() -> bytes:
    """What the hub's older datasets have instead of a README, as the doodles do."""
    columns = {
        "image": {"decode": True, "id": None, "_type": "Image"},
        "text": {"dtype": "string", "id": None, "_type": "Value"},
    }
    train = {"name": "train", "num_bytes": 0, "num_examples": ROWS["doodles"], "dataset_name": None}
    return json.dumps({"default": {"features": columns, "splits": {"train": train}}}).encode()


# --- all of it ---------------------------------------------------------------------------------------------------


def build(home: Path) -> Path:
    """Models, datasets and CLIP in `home`/hub, as HF_HOME would have them. Returns the cache folder."""
    cache, work = home / "hub", home / "work"
    for model in CONFIGS:
        preset = PRESETS[model]
        add_repository(cache, "model", preset.model, preset.revision, model_files(model, work / model))
    (name, revision), *_ = CLIP
    add_repository(cache, "model", name, revision, clip_files(work / "clip"))
    for spec in PRESETS["sd21-base"].datasets:
        repository = spec.source.partition(":")[2]
        files = dataset_files(spec.name, work / spec.name)
        add_repository(cache, "dataset", repository, DATA_COMMIT[spec.name], files)
    return cache


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))

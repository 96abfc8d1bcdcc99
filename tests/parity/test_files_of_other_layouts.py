"""Adapter files of kohya's trainers and of older versions of diffusers."""

import re

import pytest
import torch
from parity_tools import (
    ALPHA,
    ATTENTION,
    LATENTS_ROUNDING,
    ROUNDING,
    TARGETS,
    TEXT_TARGETS,
    TINY,
    UNET_ROUNDING,
    assert_matters,
    base_results,
    difference,
    draw,
    fill,
    loaded_by_diffusers,
    loaded_by_us,
    output,
    pipeline_of,
    text_encoder_of,
    unet_of,
)
from safetensors.torch import load_file, save_file
from torch import nn

from helpers import lora
from helpers.adapters.loading import load_adapter
from helpers.adapters.reading import WEIGHTS_NAME, read_adapter
from helpers.adapters.writing import adapter_of, save_adapter

ALL_TARGETS = [*TARGETS, "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj", "conv1", "conv2"]
ALL_TEXT_TARGETS = [*TEXT_TARGETS, "fc1", "fc2"]
RANK = 3  # its square root has to be rounded, for rsLoRA in kohya's layout
PATTERNS = {"rank_pattern": {"attn2.to_q": 2, "conv1": 4}, "alpha_pattern": {"attn1.to_k": 0.1}}
OLD_SIDES = {"lora_A": "down", "lora_B": "up"}


def adapted(structure="SD 1.5", targets=ALL_TARGETS, text_targets=ALL_TEXT_TARGETS, alpha=ALPHA, **options):
    """A pipeline with filled adapters of ours in U-Net and text encoder."""
    pipeline = pipeline_of(structure)
    lora.inject(pipeline.unet, targets, RANK, alpha, **options)
    options = {key: value for key, value in options.items() if not key.endswith("pattern")}
    lora.inject(pipeline.text_encoder, text_targets, RANK, alpha, **options)
    for model in (pipeline.unet, pipeline.text_encoder):
        fill(model, 0.1)
    return pipeline


def saved(path, pipeline, layout="kohya"):
    return save_adapter(path, pipeline.unet, text_encoder=pipeline.text_encoder, layout=layout)


EXACT_FACTOR = (ROUNDING, ROUNDING)
# rsLoRA's factor becomes an alpha that float32 has to round, and a U-Net magnifies that
ROUNDED_FACTOR = (UNET_ROUNDING, LATENTS_ROUNDING)


def results(pipeline):
    """Text embeddings and latents."""
    return output(pipeline.text_encoder), draw(pipeline)


def compare(state, what, ours, theirs, bounds=EXACT_FACTOR, *, structure, **case):
    """State that two `results` are equal; they must differ from those of the base."""
    latents, embeddings = base_results(structure)
    for i, (name, base) in enumerate({"text embeddings": embeddings, "latents": latents}.items()):
        assert_matters(ours[i], base)
        state(f"{name} {what}", difference(ours[i], theirs[i]), bounds[i], **case)


# ---- kohya ----


@pytest.mark.parametrize("structure", TINY)
def test_kohya_and_back(parity, tmp_path, structure):
    pipeline = adapted(structure, **PATTERNS)
    original = adapter_of(pipeline.unet, pipeline.text_encoder).layers
    again = read_adapter(saved(tmp_path, pipeline)).layers
    assert set(original) == set(again) and any(name.startswith("text_encoder.") for name in original)
    what = "A, B and alpha of every layer, written in kohya's layout and read again"
    case = {"where": "U-Net and text encoder, ranks and alphas by layer", "model": structure}
    for of in (lambda w: w.A, lambda w: w.B, lambda w: torch.tensor(w.alpha, dtype=torch.float64)):
        one, other = ({name: of(layers[name]) for name in original} for layers in (original, again))
        parity(what, difference(one, other), **case)


def factors(pipeline):
    """The factor in front of B A, of every layer."""
    models = pipeline.unet, pipeline.text_encoder
    return torch.tensor([layer.scaling for model in models for layer in lora.lora_layers(model).values()])


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("structure", TINY)
def test_our_kohya_file(parity, tmp_path, structure, rslora):
    pipeline = adapted(structure, use_rslora=rslora)
    path = saved(tmp_path, pipeline)
    ours, theirs = loaded_by_us(structure, path), loaded_by_diffusers(structure, path)
    case = {"model": structure, "r": RANK, "alpha": f"{ALPHA:g}", "rsLoRA": "on" if rslora else "off"}
    found = difference(factors(ours), factors(pipeline))
    parity("the factor before B A, saved in kohya's layout", found, ROUNDING, **case)
    bounds = ROUNDED_FACTOR if rslora else EXACT_FACTOR
    saved_ones, ours, theirs = map(results, (pipeline, ours, theirs))
    what = "equal those of the model saved in kohya's layout"
    compare(parity, what, ours, saved_ones, bounds, structure=structure, **case)
    what = "with our kohya file in load_lora_weights"
    compare(parity, what, ours, theirs, bounds, structure=structure, **case)


# ---- older versions of diffusers ----


def in_processor(key):
    """….attn1.to_out.0.lora_A.weight as ….attn1.processor.to_out_lora.down.weight"""
    match = re.fullmatch(r"(.*)\.(to_[qkv]|to_out)(?:\.0)?\.(lora_[AB])\.weight", key)
    return f"{match[1]}.processor.{match[2]}_lora.{OLD_SIDES[match[3]]}.weight"


def in_lora(key):
    """….attn1.to_out.0.lora_A.weight as ….attn1.to_out.0.lora.down.weight"""
    return re.sub(r"lora_[AB]", lambda match: f"lora.{OLD_SIDES[match[0]]}", key)


def in_text_lora(key):
    """….self_attn.q_proj.lora_A.weight as ….self_attn.to_q_lora.down.weight"""
    return re.sub(r"(q|k|v|out)_proj\.(lora_[AB])", lambda m: f"to_{m[1]}_lora.{OLD_SIDES[m[2]]}", key)


def in_lora_linear_layer(key):
    """….self_attn.q_proj.lora_A.weight as ….self_attn.q_proj.lora_linear_layer.down.weight"""
    return re.sub(r"lora_[AB]", lambda match: f"lora_linear_layer.{OLD_SIDES[match[0]]}", key)


def renamed(folder, pipeline, unet_name, text_name=None):
    """A file of the pipeline's adapters under other names, and without a header: its alpha is its rank."""
    tensors = load_file(saved(folder / "now", pipeline, "diffusers"))
    changed = {k: v for k, v in tensors.items() if text_name or k.startswith("unet.")}
    changed = {(unet_name if k.startswith("unet.") else text_name)(k): v.contiguous() for k, v in changed.items()}
    assert not set(changed) & set(tensors)
    (folder / "old").mkdir()
    save_file(changed, folder / "old" / WEIGHTS_NAME)
    return folder / "old"


OLD_NAMES = {
    "….processor.to_q_lora.down": (in_processor, in_text_lora),
    "….to_q.lora.down, ….q_proj.lora_linear_layer.down": (in_lora, in_lora_linear_layer),
}


@pytest.mark.parametrize("names", OLD_NAMES)
@pytest.mark.parametrize("structure", TINY)
def test_old_names_of_both_parts(parity, tmp_path, structure, names):
    pipeline = adapted(structure, ATTENTION, TEXT_TARGETS, alpha=RANK)
    path = renamed(tmp_path, pipeline, *OLD_NAMES[names])
    loaded = loaded_by_us(structure, path), loaded_by_diffusers(structure, path)
    saved_ones, ours, theirs = map(results, (pipeline, *loaded))
    case = {"structure": structure, "model": structure, "case": names}
    compare(parity, "with old names equal those of the saved model", ours, saved_ones, **case)
    compare(parity, "with old names in load_lora_weights", ours, theirs, **case)


@pytest.mark.parametrize("structure", TINY)
def test_old_names_without_a_prefix(parity, tmp_path, structure):
    pipeline = adapted(structure, ATTENTION, TEXT_TARGETS, alpha=RANK)
    path = renamed(tmp_path, pipeline, lambda key: in_processor(key).removeprefix("unet."))
    ours, theirs = unet_of(structure), unet_of(structure)
    load_adapter(path, ours)
    theirs.load_lora_adapter(path, prefix=None, weight_name=WEIGHTS_NAME)
    assert_matters(output(ours), output(unet_of(structure)))
    case = {"model": structure, "case": "….processor.to_q_lora.down without unet. before it"}
    parity(
        "output with old names equals that of the saved model", difference(output(ours), output(pipeline.unet)), **case
    )
    parity("output with old names in load_lora_adapter", difference(output(ours), output(theirs)), ROUNDING, **case)


# ---- text encoders of transformers 4 and 5 ----


class Nested(nn.Module):
    """A text encoder inside `text_model`, as before transformers 5."""

    def __init__(self, text_model):
        super().__init__()
        self.text_model, self.config = text_model, text_model.config

    def forward(self, ids):
        return self.text_model(ids)


@pytest.mark.parametrize("model", ["flat", "in text_model"])
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("saved_from", ["flat", "in text_model"])
def test_text_encoders_nested_and_not(parity, tmp_path, layout, saved_from, model):
    build = {"flat": text_encoder_of, "in text_model": lambda: Nested(text_encoder_of())}
    original, other = build[saved_from](), build[model]()
    lora.inject(original, ALL_TEXT_TARGETS, 4, ALPHA)
    fill(original)
    path = save_adapter(tmp_path, text_encoder=original, layout=layout)
    load_adapter(path, text_encoder=other)
    assert_matters(output(other), output(text_encoder_of()))
    what = "text embeddings of one text encoder with the adapter of another"
    case = {"saved from": saved_from, "loaded into": model, "layout": layout}
    parity(what, difference(output(other), output(original)), **case)


@pytest.mark.parametrize("with_prefix", [False, True])
def test_text_keys_with_and_without_text_model(parity, tmp_path, with_prefix):
    pipeline = adapted(text_targets=TEXT_TARGETS, alpha=RANK)
    tensors = load_file(saved(tmp_path / "now", pipeline, "diffusers"))
    bare = {key.replace("text_encoder.text_model.", "text_encoder."): value for key, value in tensors.items()}
    prefix = "text_encoder.text_model." if with_prefix else "text_encoder."
    (tmp_path / "other").mkdir()
    named = {key.replace("text_encoder.", prefix): value for key, value in bare.items()}
    save_file(named, tmp_path / "other" / WEIGHTS_NAME)
    ours, theirs = (results(load("SD 1.5", tmp_path / "other")) for load in (loaded_by_us, loaded_by_diffusers))
    case = {"structure": "SD 1.5", "case": "text_encoder.text_model.encoder" if with_prefix else "text_encoder.encoder"}
    compare(
        parity,
        "with keys of transformers 4 and 5 in load_lora_weights",
        ours,
        theirs,
        **case,
    )

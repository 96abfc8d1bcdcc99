"""Adapter files to and from diffusers and PEFT.

One side draws (or encodes) with the library's own reader or writer, the other with `load_adapter` or `save_adapter`.
"""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from parity_tools import (
    ATTENTION,
    ROUNDING,
    STRUCTURES,
    TARGETS,
    TEXT_TARGETS,
    TINY,
    assert_matters,
    base_results,
    difference,
    draw,
    fill,
    fill_size,
    loaded_by_diffusers,
    loaded_by_us,
    output,
    peft_config,
    pipeline_of,
    text_encoder_of,
    unet_of,
)
from peft import get_peft_model, get_peft_model_state_dict

from helpers import lora
from helpers.adapters.loading import load_adapter
from helpers.adapters.writing import save_adapter
from helpers.lora import dora

PATTERNS = {"rank_pattern": {"attn2.to_q": 2, "conv_shortcut": 3}, "alpha_pattern": {"attn1.to_k": 9}}
VARIANTS = {
    "r 4 and alpha 6": {},
    "rsLoRA with ranks and alphas by layer": {"use_rslora": True, **PATTERNS},
    "DoRA": {"kinds": dora.KINDS},
}
NAMES = {
    "names of PEFT": (lambda state: state, lambda state: state),
    "names of diffusers' scripts": (convert_state_dict_to_diffusers, convert_state_dict_to_diffusers),
}


def adapted_by_us(structure, text=False, **options):
    """A pipeline whose U-Net, and text encoder if wanted, have filled adapters of ours."""
    pipeline = pipeline_of(structure)
    lora.inject(pipeline.unet, TARGETS, 4, 6.0, **options)
    if text:
        lora.inject(pipeline.text_encoder, TEXT_TARGETS, 2, 3.0, **options)
    for model in (pipeline.unet, pipeline.text_encoder):
        fill(model, fill_size(structure))
    return pipeline


def adapted_by_peft(structure, text=False, targets=TARGETS, **options):
    """The same with PEFT's adapters."""
    pipeline = pipeline_of(structure)
    pipeline.unet.add_adapter(peft_config(targets, 4, 6.0, **options))
    if text:
        pipeline.text_encoder.add_adapter(peft_config(TEXT_TARGETS, 2, 3.0, **options))
    for model in (pipeline.unet, pipeline.text_encoder):
        fill(model, fill_size(structure))
        model.eval()
    return pipeline


def compare(parity, what, ours, theirs, structure, variant):
    """State that two results are equal but for rounding."""
    parity(what, difference(ours, theirs), ROUNDING, model=structure, case=variant)


# ---- ours to diffusers ----


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_diffusers_reads_our_file(parity, tmp_path, structure, variant):
    save_adapter(tmp_path, adapted_by_us(structure, **VARIANTS[variant]).unet)
    ours, theirs = draw(loaded_by_us(structure, tmp_path)), draw(loaded_by_diffusers(structure, tmp_path))
    assert_matters(ours, base_results(structure)[0])
    compare(parity, "latents with our file in load_lora_weights", ours, theirs, structure, variant)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_diffusers_reads_our_file_of_both_parts(parity, tmp_path, structure):
    pipeline = adapted_by_us(structure, text=True, use_rslora=True)
    save_adapter(tmp_path, pipeline.unet, text_encoder=pipeline.text_encoder)
    ours, theirs = loaded_by_us(structure, tmp_path), loaded_by_diffusers(structure, tmp_path)
    encoded, what = output(ours.text_encoder), "latents and text embeddings with our file in load_lora_weights"
    assert_matters(encoded, base_results(structure)[1])
    compare(parity, what, encoded, output(theirs.text_encoder), structure, "rsLoRA")
    compare(parity, what, draw(ours), draw(theirs), structure, "rsLoRA")


# ---- diffusers and PEFT to ours ----


def saved_by_diffusers(folder, pipeline, names=NAMES["names of PEFT"]):
    """What diffusers' scripts do at the end of a training; `names` rename the tensors of U-Net and text encoder."""
    parts = {}
    for part, rename in zip(("unet", "text_encoder"), names, strict=True):
        model = getattr(pipeline, part)
        if hasattr(model, "peft_config"):
            parts[f"{part}_lora_layers"] = rename(get_peft_model_state_dict(model, adapter_name="default"))
            parts[f"{part}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(folder, **parts)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_we_read_the_file_of_diffusers(parity, tmp_path, structure, variant):
    theirs = adapted_by_peft(structure, **VARIANTS[variant])
    saved_by_diffusers(tmp_path, theirs)
    ours = draw(loaded_by_us(structure, tmp_path))
    assert_matters(ours, base_results(structure)[0])
    compare(parity, "latents with a file of save_lora_weights in load_adapter", ours, draw(theirs), structure, variant)


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("structure", TINY)
def test_we_read_the_file_of_diffusers_of_both_parts(parity, tmp_path, structure, names):
    # diffusers renames the attention only, and reads its own file wrongly where other layers keep PEFT's names
    theirs = adapted_by_peft(structure, text=True, targets=ATTENTION)
    saved_by_diffusers(tmp_path, theirs, NAMES[names])
    ours = loaded_by_us(structure, tmp_path)
    encoded = output(ours.text_encoder)
    what = "latents and text embeddings with a file of save_lora_weights in load_adapter"
    assert_matters(encoded, base_results(structure)[1])
    compare(parity, what, encoded, output(theirs.text_encoder), structure, names)
    compare(parity, what, draw(ours), draw(theirs), structure, names)


@pytest.mark.parametrize("structure", TINY)
def test_we_read_a_file_whose_parts_are_named_differently(parity, tmp_path, structure):
    theirs = adapted_by_peft(structure, text=True)
    saved_by_diffusers(tmp_path, theirs, (lambda state: state, convert_state_dict_to_diffusers))
    ours = loaded_by_us(structure, tmp_path)
    what = "latents and text embeddings, U-Net named as in PEFT, text encoder as in diffusers, in load_adapter"
    case = structure, "r 4 and alpha 6"
    compare(parity, what, output(ours.text_encoder), output(theirs.text_encoder), *case)
    compare(parity, what, draw(ours), draw(theirs), *case)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("structure", TINY)
def test_we_read_the_folder_of_peft(parity, tmp_path, structure, variant):
    theirs = get_peft_model(unet_of(structure), peft_config(TARGETS, 4, 6.0, **VARIANTS[variant]))
    fill(theirs, fill_size(structure))
    theirs.save_pretrained(tmp_path)
    ours = unet_of(structure)
    load_adapter(tmp_path, ours)
    assert_matters(output(ours), output(unet_of(structure)))
    expected = output(theirs.get_base_model())
    what = "the U-Net's output with a folder of PEFT's save_pretrained in load_adapter"
    compare(parity, what, output(ours), expected, structure, variant)


@pytest.mark.parametrize("rslora", [False, True])
def test_we_read_the_folder_of_peft_for_a_text_encoder(parity, tmp_path, rslora):
    theirs = get_peft_model(text_encoder_of(), peft_config(TEXT_TARGETS, 2, 3.0, use_rslora=rslora))
    fill(theirs)
    theirs.save_pretrained(tmp_path)
    ours = text_encoder_of()
    load_adapter(tmp_path, text_encoder=ours)
    assert_matters(output(ours), output(text_encoder_of()))
    what = "text embeddings with a folder of PEFT's save_pretrained in load_adapter"
    case = {"model": "tiny CLIP text encoder", "r": 2, "alpha": 3, "rsLoRA": "on" if rslora else "off"}
    parity(what, difference(output(ours), output(theirs.get_base_model())), ROUNDING, **case)


def test_dropout_of_training_does_not_matter_here(tmp_path):
    pipeline = adapted_by_us("SD 1.5", dropout=0.3)
    save_adapter(tmp_path, pipeline.unet)
    assert torch.equal(draw(loaded_by_us("SD 1.5", tmp_path)), draw(pipeline))

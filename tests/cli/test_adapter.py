"""`course adapter show | convert | merge | extract`, and what an adapter file says about itself."""

import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from tiny import tiny_unet

from helpers import lora
from helpers.adapters import cards
from helpers.adapters.configuration import Adapter
from helpers.adapters.loading import load_adapter
from helpers.adapters.reading import read_adapter
from helpers.adapters.writing import save_adapter, write_adapter
from helpers.base.paths import ROOT
from helpers.cli import parser as cli
from helpers.cli.adapter import find_adapter, weighted_sum
from helpers.diffusion.components import load_components
from helpers.lora import dora
from helpers.lora.lowrank import weights_of
from helpers.presets.variants import get_preset
from helpers.training.runs import newest_run

TARGETS = ["attn1.to_q", "attn2.to_k", "conv1"]


def adapted(model, rank=2, seed=0, targets=TARGETS, **options):
    """The model with an adapter that does something."""
    torch.manual_seed(seed)
    lora.inject(model, targets, rank, alpha=3.0, **options)
    for layer in lora.lora_layers(model).values():
        layer.lora_B.weight.data.normal_(0, 0.1)
    return model


@pytest.fixture(scope="module")
def components():
    return load_components(get_preset("mini"), "cpu")


@pytest.fixture
def adapter(components, tmp_path):
    """An adapter's file for MiniSD, and what its U-Net then computes."""
    try:
        path = save_adapter(tmp_path / "a.safetensors", adapted(components.unet), {"base_model": "MiniSD", "seed": 3})
        yield path, output(components)
    finally:
        lora.remove(components.unet)


@torch.no_grad()
def output(parts):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, *parts.latent_shape, generator=generator)
    states = torch.randn(1, 8, parts.unet.config.cross_attention_dim, generator=generator)
    return parts.unet(latents, 400, states).sample


# --- show ---------------------------------------------------------------------------------------------------------


def test_show_says_layout_rank_alpha_targets_size_norms_and_origin(adapter, capsys):
    path, _ = adapter
    assert cli.main(["adapter", "show", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"a.safetensors: LoRA, diffusers layout, {path.stat().st_size:,} bytes" in said
    for line in ("rank     2", "alpha    3", "unet: attn1.to_q, attn2.to_k, conv1", "base_model       MiniSD"):
        assert line in said
    assert all(f"unet.{block}" in said for block in ("down_blocks.0", "mid_block", "up_blocks.2"))


def test_norms_per_block_are_those_of_the_updates(tmp_path):
    unet = adapted(tiny_unet())
    info = cards.inspect(save_adapter(tmp_path, unet))
    expected = {}
    for name, layer in lora.lora_layers(unet).items():
        block = "unet." + (name.split(".")[0] if name.startswith("mid") else ".".join(name.split(".")[:2]))
        expected[block] = expected.get(block, 0.0) + lora.delta_weight(layer).square().sum().item()
    assert info.norms == pytest.approx({block: square**0.5 for block, square in expected.items()}, rel=1e-5)
    assert info.parameters == sum(p.numel() for p in lora.lora_parameters(unet))
    assert info.layers == len(lora.lora_layers(unet))


def test_layers_that_differ_are_counted(tmp_path):
    unet = adapted(tiny_unet(), rank_pattern={"conv1": 1}, alpha_pattern={"attn1.to_q": 5.0})
    info = cards.inspect(save_adapter(tmp_path, unet))
    layers = lora.lora_layers(unet)
    assert info.ranks[1] == sum(name.endswith("conv1") for name in layers)
    assert info.alphas[5.0] == sum(name.endswith("attn1.to_q") for name in layers)
    assert sum(info.ranks.values()) == sum(info.alphas.values()) == len(layers)


def test_an_adapter_that_does_nothing_yet_is_shown(tmp_path):
    unet = tiny_unet()
    lora.inject(unet, ["to_q"], 2, 2.0)
    info = cards.inspect(save_adapter(tmp_path, unet))
    assert set(info.norms.values()) == {0.0} and "#" not in str(info)


def test_kinds_are_named(tmp_path):
    unet = adapted(tiny_unet(), kinds=dora.KINDS)
    assert "DoRA" in str(cards.inspect(save_adapter(tmp_path / "dora", unet)))
    unet = adapted(tiny_unet(), use_rslora=True)
    assert "rank-stabilised" in str(cards.inspect(save_adapter(tmp_path / "rs", unet)))


# --- convert ------------------------------------------------------------------------------------------------------


def test_convert_to_kohya_and_back_is_exact(adapter, tmp_path, capsys):
    path, _ = adapter
    there, back = tmp_path / "k.safetensors", tmp_path / "b.safetensors"
    assert cli.main(["adapter", "convert", str(path), str(there)]) == 0
    assert cli.main(["adapter", "convert", str(there), str(back), "--layout", "diffusers"]) == 0
    assert "kohya → diffusers" in capsys.readouterr().out
    with safe_open(there, framework="pt") as file:
        assert all(key.startswith("lora_unet_") for key in file.keys())
    one, other = read_adapter(path), read_adapter(back)
    assert one.layers.keys() == other.layers.keys() and one.metadata == other.metadata
    for name, weights in one.layers.items():
        again = other.layers[name]
        assert torch.equal(weights.A, again.A) and torch.equal(weights.B, again.B) and weights.alpha == again.alpha


# --- merge --------------------------------------------------------------------------------------------------------


def test_merge_writes_a_model_that_computes_the_same(adapter, tmp_path):
    path, expected = adapter
    assert cli.main(["adapter", "merge", str(path), "--output", str(tmp_path / "merged")]) == 0
    merged = load_components(get_preset("mini", model=str(tmp_path / "merged")), "cpu")
    assert not lora.lora_layers(merged.unet)
    assert (output(merged) - expected).abs().max() <= 1e-5


def test_merge_adds_weighted_adapters(components, adapter, tmp_path):
    path, _ = adapter
    delta = {name: lora.delta_weight(layer).detach() for name, layer in lora.lora_layers(components.unet).items()}
    base = {name: layer.base.weight.detach().clone() for name, layer in lora.lora_layers(components.unet).items()}
    out = tmp_path / "merged"
    assert cli.main(["adapter", "merge", f"{path}=0.5", f"{path}=-0.75", "--output", str(out)]) == 0
    merged = load_components(get_preset("mini", model=str(out)), "cpu")
    for name, change in delta.items():
        expected = base[name] - 0.25 * change
        torch.testing.assert_close(merged.unet.get_submodule(name).weight, expected, rtol=1e-4, atol=1e-6)


def test_a_single_adapter_of_weight_one_stays_as_it_is(adapter):
    path, _ = adapter
    assert weighted_sum(get_preset("mini"), [str(path)], {}).targets == {"unet": sorted(TARGETS)}
    assert {w.rank for w in weighted_sum(get_preset("mini"), [f"{path}=2"], {}).layers.values()} == {2}


@pytest.mark.parametrize("weight", ["x", "nan", "inf", ""])
def test_a_weight_that_is_no_number_is_refused(adapter, weight, tmp_path, capsys):
    assert cli.main(["adapter", "merge", f"{adapter[0]}={weight}", "--output", str(tmp_path / "m")]) == 1
    assert "a number such as 0.6" in capsys.readouterr().err and not (tmp_path / "m").exists()


# --- extract ------------------------------------------------------------------------------------------------------


def test_extract_finds_the_adapter_that_was_merged(adapter, tmp_path, capsys):
    path, expected = adapter
    cli.main(["adapter", "merge", str(path), "--output", str(tmp_path / "merged")])
    found = tmp_path / "x.safetensors"
    options = ["--rank", "2", "--targets", ",".join(TARGETS), "--output", str(found)]
    assert cli.main(["adapter", "extract", str(tmp_path / "merged"), *options]) == 0
    said = capsys.readouterr().out
    assert "of rank 2: 0.00% of the update's norm is left out" in said and "0 other tensors differ" in said
    parts = load_components(get_preset("mini"), "cpu")
    load_adapter(found, parts.unet)
    assert (output(parts) - expected).abs().max() <= 1e-4

    assert cli.main(["adapter", "extract", str(tmp_path / "merged"), *options[2:], "--rank", "1"]) == 0
    said = capsys.readouterr().out
    assert "of rank 1: 0.00%" not in said
    options[3] = "attn1.to_q"
    assert cli.main(["adapter", "extract", str(tmp_path / "merged" / "unet"), *options]) == 0
    others = len([w for w in read_adapter(path).layers if not w.endswith("attn1.to_q")])
    assert f"{others} other tensors differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["show", "no/such/adapter"], "there is no such adapter file"),
        (["convert", "no/such/adapter", "x.bin"], "there is no such adapter file"),
        (["extract", "no/such/model", "--output", "x.safetensors"], "no U-Net in diffusers layout"),
        (["extract", ".", "--output", "x.bin"], "end in .safetensors"),
        (["show", "doodles", "--preset", "sd15"], "there is no finished run on 'doodles'"),
        (["show", "x", "--preset", "y"], "unknown preset 'y'"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["adapter", *arguments]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert words in line


# --- sampling with an adapter that says where it comes from ---------------------------------------------------------


@pytest.mark.parametrize("field, value", [("prediction_type", "epsilon"), ("base_model_hash", "another")])
def test_an_adapter_of_another_base_is_refused_unless_asked_for(components, tmp_path, capsys, field, value):
    try:
        path = save_adapter(tmp_path / "a.safetensors", adapted(components.unet), {field: value})
    finally:
        lora.remove(components.unet)
    sample = ["sample", "--prompt", "a cat", "--steps", "1", "--adapter", str(path), "--output", f"{tmp_path}/x.png"]
    merge = ["adapter", "merge", f"{path}=0.5", "--output", f"{tmp_path}/merged"]
    for command in (sample, merge):
        assert cli.main(command) == 1
        assert f"trained with {field} '{value}'" in capsys.readouterr().err
        # another base may be tried; another prediction type would be read as what it is not
        assert cli.main([*command, "--other-base"]) == (1 if field == "prediction_type" else 0)
    assert (tmp_path / "x.png").exists() == (tmp_path / "merged").exists() == (field != "prediction_type")


# --- the card -----------------------------------------------------------------------------------------------------


def test_the_card_is_in_the_hubs_format_and_says_what_the_file_says(tmp_path):
    said = {"base_model": "owner/model", "dataset": "doodles", "seed": 7, "step": 1000, "versions": {"torch": "2.0"}}
    write_adapter(tmp_path, Adapter({f"unet.{n}": w for n, w in weights_of(adapted(tiny_unet())).items()}, {}, said))
    path = cards.write_card(tmp_path)
    assert path == tmp_path / "README.md"
    card = ModelCard.load(path)
    assert card.data.base_model == "owner/model" and "lora" in card.data.tags
    assert card.data.library_name == "diffusers" and card.data.pipeline_tag == "text-to-image"
    for text in ("# LoRA: doodles for owner/model", "| seed | 7 |", "| step | 1000 |", "| rank | 2 |", "torch 2.0"):
        assert text in card.text
    assert 'from_pretrained("owner/model")' in card.text and "{" not in card.text


def test_the_card_of_a_local_base_names_no_hub_model(tmp_path):
    write_adapter(
        tmp_path,
        Adapter({f"unet.{n}": w for n, w in weights_of(adapted(tiny_unet())).items()}, {}, {"base_model": "MiniSD"}),
    )
    card = ModelCard.load(cards.write_card(tmp_path))
    assert card.data.base_model is None and "MiniSD, is not on the hub" in card.text


# --- found by the name of one's own pictures ----------------------------------------------------------------------


def test_the_readme_s_commands_train_on_own_pictures_and_draw_with_the_adapter(tmp_path, monkeypatch, capsys):
    """The commands as README.md prints them, with fewer steps, where the folder of pictures lies."""
    lines = [line.strip() for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    names = ("look", "train", "sample")
    look, train, sample = (next(line for line in lines if line.startswith(f"course {name} ")) for name in names)
    assert "--data my_images" in look and "--data my_images" in train and "--adapter my_images" in sample
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    (tmp_path / "my_images").mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 90, 200)).save(tmp_path / "my_images" / f"{number}.png")
        (tmp_path / "my_images" / f"{number}.txt").write_text(f"a portrait of a cat, number {number}, in my style")
    assert cli.main(shlex.split(look)[1:]) == 0
    assert cli.main([word if word != "500" else "2" for word in shlex.split(train)[1:]]) == 0
    said = capsys.readouterr().out
    assert said.count("my_images: 4 pictures") >= 2 and "contact sheet: " in said
    run = newest_run(get_preset("mini"), "my_images")
    assert run is not None and run.config["train"]["steps"] == 2
    found = find_adapter(get_preset("mini"), "my_images")
    assert found == run.adapter == find_adapter(get_preset("mini"), "my_images/")
    for name in ("evolution.png", "before_and_after.png"):
        with Image.open(run.adapter.parent / name) as sheet:
            assert sheet.size == (2 * run.config["resolution"], 4 * run.config["resolution"])
    # the commands that it prints at its end
    again = next(line for line in said.splitlines() if line.startswith("draw with it: course "))
    assert cli.main([*shlex.split(again)[4:], "--output", "again.png", "--steps", "1"]) == 0
    assert cli.main([*shlex.split(sample)[1:], "--steps", "2", "--output", "cat.png"]) == 0
    assert (tmp_path / "cat.png").exists() and "there is no such" not in capsys.readouterr().err


def test_the_newest_finished_run_counts_and_a_name_without_one_stays_a_path(tmp_path, monkeypatch, preset, finished):
    assert newest_run(preset, "own") == finished and newest_run(preset, "ow") is None
    assert find_adapter(preset, "nothing") == Path("nothing")
    cats = shutil.copytree(finished.dir, finished.dir.with_name("own-cats-0123456789ab"))
    os.utime(cats / "done.json", (2e9, 2e9))
    assert newest_run(preset, "own") == finished and newest_run(preset, "own-cats").dir == cats
    newer = finished.dir.with_name("others-0123456789ab")
    shutil.copytree(finished.dir, newer)
    os.utime(newer / "done.json", (2e9, 2e9))
    assert newest_run(preset, "others").dir == newer
    (newer / "done.json").unlink()
    assert newest_run(preset, "others") is None, "a run that is not finished has no adapter to give"

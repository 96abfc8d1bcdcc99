"""Real Stable Diffusion without a network: everything but the bytes of the weights.

The hub's cache is built by hub_cache.py: real names, revisions, layouts and configurations; small, random weights. The
notebooks run on it in kernels of their own, as `course run` starts them.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import hub_cache
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from helpers import lora
from helpers.base.hub import HubError
from helpers.base.paths import ROOT
from helpers.course import notebooks
from helpers.course.results import read
from helpers.data.fingerprint import data_fingerprint
from helpers.diffusion import components
from helpers.diffusion.components import UNET, UNET_FP16, ComponentsError, load_components
from helpers.diffusion.pictures import to_latents
from helpers.diffusion.sampling import generate
from helpers.diffusion.text import encode_prompts, tokenize
from helpers.diffusion.weights import weights_fingerprint
from helpers.presets.catalogue import PRESETS
from helpers.presets.configuration import ATTENTION
from helpers.presets.sd_configs import CONFIGS, build_part
from helpers.presets.variants import get_preset
from helpers.training.guards import check_latents
from helpers.training.runs import TrainingError

MODELS = list(CONFIGS)
# `make weekly` runs the notebooks at the models' own sizes, which takes three times as long
SIZE = "" if os.environ.get("COURSE_FULL_SIZE") else "@128px"


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """What HF_HOME names: a hub cache with the models and datasets of the presets."""
    folder = tmp_path_factory.mktemp("huggingface")
    hub_cache.build(folder)
    return folder


@pytest.fixture
def offline(home, tmp_path, monkeypatch):
    """This process reads that cache, and nothing else."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("COURSE_LOCAL", raising=False)
    return home / "hub"


def loaded(model):
    return load_components(get_preset(f"{model}@trial"), "cpu")


def own_copy(offline, model, folder):
    """A copy of one's own of a cached model, whose files may be edited."""
    preset = PRESETS[model]
    name = f"models--{preset.model.replace('/', '--')}"
    target = folder / preset.model.split("/")[-1]
    shutil.copytree(offline / name / "snapshots" / preset.revision, target)  # follows the links
    return target


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- the notebooks -----------------------------------------------------------------------------------------------


def run_course(home, runs, preset, *options):
    """`course run` as a user starts it; its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "COURSE_"))}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "COURSE_RUNS": str(runs)}
    command = [sys.executable, "-m", "helpers.cli", "run", "--preset", preset, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def without_sliders(figures):
    """What is noted of the figures; sliders name no model."""
    return [entry for name, entry in figures.items() if not name.startswith("slider_")]


@pytest.mark.parametrize(
    ("model", "variants", "only"),
    [
        ("sd21-base", f"@trial{SIZE}", None),
        ("sd21", f"@trial@bf16{SIZE}", "01,02,03,04"),
        ("sd15", f"@trial{SIZE}", "01,02,03,04"),
    ],
)
def test_the_notebooks_run_on_stable_diffusion(home, tmp_path, model, variants, only):
    """sd21 in half precision, as on a GPU. In two steps nothing is learnt; every cell runs on the real structure."""
    preset = model + variants
    said = run_course(home, tmp_path, preset, *(["--only", only] if only else []))
    count = len(notebooks.select(only))
    assert f"{count} notebooks executed" in said
    results = read(tmp_path / preset / "results.json")
    assert {note["weights"] for note in results["provenance"].values()} == {PRESETS[model].revision}
    for note in results["provenance"].values():
        assert {data.split("@")[1] for data in note["data"].values()} == set(hub_cache.DATA_COMMIT.values())
    models = {entry["model"] for entry in without_sliders(results["figures"])} - {"none (dataset)"}
    assert models == {PRESETS[model].model}, "a picture of one model labelled as another's"
    runs = sorted(path.parent.name.split("-")[0] for path in (tmp_path / preset).glob("*/done.json"))
    own = ["mine"] if any(path.stem.startswith("10") for path in notebooks.select(only)) else []  # it trains one more
    assert runs == sorted(["doodles", "vintage", *own])
    if only is None:
        assert (tmp_path / preset / "report.pdf").read_bytes().startswith(b"%PDF")
        encoders = {entry.get("encoder") for entry in results["values"].values()} - {None}
        assert len(encoders) == 1 and "CLIP" in encoders.pop()


def test_a_small_gpu_gets_minisd_where_the_unet_is_copied_and_it_is_called_so(home, tmp_path):
    """Notebook 02 has no room for two U-Nets of Stable Diffusion in float32 there."""
    preset = "sd21-base@16gb@trial@128px"
    run_course(home, tmp_path, preset, "--only", "02")
    figures = read(tmp_path / preset / "results.json")["figures"]
    assert {entry["model"] for entry in without_sliders(figures)} == {"MiniSD"} and len(without_sliders(figures)) >= 3


# --- what is loaded ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_the_parts_are_those_of_the_configuration(offline, model):
    components = loaded(model)
    wanted = CONFIGS[model]
    assert components.name == PRESETS[model].model and not components.is_minisd
    assert components.latent_shape == (4, *[wanted["unet"]["sample_size"]] * 2)
    for name in ("cross_attention_dim", "use_linear_projection", "upcast_attention"):
        assert components.unet.config[name] == wanted["unet"].get(name, False)
    assert components.vae.config.scaling_factor == 0.18215
    schedule = components.noise_scheduler.config
    assert (schedule.beta_start, schedule.beta_end, schedule.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert schedule.steps_offset == 1 and not schedule.clip_sample


@pytest.mark.parametrize("model", MODELS)
def test_our_sampler_draws_what_diffusers_draws_from_the_same_folder(offline, model):
    """Prediction type, scaling factor, text layers, padding and schedule: one wrong, and the pictures differ."""
    preset = get_preset(f"{model}@trial")
    components = loaded(model)
    folder = offline / f"models--{preset.model.replace('/', '--')}" / "snapshots" / preset.revision
    transformers_logging.set_verbosity_error()
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(
        vae=type(components.vae).from_pretrained(folder / "vae"),
        unet=type(components.unet).from_pretrained(folder / "unet"),
        text_encoder=type(components.text_encoder).from_pretrained(folder / "text_encoder"),
        tokenizer=components.tokenizer,  # whose padding has a test of its own
        scheduler=DDIMScheduler.from_config(DDIMScheduler.load_config(folder / "scheduler"), clip_sample=False),
        **parts,
    )
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, *components.latent_shape, generator=torch.Generator().manual_seed(3))
    settings = {"num_inference_steps": 3, "guidance_scale": 7.5}
    theirs = pipeline("a drawing of a cat", latents=noise, **settings).images[0]
    ours = generate(components, ["a drawing of a cat"], [3], **settings)[0]
    difference = np.abs(np.asarray(ours, float) - np.asarray(theirs, float))
    assert ours.size == theirs.size and difference.max() <= 1, f"they differ by {difference.mean():.2f} grey levels"
    other = generate(components, ["a drawing of a man"], [3], **settings)[0]
    assert np.abs(np.asarray(ours, float) - np.asarray(other, float)).max() > 1, "and the prompt matters"


@pytest.mark.parametrize(("model", "pads_with_0"), [("sd21-base", True), ("sd21", True), ("sd15", False)])
def test_captions_are_padded_as_the_model_was_trained(offline, model, pads_with_0):
    """The files say the end token for all three, as Stable Diffusion 2's do."""
    components = loaded(model)
    ids = tokenize(components, ["a cat"])[0].tolist()
    end = components.tokenizer.eos_token_id
    assert len(ids) == 77 and ids[3] == end
    assert set(ids[4:]) == {0 if pads_with_0 else end}


@pytest.mark.parametrize("model", MODELS)
def test_text_is_read_at_the_last_layer_of_the_file(offline, model):
    """Which is the penultimate one of OpenCLIP's ViT-H for version 2, so that none is to be left out once more."""
    components = loaded(model)
    encoder, ids = components.text_encoder, tokenize(components, ["a drawing of a cat"])
    out = encoder(ids, output_hidden_states=True)
    norm = getattr(encoder, "text_model", encoder).final_layer_norm
    states = encode_prompts(components, ["a drawing of a cat"])
    assert torch.allclose(states, norm(out.hidden_states[-1]), atol=1e-6)
    assert not torch.allclose(states, norm(out.hidden_states[-2]), atol=1e-2)
    assert CONFIGS["sd21"]["text_encoder"]["num_hidden_layers"] == 24 - 1


def test_a_wrong_prediction_type_in_the_files_is_refused(offline, tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_LOCAL", str(tmp_path))
    folder = own_copy(offline, "sd21", tmp_path)
    assert loaded("sd21").prediction_type == "v_prediction"
    edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    with pytest.raises(ComponentsError, match="predicts epsilon, but preset 'sd21@trial' says v_prediction"):
        loaded("sd21")


def test_a_tokenizer_without_its_files_is_refused(offline, tmp_path, monkeypatch):
    """transformers would read every word as the same unknown token."""
    folder = own_copy(offline, "sd21-base", tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink()
    in_a_folder = replace(get_preset("sd21-base@trial"), model=str(folder), revision=None)
    with pytest.raises(ComponentsError, match="knows 2 tokens, its text encoder"):
        load_components(in_a_folder, "cpu")
    monkeypatch.setenv("COURSE_LOCAL", str(tmp_path))
    with pytest.raises(HubError, match="it is here only in part: .* has no tokenizer/vocab.json"):
        loaded("sd21-base")


def test_a_missing_scaling_factor_is_found_before_training(offline, tmp_path, monkeypatch):
    from helpers.data.caches import compute_cache
    from helpers.data.loading import load_pictures

    monkeypatch.setenv("COURSE_LOCAL", str(tmp_path))
    folder = own_copy(offline, "sd21-base", tmp_path)
    (tmp_path / "doodles-captions-BLIP").mkdir()
    with pytest.raises(ValueError):  # an empty copy of one's own is none
        load_pictures(get_preset("sd21-base@trial").datasets["doodles"])
    shutil.rmtree(tmp_path / "doodles-captions-BLIP")
    pictures = load_pictures(get_preset("sd21-base@trial").datasets["doodles"])
    check_latents(loaded("sd21-base"), compute_cache(loaded("sd21-base"), pictures))
    edit_json(folder / "vae" / "config.json", scaling_factor=1.0)
    wrong = loaded("sd21-base")
    with pytest.raises(TrainingError, match="scaling factor 1.0"):
        check_latents(wrong, compute_cache(wrong, pictures))


def test_latents_are_about_as_wide_as_the_noise(offline):
    components = loaded("sd21-base")
    pictures = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert to_latents(components, pictures)[0].std() == pytest.approx(1, rel=0.05)


def test_a_half_precision_run_keeps_vae_and_text_encoder_out_of_it(offline):
    """Validation runs inside autocast, and a VAE in half precision may return NaN."""
    from helpers.diffusion.pictures import to_pictures

    components = loaded("sd21-base")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    calls = (
        lambda: to_pictures(components, latents),
        lambda: to_latents(components, pictures)[0],
        lambda: encode_prompts(components, ["a cat"]),
    )
    for call in calls:
        expected = call()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(), expected)


# --- half precision ----------------------------------------------------------------------------------------------


def test_half_precision_is_that_of_the_unet_alone(offline):
    components = load_components(get_preset("sd21-base@trial@bf16"), "cpu")
    dtypes = {part: next(getattr(components, part).parameters()).dtype for part in ("unet", "vae", "text_encoder")}
    assert dtypes == {"unet": torch.bfloat16, "vae": torch.float32, "text_encoder": torch.float32}
    assert next(loaded("sd21-base").unet.parameters()).dtype == torch.float32, "auto is float32 on a CPU"
    pictures = generate(components, ["a cat"], [0], num_inference_steps=2)
    assert np.isfinite(np.asarray(pictures[0], float)).all()


def test_attention_is_computed_in_float32_where_the_model_asks_for_it(offline):
    """Stable Diffusion 2.1's attention scores exceed what float16 can hold. Notebook 01 computes them itself."""
    unet = loaded("sd21").unet
    attention = [module for module in unet.modules() if isinstance(module, Attention)]
    assert attention and all(module.upcast_attention for module in attention)
    assert not any(m.upcast_attention for m in loaded("sd21-base").unet.modules() if isinstance(m, Attention))

    cells = notebooks.read(ROOT / "notebooks" / "01_stable_diffusion.ipynb").cells
    source = next(cell.source for cell in cells if "class AttentionRecorder" in cell.source)
    (definition,) = [node for node in ast.parse(source).body if getattr(node, "name", "") == "AttentionRecorder"]
    known = {"torch": torch, "Tensor": torch.Tensor}
    exec(compile(ast.Module([definition], []), "notebook 01", "exec"), known)

    layer = next(module for name, module in unet.named_modules() if name.endswith("attn2"))
    with torch.no_grad():
        for projection in (layer.to_q, layer.to_k):
            projection.weight.mul_(4000 / projection.weight.std())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 16, layer.to_q.in_features, generator=generator)
    states = torch.randn(1, 77, layer.to_k.in_features, generator=generator) / 30

    def output(dtype):
        layer.to(dtype)
        return known["AttentionRecorder"]()(layer, hidden.to(dtype), states.to(dtype)).float()

    expected = output(torch.float32)
    assert torch.allclose(output(torch.float16), expected, atol=0.05 * expected.abs().max().item())

    # Control: diffusers' own attention on the same numbers, with and without
    query, key = (layer.head_to_batch_dim(x) for x in (layer.to_q(hidden.half()), layer.to_k(states.half())))
    for layer.upcast_attention in (True, False):
        assert layer.get_attention_scores(query, key).isfinite().all() == layer.upcast_attention


# --- sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "part", "count"),
    [
        ("sd21-base", "unet", 865_910_724), ("sd21", "unet", 865_910_724), ("sd15", "unet", 859_520_964),
        ("sd21-base", "text_encoder", 340_387_840), ("sd15", "text_encoder", 123_060_480),
        ("sd21-base", "vae", 83_653_863), ("sd15", "vae", 83_653_863),
    ],
)  # fmt: skip
def test_parameter_counts_at_full_size(model, part, count):
    assert sum(p.numel() for p in build_part(model, part).parameters()) == count


@pytest.mark.parametrize(("model", "per_rank"), [("sd21-base", 207_488), ("sd21", 207_488), ("sd15", 199_296)])
def test_lora_counts_at_full_size(model, per_rank):
    unet = build_part(model, "unet")
    names = lora.find_targets(unet, ATTENTION)
    assert len(names) == 128
    # in + out of each matrix
    assert sum(sum(unet.get_submodule(name).weight.shape) for name in names) == per_rank


@pytest.mark.parametrize("model", MODELS)
def test_the_download_sizes_that_are_told(model):
    """Float32 weights of the three parts, in 10^9 bytes."""
    parts = ("unet", "vae", "text_encoder")
    numbers = sum(p.numel() for part in parts for p in build_part(model, part).parameters())
    assert PRESETS[model].download_gb == pytest.approx(4e-9 * numbers, abs=0.06)
    of_unet = sum(p.numel() for p in build_part(model, "unet").parameters())
    assert components.UNET_SAVED_GB == pytest.approx(2e-9 * of_unet, abs=0.06)


# --- whose copy it is --------------------------------------------------------------------------------------------


def test_runs_know_revision_commit_and_ones_own_copy(offline, tmp_path, monkeypatch):
    preset = get_preset("sd21-base@trial")
    spec = preset.datasets["vintage"]
    assert weights_fingerprint(preset) == f"{preset.model}@{preset.revision}"
    first = data_fingerprint(spec, 512)
    assert first == data_fingerprint(replace(spec, licence="another", download_gb=9.0), 512)
    assert first != data_fingerprint(replace(spec, split="first"), 512)
    monkeypatch.setenv("COURSE_LOCAL", str(tmp_path))
    folder = own_copy(offline, "sd21-base", tmp_path)
    own = weights_fingerprint(preset)
    assert re.fullmatch("[0-9a-f]{64}", own)
    edit_json(folder / "vae" / "config.json", scaling_factor=0.5)
    assert weights_fingerprint(preset) != own


def test_a_new_commit_of_an_unpinned_dataset_is_another_run(home, tmp_path, monkeypatch):
    spec = get_preset("sd21-base@trial").datasets["vintage"]
    repository = spec.source.partition(":")[2]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    found = set()
    for commit in ("1" * 40, "2" * 40):
        hub_cache.add_repository(tmp_path / "hub", "dataset", repository, commit, {"data/train-0.parquet": b""})
        found.add(data_fingerprint(spec, 512))
    assert len(found) == 2


def test_what_is_not_in_the_cache_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="Stable Diffusion 2.1-base .*sd2-community.*stabilityai.*HF_HUB_OFFLINE"):
        loaded("sd21-base")


def stored_in_half(offline, model, folder):
    """A copy of one's own whose U-Net is stored in float16 only."""
    target = own_copy(offline, model, folder)
    whole, half = (target / name for name in (UNET, UNET_FP16))
    save_file({name: tensor.half() for name, tensor in load_file(whole).items()}, half)
    whole.unlink()
    return target


def test_a_u_net_stored_in_float16_is_enough_for_float16_and_for_nothing_else(offline, tmp_path, monkeypatch):
    whole = load_components(get_preset("sd15@trial@fp16"), "cpu")
    stored_in_half(offline, "sd15", tmp_path / "own")
    monkeypatch.setenv("COURSE_LOCAL", str(tmp_path / "own"))
    half = load_components(get_preset("sd15@trial@fp16"), "cpu")
    states = half.unet.state_dict(), whole.unet.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1]), "the numbers that rounding gives"
    assert {half.vae.dtype, half.text_encoder.dtype} == {torch.float32} and half.unet.dtype == torch.float16
    for precision in ("", "@bf16"):
        with pytest.raises(HubError, match="unet/diffusion_pytorch_model.safetensors"):
            load_components(get_preset(f"sd15@trial{precision}"), "cpu")


def test_float16_downloads_the_smaller_u_net(monkeypatch):
    asked = []

    def fetch(what, repositories, kind, patterns, needed, gigabytes):
        asked.append((patterns, needed, gigabytes))
        raise HubError("not there")

    monkeypatch.setattr(components.hub, "fetch", fetch)
    for half in (True, False):
        with pytest.raises(HubError):
            components.find_model(get_preset("sd15"), half)
    (small, either, least), (large, whole, most), again = asked
    assert UNET_FP16 in small and UNET not in small and least == pytest.approx(most - 1.7)
    assert UNET in large and UNET_FP16 not in large and UNET in whole and f"{UNET}|{UNET_FP16}" in either
    assert again == asked[1], "and a repository without it sends the whole one"

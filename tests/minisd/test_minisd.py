"""MiniSD's making: the tokenizer, the autoencoder's statistics, budgets that resume, the pool, the judge's heads."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch.utils.flop_counter import FlopCounterMode

from helpers.base.provenance import folder_weights_hash
from helpers.diffusion.components import load_components
from helpers.evaluation import classifier
from helpers.evaluation.classifier import HEADS, Classifier, labels, load_classifier
from helpers.minisd import architecture
from helpers.minisd.architecture import SCALING_FACTOR, TINY
from helpers.minisd.budget import Budget, Ema
from helpers.minisd.measure import CARD, METRICS, measure_sight, preset_of, table, training_log
from helpers.minisd.pool import draw_pool
from helpers.minisd.pretrain import check_autoencoder, finished_parts
from helpers.minisd.train_judge import loss_of, visible
from helpers.minisd.train_unet import CAPTION_DROPOUT, draw_batch, draw_timesteps, latent_pool
from helpers.minisd.train_vae import CROP, NOISE, crops, encode, fold_statistics, psnr, reconstruct
from helpers.presets.variants import get_preset
from helpers.world.captions import vocabulary_corpus
from helpers.world.scenes import HELD_OUT_PAIRS
from tests.tiny import tiny_minisd


@pytest.fixture(scope="module")
def pool():
    return draw_pool(24, {"flat": 0.5, "sketch": 0.5}, TINY.picture, seed=5, workers=1)


@pytest.fixture
def parts():
    return architecture.build_tiny()


def test_pool_does_not_depend_on_the_number_of_workers(pool):
    again = draw_pool(24, {"flat": 0.5, "sketch": 0.5}, TINY.picture, seed=5, workers=2)
    assert np.array_equal(pool.pictures, again.pictures) and pool.captions == again.captions
    assert set(pool.styles) == {"flat", "sketch"}
    assert not {(s.subject, s.headwear) for s in pool.scenes} & HELD_OUT_PAIRS


def test_a_word_of_the_captions_is_one_token():
    tokenizer = architecture.build_tokenizer(vocabulary_corpus(20000, seed=0), architecture.MINI)
    words = {word for text in vocabulary_corpus(2000, seed=1) for word in re.findall(r"\w+|[^\w\s]", text)}
    assert {word for word in words if len(tokenizer.tokenize(word)) > 1} <= {"3d"}
    assert len(tokenizer) <= architecture.MINI.vocabulary


def test_saved_folder_is_a_plain_pipeline(parts, tmp_path):
    architecture.save(parts, tmp_path / "weights")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "weights")
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.tokenizer("a man, smiling").input_ids == parts["tokenizer"]("a man, smiling").input_ids
    assert pipe.tokenizer.pad_token_id == 0 and pipe.tokenizer.model_max_length == TINY.text_positions
    stored = torch.float16, torch.float32
    assert (pipe.unet.dtype, pipe.text_encoder.dtype) in {stored, (torch.float32, torch.float32)}
    for name in ("unet", "vae", "text_encoder"):
        for a, b in zip(parts[name].parameters(), getattr(pipe, name).parameters(), strict=True):
            kept = a.detach() if name == "vae" else architecture.rounded(a.detach())
            assert torch.equal(kept.half(), b.half())


def test_rounded_weights_are_few_near_and_stay_as_they_are():
    noise = torch.randn(40, 30, 3, 3, generator=torch.Generator().manual_seed(0))
    weight = noise * torch.logspace(-4, 1, 40).view(-1, 1, 1, 1)
    near = architecture.rounded(weight)
    row = weight.flatten(1).abs().amax(1)
    assert ((near - weight).flatten(1).abs().amax(1) <= row / 255).all()
    assert max(len(set(values.tolist())) for values in near.flatten(1)) <= 511
    assert torch.equal(architecture.rounded(near), near) and torch.equal(near[3:].half().float(), near[3:])
    vector, whole = torch.randn(7), torch.arange(6).view(2, 3)
    assert architecture.rounded(vector) is vector and architecture.rounded(whole) is whole


def test_folding_turns_latents_to_their_components_and_keeps_reconstructions(parts, pool):
    vae = parts["vae"]
    before = reconstruct(vae, pool.pictures)
    raw = torch.linalg.eigvalsh(torch.cov(encode(vae, pool.pictures)[0].transpose(0, 1).flatten(1)))
    fold_statistics(vae, pool.pictures)
    mean, std = encode(vae, pool.pictures)
    scaled = mean * SCALING_FACTOR
    channels = TINY.latent_channels
    assert torch.allclose(scaled.mean((0, 2, 3)), torch.zeros(channels), atol=1e-4)
    spread = torch.cov(scaled.transpose(0, 1).flatten(1))
    variance = spread.diagonal()
    assert torch.allclose(spread, torch.diag(variance), atol=1e-3), "correlated"
    assert abs(variance.mean() - 1) < 1e-3
    assert torch.allclose(variance / variance[-1], (raw / raw[-1]).clamp(min=1e-3).sqrt(), rtol=0.02), "not the roots"
    assert (before.int() - reconstruct(vae, pool.pictures).int()).abs().max() <= 1
    assert torch.allclose(std * SCALING_FACTOR, torch.tensor(NOISE / 2), atol=1e-6)  # whatever the picture


def test_crops_lie_on_the_latents_grid_and_every_other_one_changes_its_colours():
    rows, columns = np.mgrid[0:128, 0:128].astype(np.uint8)
    picture = np.stack([rows, columns, np.full_like(rows, 200)], -1)[None]
    cut = (crops(picture, 32, torch.Generator().manual_seed(0), "cpu") + 1) * 127.5
    assert cut.shape == (32, 3, CROP, CROP)
    assert not (cut[1::2, :2, 0, 0].round() % 8).any() and (cut[1::2, 2].round() == 200).all()
    assert len({tuple(corner) for corner in cut[1::2, :2, 0, 0].tolist()}) > 8
    assert not (cut[::2, 2].round() == 200).all()


def test_finished_parts_come_back(parts, tmp_path):
    architecture.save(parts, tmp_path / "weights")
    again = finished_parts(tmp_path / "weights", ("vae", "tokenizer"))
    architecture.save({**parts, **again}, tmp_path / "once more")
    assert not [f for f in (tmp_path / "once more").rglob("*.json") if str(tmp_path) in f.read_text()]
    assert set(again) == {"vae", "tokenizer"}
    assert torch.equal(again["vae"].quant_conv.weight, parts["vae"].quant_conv.weight.half().float())


def test_an_earlier_generation_s_autoencoder_is_refused(parts, tmp_path):
    check_autoencoder(parts["vae"], tmp_path)
    with pytest.raises(SystemExit, match="4 latent channels, not 10"):
        check_autoencoder(architecture.build_vae(replace(TINY, latent_channels=4)), tmp_path)


def test_reconstructing_keeps_no_picture_as_floats(parts, pool, monkeypatch):
    """Eighteen thousand pictures of 128 pixels are 3.5 GB as floats, and that several times over."""
    joined = []
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda found, *rest: joined.append(found[0].dtype) or cat(found, *rest))
    decoded = reconstruct(parts["vae"], pool.pictures, 5)
    assert joined and set(joined) == {torch.uint8}
    monkeypatch.undo()
    apart = [reconstruct(parts["vae"], pool.pictures[k : k + 1]) for k in range(len(pool))]
    assert (decoded.int() - torch.cat(apart).int()).abs().max() <= 1 and decoded.shape == pool.pictures.shape


def test_sight_is_measured_of_any_components(monkeypatch):
    monkeypatch.setattr("helpers.evaluation.faces.load_classifier", lambda: Classifier().eval())
    monkeypatch.setitem(measure_sight.__globals__, "get_preset", lambda _: SimpleNamespace(guidance_scale=1.0))
    found = measure_sight(tiny_minisd(), count=6, prompts=2)
    assert len(found) == 10 and all(m["n"] in (2, 6) for m in found.values())
    assert json.loads(json.dumps(found)) == found


def test_weights_elsewhere_are_loaded_at_their_own_size(parts, tmp_path):
    architecture.save(parts, tmp_path / "weights")
    components = load_components(preset_of(tmp_path / "weights"), "cpu")
    assert components.resolution == TINY.picture and components.is_minisd


def test_psnr():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = np.full_like(a, 51)
    assert psnr(a, b).tolist() == pytest.approx([20 * np.log10(5)] * 2)


def test_batches_repeat_and_drop_a_tenth_of_the_captions(parts, pool):
    mean, std = encode(parts["vae"], pool.pictures)
    latents = latent_pool(mean, std, pool.captions, parts["tokenizer"])
    first, again, other = (draw_batch(latents, 200, k) for k in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
    dropped = (first[3] == latents.empty).all(1).float().mean()
    assert abs(dropped - CAPTION_DROPOUT) < 0.07


def test_timesteps_are_half_uniform_and_half_in_the_middle():
    t = draw_timesteps(2000, torch.Generator().manual_seed(0))
    assert t.min() >= 0 and t.max() <= 999
    # uniform: 20%; logit-normal: P(|z| > ln 9) = 2.8% beyond 0.1 and 0.9
    outer = ((t < 100) | (t >= 900)).float().mean().item()
    assert outer == pytest.approx((0.2 + 0.028) / 2, abs=0.005)
    assert (t >= 990).any()  # where sampling begins
    assert (t.sort().values != t).any()


def _train(folder, stop, total=6):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    ema = Ema({"m": model}, decay=0.9)
    budget = Budget(folder, seconds=1e9, log_every=1)
    budget.resume({"m": model}, optimizer, ema)
    for step in budget.steps():
        if step == stop or step == total:
            break
        loss = model(torch.full((1, 3), float(step))).pow(2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(step)
        budget.checkpoint({"m": model}, optimizer, ema, force=True)
    return model.weight, ema.weights["m"]["weight"]


def test_budget_resumes_where_it_stopped(tmp_path):
    weight, average = _train(tmp_path / "whole", stop=None)
    _train(tmp_path / "torn", stop=3)
    weight_again, average_again = _train(tmp_path / "torn", stop=None)
    assert json.loads((tmp_path / "torn" / "state.json").read_text())["step"] == 6
    assert torch.equal(weight, weight_again) and torch.equal(average, average_again)


def test_budget_ends(tmp_path):
    class Clock(Budget):
        def elapsed(self):
            return self.step * 10.0

    budget = Clock(tmp_path, seconds=45)
    assert list(budget.steps()) == [0, 1, 2, 3, 4]
    budget.step = 0
    assert budget.cosine(warmup_steps=10) == pytest.approx(0.1)


def test_heads_and_masks(pool):
    targets = labels(pool.scenes, pool.styles)
    assert targets.keys() == HEADS.keys()
    sketches = torch.tensor([s == "sketch" for s in pool.styles])
    assert torch.equal(visible("background", targets["style"]), ~sketches)
    assert visible("headwear", targets["style"]).all()
    logits = {name: torch.full((len(pool), len(c)), -50.0) for name, c in HEADS.items()}
    for name, rows in logits.items():
        rows[torch.arange(len(pool)), targets[name]] = 50.0
    assert float(loss_of(logits, targets)) < 1e-6
    # a wrong colour costs nothing in a sketch, and much in a flat icon
    wrong = {**logits, "background": -logits["background"]}
    only_sketches = {k: v[sketches] for k, v in targets.items()}
    assert float(loss_of({k: v[sketches] for k, v in wrong.items()}, only_sketches)) < 1e-6
    assert float(loss_of(wrong, targets)) > 1


def test_classifier_takes_any_size():
    out = Classifier()(torch.zeros(2, 3, 96, 96))
    assert {k: v.shape for k, v in out.items()} == {k: (2, len(c)) for k, c in HEADS.items()}


def test_missing_judge_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="classifier"):
        load_classifier(tmp_path / "classifier.safetensors")


def test_training_log_names_each_stage_and_its_sitting(tmp_path):
    for stage, pictures in (("unet", 8), ("vae", 16)):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "log.jsonl").write_text(f'{{"pictures": 1}}\n{{"pictures": {pictures}}}\n')
    expected = [{"stage": "vae, later", "pictures": 16}, {"stage": "unet, later", "pictures": 8}]
    assert training_log(tmp_path, "later") == expected
    assert [row["stage"] for row in training_log(tmp_path, "")] == ["vae", "unet"]


# --- the committed weights ---------------------------------------------------------------------------------------


def test_committed_weights_keep_to_their_size():
    folder = get_preset("mini").model_folder
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert size <= 40e6
    assert classifier.WEIGHTS.stat().st_size <= 4e6


def test_forward_costs_at_most_a_gigaflop():
    components = load_components(get_preset("mini"), "cpu")
    positions = components.text_encoder.config.max_position_embeddings
    text = torch.zeros(1, positions, components.unet.config.cross_attention_dim)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        components.unet(torch.zeros(1, *components.latent_shape), 500, text)
    assert 0.1e9 < counter.get_total_flops() <= 1.0e9


def test_card_is_of_these_weights_and_written_from_the_metrics():
    metrics = json.loads(METRICS.read_text())
    assert metrics["weights"] == folder_weights_hash(get_preset("mini").model_folder)
    card = CARD.read_text()
    assert metrics["weights"][:12] in card
    assert table(metrics["prompts"], ("attribute", "agreement")) in card
    assert "**not contrastively on pictures and captions as CLIP's is**" in " ".join(card.split())


# (what the committed weights must keep, what weights trained on a CPU should reach). A floor may only rise.
PROMPT_FLOORS = {"subject": (0.99, 0.85), "headwear": (0.98, 0.75), "background": (0.99, 0.90)}
JUDGE_FLOORS = {"drawn": (0.99, 0.98), "after the VAE": (0.99, 0.97)}
PSNR_FLOOR = 28  # dB


def test_weights_do_not_get_worse():
    metrics = json.loads(METRICS.read_text())
    for attribute, (floor, _) in PROMPT_FLOORS.items():
        assert metrics["prompts"][attribute]["value"] >= floor
    assert metrics["prompts"]["subject"]["n"] >= 500
    for stage, (floor, _) in JUDGE_FLOORS.items():
        for attribute in ("subject", "headwear", "style"):
            assert metrics["judge"][stage][attribute]["value"] >= floor
    for style in ("render", "flat", "sketch", "doodles", "vintage"):
        assert metrics["vae"][style]["value"] >= PSNR_FLOOR

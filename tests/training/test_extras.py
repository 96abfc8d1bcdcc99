"""Settings that other trainers have: caption orders, noise offset, LoRA+, a moving average. Each is off by default."""

import dataclasses
import shutil

import pytest
import torch
from training_tools import make_preset, quiet, same_run, same_tensors, stopped_and_resumed, weights

from helpers import lora
from helpers.adapters.reading import read_adapter
from helpers.data.caches import compute_cache, in_orders
from helpers.data.loading import load_pictures
from helpers.presets.configuration import DatasetSpec, TrainConfig
from helpers.training.draws import draw_step
from helpers.training.steps import averaged, injected, training_step, update_average

PLAIN = TrainConfig(batch_size=6, rank=2, caption_dropout=0.0)


def test_the_orders_of_a_caption_keep_its_first_part():
    caption = "vintage style, a cat, a hat, red"
    orders = in_orders(caption, 6)
    assert orders[0] == caption and len(orders) == 6 and orders == in_orders(caption, 6)
    assert all(order.startswith("vintage style, ") for order in orders) and len(set(orders)) > 2
    assert {frozenset(order.split(", ")) for order in orders} == {frozenset(caption.split(", "))}
    assert in_orders("a cat", 3) == ["a cat"] * 3 and in_orders("a,b ,  c", 1) == ["a,b ,  c"]


def test_a_step_draws_one_of_a_caption_s_orders(tiny, pictures):
    for path in pictures.glob("*.txt"):
        assert "," not in path.read_text()
    rows = load_pictures(DatasetSpec("own", f"folder:{pictures}", train_rows=10))
    rows = rows.remove_columns("text").add_column("text", [f"style, a cat, a hat, number {i}" for i in range(10)])
    plain, several = compute_cache(tiny, rows), compute_cache(tiny, rows, orders=4)
    assert plain.caption_index.shape == (10,) and several.caption_index.shape == (10, 4)
    assert [several.captions[i] for i in several.as_written] == list(rows["text"])
    one, other = (draw_step(PLAIN, cache, 3) for cache in (plain, several))
    assert torch.equal(one.noise, other.noise) and torch.equal(one.indices, other.indices), "nothing else is drawn anew"
    seen = set()
    for step in range(20):
        draw = draw_step(PLAIN, several, step)
        for row, ids in zip(draw.indices.tolist(), draw.input_ids, strict=True):
            own = several.caption_ids[several.caption_index[row]]
            assert (own == ids).all(1).any(), "an order of this very picture's caption"
            seen.add((row, tuple(ids.tolist())))
    assert len(seen) > 20


def test_noise_offset_shifts_whole_channels(latents):
    plain, shifted = (draw_step(dataclasses.replace(PLAIN, noise_offset=x), latents, 3) for x in (0.0, 0.5))
    shift = shifted.noise - plain.noise
    assert torch.allclose(shift, shift[..., :1, :1].expand_as(shift), atol=1e-6) and shift[0, 0].abs().max() > 1e-3
    assert len(shift[..., 0, 0].unique()) == shift[..., 0, 0].numel(), "another number for each channel and picture"
    assert torch.equal(plain.latents, shifted.latents) and torch.equal(plain.timesteps, shifted.timesteps)


def moved(tiny, latents, accelerator, **settings):
    """How far A and B of the first layer are from their start after two steps."""
    config = dataclasses.replace(PLAIN, learning_rate=1e-3, weight_decay=0.0, **settings)
    with injected(tiny, config, accelerator) as optimizer:
        layer = next(iter(lora.lora_layers(tiny.unet).values()))
        start = layer.lora_A.weight.clone(), layer.lora_B.weight.clone()
        for step in range(2):
            training_step(tiny, optimizer, draw_step(config, latents, step), config, step, accelerator)
        rates = {group["lr"] for group in optimizer.param_groups}
        ends = layer.lora_A.weight, layer.lora_B.weight
        return rates, [(now - then).norm().item() for now, then in zip(ends, start, strict=True)]


def test_lora_plus_lets_b_learn_faster(tiny, latents, accelerator):
    rates, (a, b) = moved(tiny, latents, accelerator)
    fast, (a16, b16) = moved(tiny, latents, accelerator, lora_plus=16.0)
    assert rates == {1e-3} and fast == {1e-3, 16e-3}
    assert b16 > 8 * b and a16 < 8 * a


def test_the_average_is_the_one_by_hand(tiny, latents, accelerator):
    config = dataclasses.replace(PLAIN, learning_rate=1e-2)
    with injected(tiny, config, accelerator) as optimizer:
        parameter = lora.lora_parameters(tiny.unet)[1]
        by_hand, decay = None, 0.3
        with averaged(optimizer):
            assert parameter.abs().max() == 0, "before the first step there is no average"
        for step in range(5):
            training_step(tiny, optimizer, draw_step(config, latents, step), config, step, accelerator)
            update_average(optimizer, decay, step)
            d = min(decay, (1 + step) / (10 + step))
            now = parameter.detach().clone()
            by_hand = now if by_hand is None else d * by_hand + (1 - d) * now
        with averaged(optimizer):
            assert torch.allclose(parameter, by_hand, atol=1e-7) and not torch.equal(parameter, now)
        assert torch.equal(parameter, now), "afterwards training goes on from the weights themselves"


def test_a_run_keeps_its_average_and_trains_on_without_it(world, pictures, tiny, whole):
    run = quiet(make_preset(pictures, ema_decay=0.9), tiny)
    losses = [line["loss"] for line in run.metrics()]
    assert losses == [line["loss"] for line in whole.metrics()], "the training itself does not see the average"
    assert not same_tensors(weights(run), weights(whole))
    last = read_adapter(run.checkpoint_dir(10) / "adapter.safetensors").of("unet")
    raw = read_adapter(whole.adapter).of("unet")
    assert all(torch.equal(last[name].B, raw[name].B) for name in raw), "a checkpoint holds what training goes on from"
    assert not torch.equal(run.validation_latents(10), whole.validation_latents(10))
    assert torch.equal(run.validation_latents(0), whole.validation_latents(0))


@pytest.mark.parametrize("settings", [{"ema_decay": 0.9}, {"lora_plus": 4.0}], ids=str)
def test_a_stopped_run_ends_with_the_same_bits(world, pictures, tiny, settings):
    preset = make_preset(pictures, **settings)
    undisturbed = quiet(preset, tiny)
    kept = shutil.copytree(undisturbed.dir, world / "kept")
    resumed, steps = stopped_and_resumed(preset, tiny, 5)
    assert steps[0] == 4 and same_run(resumed, dataclasses.replace(undisturbed, dir=kept)) == []

"""What a step draws: from its number alone, the same for any number of processes."""

import dataclasses

import torch

from helpers.presets.configuration import TrainConfig
from helpers.presets.variants import get_preset
from helpers.training.draws import batch_indices, draw_step, epoch_order, generator_for, seed_for, steps_per_epoch
from helpers.training.validation import validation_steps


def test_a_draw_depends_on_seed_and_step_alone(latents):
    config = TrainConfig(batch_size=4)
    torch.manual_seed(1)
    first = draw_step(config, latents, 7)
    torch.manual_seed(2)
    draw_step(config, latents, 3)
    state = torch.get_rng_state()
    again = draw_step(config, latents, 7)
    assert torch.equal(torch.get_rng_state(), state), "a draw must not use the global generator"
    for field in dataclasses.fields(first):
        assert torch.equal(getattr(first, field.name), getattr(again, field.name)), field.name
    for other in (draw_step(config, latents, 8), draw_step(dataclasses.replace(config, seed=1), latents, 7)):
        assert not torch.equal(first.noise, other.noise) and not torch.equal(first.timesteps, other.timesteps)


def test_a_draw_does_not_depend_on_the_memory_layout_of_the_cache(latents):
    """Convolutions leave channels-last latents behind, files give contiguous ones; their sums round differently."""
    config = TrainConfig(batch_size=4)
    other = dataclasses.replace(
        latents, **{name: getattr(latents, name).to(memory_format=torch.channels_last) for name in ("mean", "std")}
    )
    a, b = draw_step(config, latents, 7), draw_step(config, other, 7)
    assert torch.equal(a.latents, b.latents)
    assert a.latents.stride() == b.latents.stride() == a.noise.stride() == b.noise.stride() == (160, 16, 4, 1)


def test_purposes_do_not_share_their_numbers(latents):
    draw = draw_step(TrainConfig(batch_size=4), latents, 0)
    posterior_noise = (draw.latents - latents.mean[draw.indices]) / latents.std[draw.indices]
    assert not torch.allclose(posterior_noise, draw.noise, atol=1e-3)
    seeds = [seed_for(s, p, k) for s in range(3) for p in ("noise", "timesteps", "order") for k in range(50)]
    assert len(set(seeds)) == len(seeds) == 450


def test_each_epoch_is_its_own_permutation(latents):
    config = TrainConfig(batch_size=4)
    assert steps_per_epoch(config, 23) == 6
    epochs = [torch.cat([draw_step(config, latents, 6 * e + k).indices for k in range(6)]).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert len(draw_step(config, latents, 5).indices) == 3  # 23 = 5 * 4 + 3


def test_steps_per_epoch_of_the_two_datasets():
    assert [steps_per_epoch(TrainConfig(), rows) for rows in (1000, 685)] == [125, 86]
    assert validation_steps(TrainConfig(), 1000) == [0, 250, 500, 750, 1000]
    assert validation_steps(TrainConfig(), 685) == [0, 172, 344, 516, 688, 860, 1000]
    mini = get_preset("mini").train
    assert validation_steps(mini, 1000) == [0, 15, 30, 60, 125, 250, 500, 750, 1000]
    assert validation_steps(mini, 685) == [0, 15, 30, 60, 125, 172, 344, 516, 688, 860, 1000]


def test_latents_are_samples_of_the_posterior(latents):
    config = TrainConfig(batch_size=23, caption_dropout=0.0)
    noises = []
    for step in range(40):
        draw = draw_step(config, latents, step)
        noises.append((draw.latents - latents.mean[draw.indices]) / latents.std[draw.indices])
        assert torch.equal(draw.encoder_hidden_states, latents.caption_embeddings[latents.caption_index[draw.indices]])
    noises = torch.stack(noises)
    assert abs(noises.mean()) < 0.02 and abs(noises.std() - 1) < 0.02


def test_caption_dropout_puts_the_empty_caption_now_and_then(latents):
    config = TrainConfig(batch_size=23, caption_dropout=0.3)
    draws = [draw_step(config, latents, step).encoder_hidden_states for step in range(40)]
    empty = torch.stack([(states == latents.empty_embedding).flatten(1).all(dim=1) for states in draws])
    assert 0.2 < empty.float().mean() < 0.4
    all_dropped = draw_step(dataclasses.replace(config, caption_dropout=1.0), latents, 0).encoder_hidden_states
    assert torch.equal(all_dropped, latents.empty_embedding.expand(23, -1, -1))


def test_timesteps_cover_the_schedule(latents):
    config = TrainConfig(batch_size=23)
    t = torch.cat([draw_step(config, latents, step, 1000).timesteps for step in range(100)])
    assert t.min() < 10 and t.max() >= 990 and abs(t.float().mean() - 499.5) < 20
    assert draw_step(config, latents, 0, 10).timesteps.max() < 10


def test_the_order_of_an_epoch_that_is_remembered_is_the_one_that_was_drawn(latents):
    config = TrainConfig(batch_size=4, seed=3)
    for epoch in (0, 5, 0, 1, 2, 0):  # two orders are remembered: these come, go and come again
        expected = torch.randperm(23, generator=generator_for(3, "order", epoch))
        assert torch.equal(epoch_order(3, epoch, 23), expected)
        first = steps_per_epoch(config, 23) * epoch
        assert torch.equal(batch_indices(config, 23, first + 1), expected[4:8])
        assert torch.equal(batch_indices(config, 23, first + 5), expected[20:])
    epoch_order.cache_clear()
    before = draw_step(config, latents, 7)
    draw_step(config, latents, 700)
    assert torch.equal(draw_step(config, latents, 7).indices, before.indices)

"""Validations: when they happen, what they show, and that they change nothing."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from training_tools import make_preset, quiet, same_tensors, weights

from helpers.diffusion.sampling import initial_latents
from helpers.presets.configuration import TrainConfig
from helpers.training import draws
from helpers.training.validation import (
    HELD_OUT_TIMESTEPS,
    grid_timesteps,
    held_out_loss,
    loss_by_timestep,
    validation_latents,
    validation_pairs,
    validation_steps,
)


def test_the_held_out_loss_is_on_a_fixed_grid(tiny, latents):
    parts = {name: getattr(latents, name)[:5] for name in ("mean", "std", "caption_index")}
    small = dataclasses.replace(latents, **parts)
    first = held_out_loss(tiny, small)
    torch.manual_seed(5)
    assert held_out_loss(tiny, small) == first
    assert held_out_loss(tiny, small, batch_size=2) == pytest.approx(first, rel=1e-5)

    class Silent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))  # tells the dtype

        def forward(self, latents, timesteps, states):
            return SimpleNamespace(sample=torch.zeros_like(latents))

    # a model that answers nothing errs by the target: v = sqrt(ab) eps - sqrt(1 - ab) x0
    fake = SimpleNamespace(
        unet=Silent(), noise_scheduler=tiny.noise_scheduler, device=torch.device("cpu"), prediction_type="v_prediction",
        text_encoder=tiny.text_encoder,
    )  # fmt: skip
    noise = torch.randn(small.mean.shape, generator=draws.generator_for(0, "held-out noise", 0))
    ac = tiny.noise_scheduler.alphas_cumprod
    grid = (62, 187, 312, 437, 562, 687, 812, 937)
    expected = [(ac[t].sqrt() * noise - (1 - ac[t]).sqrt() * small.mean).square().mean().item() for t in grid]
    assert held_out_loss(fake, small) == pytest.approx(sum(expected) / 8, rel=1e-5)


def test_the_grid_s_timesteps_are_the_middles_of_equal_parts():
    assert grid_timesteps() == [62, 187, 312, 437, 562, 687, 812, 937]
    assert grid_timesteps(80) == [5, 15, 25, 35, 45, 55, 65, 75] and len(grid_timesteps()) == HELD_OUT_TIMESTEPS


def few_rows(latents, count):
    parts = {name: getattr(latents, name)[:count] for name in ("mean", "std", "caption_index")}
    return dataclasses.replace(latents, **parts)


def test_each_loss_is_the_error_of_its_picture_at_its_timestep(tiny, latents):
    """Every entry by hand: one picture, one timestep, one forward pass."""
    losses = loss_by_timestep(tiny, few_rows(latents, 5), seed=3, batch_size=2)
    assert losses.shape == (5, HELD_OUT_TIMESTEPS) and losses.dtype == torch.float64
    noise = torch.randn(5, *latents.mean.shape[1:], generator=draws.generator_for(3, "held-out noise", 0))
    ac = tiny.noise_scheduler.alphas_cumprod
    for row in range(5):
        x, n = latents.mean[row : row + 1], noise[row : row + 1]
        states = latents.caption_embeddings[latents.caption_index[row : row + 1]]
        for column, t in enumerate(grid_timesteps()):
            noisy = ac[t].sqrt() * x + (1 - ac[t]).sqrt() * n
            v = ac[t].sqrt() * n - (1 - ac[t]).sqrt() * x
            with torch.no_grad():
                error = (tiny.unet(noisy, torch.tensor([t]), states).sample - v).square().mean().item()
            assert losses[row, column].item() == pytest.approx(error, rel=1e-4), (row, t)
    assert len(losses.unique()) == losses.numel()


def test_the_mean_of_all_is_the_held_out_loss(tiny, latents):
    small = few_rows(latents, 5)
    assert loss_by_timestep(tiny, small).mean().item() == held_out_loss(tiny, small)
    other = loss_by_timestep(tiny, small, 4, 2).mean().item()
    assert other == held_out_loss(tiny, small, 4, 2) != held_out_loss(tiny, small)


def test_a_picture_s_losses_do_not_depend_on_the_batch(tiny, latents):
    whole, parts = (loss_by_timestep(tiny, few_rows(latents, 7), batch_size=size) for size in (16, 3))
    assert torch.allclose(whole, parts, rtol=1e-4)


def test_measuring_leaves_the_weights_and_the_generator_alone(tiny, latents):
    before = {name: value.clone() for name, value in tiny.unet.state_dict().items()}
    state = torch.random.get_rng_state()
    losses = loss_by_timestep(tiny, few_rows(latents, 3))
    assert torch.equal(torch.random.get_rng_state(), state) and not losses.requires_grad
    assert same_tensors(dict(tiny.unet.state_dict()), before)


def test_validation_pictures_start_from_the_same_latents(preset, tiny, whole):
    from helpers.diffusion.sampling import sample

    again = sample(tiny, ["a cat", "a man"], whole.initial_latents(), 2, preset.guidance_scale)
    assert torch.equal(whole.validation_latents(0), again), "step 0 is the base model"
    assert not torch.equal(whole.validation_latents(0), whole.validation_latents(10))


def test_validating_more_often_changes_nothing(tiny, whole, world, pictures):
    rarely = quiet(make_preset(pictures, validation_epochs=1000, held_out_eval=0, checkpoint_every=7), tiny)
    assert rarely.validations() == [(0, 0), (10, 3)] and rarely.key != whole.key and len(whole.validations()) == 5
    assert same_tensors(weights(whole), weights(rarely))
    assert [m["loss"] for m in whole.metrics()] == [m["loss"] for m in rarely.metrics()]


@pytest.mark.parametrize("settings, expected", [
    ({"steps": 10, "validation_epochs": 1}, [0, 3, 6, 9, 10]),  # 10 rows by 4: 3 steps an epoch
    ({"steps": 9, "validation_epochs": 1}, [0, 3, 6, 9]),
    ({"steps": 10, "validation_epochs": 2}, [0, 6, 10]),
    ({"steps": 10, "validation_epochs": 1000}, [0, 10]),
    ({"steps": 10, "validation_steps": 4}, [0, 4, 8, 10]),  # whatever the epochs say
    ({"steps": 10, "validation_steps": 5, "validation_epochs": 1}, [0, 5, 10]),
    ({"steps": 10, "validation_steps": 1}, list(range(11))),
    ({"steps": 1, "validation_steps": 7}, [0, 1]),
    ({"steps": 10, "validation_epochs": 2, "early_validations": (1, 2, 6, 30)}, [0, 1, 2, 6, 10]),  # none twice
    ({"steps": 10, "validation_steps": 4, "early_validations": (3, 1)}, [0, 1, 3, 4, 8, 10]),
])  # fmt: skip
def test_validations_come_first_in_between_and_last(settings, expected):
    assert validation_steps(TrainConfig(batch_size=4, **settings), 10) == expected


def test_an_early_validation_comes_after_a_step():
    with pytest.raises(ValueError, match="early_validations are steps from 1, not \\(0, 15\\)"):
        TrainConfig(early_validations=(0, 15))


def test_several_seeds_of_each_prompt(tiny):
    config = TrainConfig(seed=2, validation_seeds=3)
    pairs = validation_pairs(config, ("a cat", "a man"))
    assert [prompt for prompt, _ in pairs] == ["a cat"] * 3 + ["a man"] * 3
    seeds = [seed for _, seed in pairs]
    assert len(set(seeds)) == 6
    # with one seed only, each prompt has the first of its three
    assert [pairs[0], pairs[3]] == validation_pairs(dataclasses.replace(config, validation_seeds=1), ("a cat", "a man"))
    noise = validation_latents(tiny, config, ("a cat", "a man"))
    assert noise.shape == (6, *tiny.latent_shape) and torch.equal(noise, initial_latents(tiny, seeds))
    assert not torch.equal(noise[0], noise[1])


def test_a_run_with_validation_steps_and_seeds_leaves_that_many_pictures(world, pictures, tiny):
    preset = make_preset(pictures, steps=3, validation_steps=2, validation_seeds=2, held_out_eval=0)
    run = quiet(preset, tiny)
    assert run.validations() == [(0, 0), (2, 0), (3, 1)]
    for step, _ in run.validations():
        names = sorted(path.name for path in run.validation_dir(step).iterdir())
        assert names == ["000.png", "001.png", "002.png", "003.png", "latents.safetensors", "metrics.json"]
    # the first seed of each prompt starts where a run with one seed starts
    one = quiet(make_preset(pictures, steps=3, validation_epochs=1000, held_out_eval=0), tiny)
    assert torch.equal(run.initial_latents()[[0, 2]], one.initial_latents())
    assert (run.validation_latents(3)[[0, 2]] - one.validation_latents(3)).abs().max() < 1e-4
    assert len(run.validation_pictures(3)) == 4 and len(one.validation_pictures(3)) == 2

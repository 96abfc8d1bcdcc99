"""Validations: when they happen, what they show, and that they change nothing."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from training_tools import make_preset, quiet, same_tensors, weights

from helpers import draws
from helpers.presets import TrainConfig
from helpers.sampling import initial_latents
from helpers.validation import held_out_loss, validation_latents, validation_pairs, validation_steps


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


def test_validation_pictures_start_from_the_same_latents(preset, tiny, whole):
    from helpers.sampling import sample

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
])  # fmt: skip
def test_validations_come_first_in_between_and_last(settings, expected):
    assert validation_steps(TrainConfig(batch_size=4, **settings), 10) == expected


def test_several_seeds_of_each_prompt(tiny):
    config = TrainConfig(seed=2, validation_seeds=3)
    pairs = validation_pairs(config, ("a cat", "a man"))
    assert [prompt for prompt, _ in pairs] == ["a cat"] * 3 + ["a man"] * 3
    seeds = [seed for _, seed in pairs]
    assert len(set(seeds)) == 6
    # with one seed only, each prompt has the first of its three
    assert [pairs[0], pairs[3]] == validation_pairs(dataclasses.replace(config, validation_seeds=1), ("a cat", "a man"))
    noise = validation_latents(tiny, config, ("a cat", "a man"))
    assert noise.shape == (6, 4, 4, 4) and torch.equal(noise, initial_latents(tiny, seeds))
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

"""The hand-written sampler against diffusers' pipelines."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionImg2ImgPipeline

from helpers.diffusion import sampling
from helpers.diffusion.components import as_pipeline
from helpers.diffusion.pictures import to_latents, to_pictures, to_pil
from helpers.diffusion.sampling import generate, image_to_image, inference_timesteps, initial_latents, sample

PROMPTS = ["a drawing of a man with a red scarf", "a portrait of a cat", "a cat, vintage style"]


def with_prediction_type(components, prediction_type):
    config = components.noise_scheduler.config
    components.noise_scheduler = DDPMScheduler.from_config(config, prediction_type=prediction_type)
    return components


def generators(seeds):
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_equal_to_the_pipeline(tiny, prediction_type, steps, guidance_scale):
    components = with_prediction_type(tiny, prediction_type)
    latents = initial_latents(components, [0, 1, 2])
    ours = sample(components, PROMPTS, latents, num_inference_steps=steps, guidance_scale=guidance_scale)
    theirs = as_pipeline(components)(
        PROMPTS, latents=latents, num_inference_steps=steps, guidance_scale=guidance_scale, output_type="latent"
    ).images
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("steps", [1, 3, 25, 30, 50, 999])
def test_timesteps_equal_to_the_scheduler(tiny, steps):
    scheduler = as_pipeline(tiny).scheduler
    scheduler.set_timesteps(steps)
    assert inference_timesteps(steps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [0, -1, 1000])
def test_impossible_numbers_of_steps_are_refused(tiny, steps):
    with pytest.raises(ValueError, match="num_inference_steps must be 1 to 999"):
        sample(tiny, PROMPTS[:1], initial_latents(tiny, [0]), num_inference_steps=steps)


def test_pictures_equal_to_the_pipelines_from_the_same_seeds(tiny):
    ours = generate(tiny, PROMPTS, [5, 6, 7], num_inference_steps=3)
    theirs = as_pipeline(tiny)(
        PROMPTS, generator=generators([5, 6, 7]), num_inference_steps=3, guidance_scale=4.0
    ).images
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1


def test_each_row_of_noise_depends_on_its_seed_alone(tiny):
    torch.manual_seed(0)
    rows = initial_latents(tiny, [3, 4])
    torch.manual_seed(1)
    assert torch.equal(initial_latents(tiny, [4])[0], rows[1])
    assert rows.shape == (2, *tiny.latent_shape)
    assert not torch.equal(rows[0], rows[1])


def test_deterministic_and_does_not_touch_global_randomness(tiny):
    latents = initial_latents(tiny, [0, 1, 2])
    state = torch.random.get_rng_state()
    first = sample(tiny, PROMPTS, latents, num_inference_steps=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, sample(tiny, PROMPTS, latents, num_inference_steps=3))


def test_batch_size_splits_and_changes_nothing(tiny):
    latents = initial_latents(tiny, [0, 1, 2])
    sizes = []
    hook = tiny.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    whole = sample(tiny, PROMPTS, latents, num_inference_steps=2)
    split = sample(tiny, PROMPTS, latents, num_inference_steps=2, batch_size=2)
    hook.remove()
    assert sizes == [6, 6, 4, 4, 2, 2]  # one call a step, for the prompts and the empty prompt together
    assert torch.allclose(whole, split, atol=1e-5)


def test_without_guidance_the_empty_prompt_is_left_out(tiny):
    sizes = []
    hook = tiny.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    sample(tiny, PROMPTS, initial_latents(tiny, [0, 1, 2]), num_inference_steps=2, guidance_scale=1.0)
    hook.remove()
    assert sizes == [3, 3]


def test_callback_sees_every_step(tiny):
    seen = []
    latents = initial_latents(tiny, [0])
    done = sample(
        tiny, PROMPTS[:1], latents, num_inference_steps=4, callback=lambda i, t, x: seen.append((i, t, x.clone()))
    )
    assert [(i, t) for i, t, _ in seen] == [(0, 751), (1, 501), (2, 251), (3, 1)]
    assert torch.equal(seen[-1][2], done)


def test_the_result_can_be_trained_on(tiny):
    done = sample(tiny, PROMPTS[:1], initial_latents(tiny, [0]), num_inference_steps=1)
    weight = torch.ones((), requires_grad=True)
    (done * weight).sum().backward()
    assert weight.grad is not None


def test_a_model_of_lower_precision_runs(tiny):
    for module in (tiny.unet, tiny.vae, tiny.text_encoder):
        module.bfloat16()
    latents = initial_latents(tiny, [0])
    assert sample(tiny, PROMPTS[:1], latents, num_inference_steps=2).dtype == torch.float32
    assert len(image_to_image(tiny, torch.zeros(1, 3, 32, 32), PROMPTS[:1], 0.5, [0], num_inference_steps=2)) == 1


def test_numbers_that_differ_are_told(tiny):
    with pytest.raises(ValueError, match="3 prompts, 2 seeds"):
        generate(tiny, PROMPTS, [0, 1])
    with pytest.raises(ValueError, match="0 prompts"):
        generate(tiny, [], [])


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image_equal_to_the_pipeline(tiny, strength, monkeypatch):
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours = image_to_image(tiny, pictures, PROMPTS, strength, [0, 1, 2], num_inference_steps=8, guidance_scale=3.0)
    pipeline = StableDiffusionImg2ImgPipeline(**as_pipeline(tiny).components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    # The pipeline draws a sample of the posterior, and we take its mean, which it finds here
    means = iter((to_latents(tiny, pictures)[0] / tiny.vae.config.scaling_factor).split(1))
    monkeypatch.setattr(tiny.vae, "encode", lambda _: SimpleNamespace(latents=next(means)))
    theirs = pipeline(
        PROMPTS,
        image=pictures / 2 + 0.5,
        strength=strength,
        num_inference_steps=8,
        guidance_scale=3.0,
        generator=generators([0, 1, 2]),
    ).images
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1


def test_strength_0_is_the_round_trip_through_the_vae(tiny):
    pictures = torch.rand(1, 3, 32, 32) * 2 - 1
    redrawn = image_to_image(tiny, pictures, PROMPTS[:1], 0.0, [0])[0]
    assert redrawn.tobytes() == to_pil(to_pictures(tiny, to_latents(tiny, pictures)[0]))[0].tobytes()


def test_image_to_image_takes_pictures_of_any_size(tiny):
    from PIL import Image

    assert image_to_image(tiny, [Image.new("RGBA", (50, 20))], PROMPTS[:1], 0.5, [0], num_inference_steps=2)


@pytest.mark.parametrize("strength", [-0.1, 1.1])
def test_impossible_strength_is_refused(tiny, strength):
    with pytest.raises(ValueError, match="strength must be between 0 and 1"):
        image_to_image(tiny, torch.zeros(1, 3, 32, 32), PROMPTS[:1], strength, [0])


def test_large_latents_are_denoised_a_few_at_a_time(tiny, monkeypatch):
    monkeypatch.setattr(sampling, "sampling_batch", lambda components: 2)
    seen = []
    latents = initial_latents(tiny, range(5))
    sample(tiny, ["a cat"] * 5, latents, 1, 1.0, lambda step, t, part: seen.append(len(part)))
    assert seen == [2, 2, 1]
    sample(tiny, ["a cat"] * 5, latents, 1, 1.0, lambda step, t, part: seen.append(len(part)), batch_size=5)
    assert seen[3:] == [5]

"""The diffusion formulas against closed-form identities and against diffusers, at all 1000 timesteps."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.training_utils import compute_snr

from helpers.diffusion import schedule as diffusion

T = torch.arange(1000)
AC = diffusion.alphas_cumprod()


def scheduler(prediction_type="epsilon"):
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
    )


def draws(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 1000, 4, 2, 3, generator=generator, dtype=dtype)
    return x0, noise


def test_schedule_is_bit_equal_to_diffusers():
    assert AC.dtype == torch.float32
    assert torch.equal(AC, scheduler().alphas_cumprod)


@pytest.mark.parametrize("steps, start, end", [(1000, 0.0001, 0.02), (50, 0.00085, 0.012), (1, 0.01, 0.01)])
def test_schedule_with_other_settings(steps, start, end):
    theirs = DDPMScheduler(
        num_train_timesteps=steps, beta_start=start, beta_end=end, beta_schedule="scaled_linear"
    ).alphas_cumprod
    assert torch.equal(diffusion.alphas_cumprod(steps, start, end), theirs)


def test_schedule_falls_and_stays_inside_zero_and_one():
    assert (AC[1:] < AC[:-1]).all() and 0 < AC[-1] and AC[0] < 1
    # the first step adds the variance beta_start, and no other
    assert AC[0].item() == pytest.approx(1 - 0.00085, abs=1e-7)


@pytest.mark.parametrize("start, end", [(0.0, 0.012), (0.02, 0.01), (0.01, 1.0)])
def test_impossible_betas_are_refused(start, end):
    with pytest.raises(ValueError, match="beta_start"):
        diffusion.alphas_cumprod(1000, start, end)


def test_add_noise_is_bit_equal_to_diffusers():
    x0, noise = draws()
    assert torch.equal(diffusion.add_noise(x0, noise, T, AC), scheduler().add_noise(x0, noise, T))


def test_velocity_is_bit_equal_to_diffusers():
    x0, noise = draws()
    assert torch.equal(diffusion.velocity(x0, noise, T, AC), scheduler().get_velocity(x0, noise, T))


def test_targets():
    x0, noise = draws()
    assert torch.equal(diffusion.diffusion_target("epsilon", x0, noise, T, AC), noise)
    v = diffusion.diffusion_target("v_prediction", x0, noise, T, AC)
    assert torch.equal(v, diffusion.velocity(x0, noise, T, AC))
    # cos and sin of one angle: x_t and v_t are x_0 and eps rotated, so lengths are kept
    x_t = diffusion.add_noise(x0, noise, T, AC)
    torch.testing.assert_close(x_t**2 + v**2, x0**2 + noise**2, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
def test_true_output_gives_back_x0_and_noise(prediction_type):
    x0, noise = draws(dtype=torch.float64)
    x_t = diffusion.add_noise(x0, noise, T, AC.double())
    output = diffusion.diffusion_target(prediction_type, x0, noise, T, AC.double())
    arguments = (prediction_type, x_t, output, T, AC.double())
    torch.testing.assert_close(diffusion.predicted_x0(*arguments), x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(diffusion.predicted_noise(*arguments), noise, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
def test_any_output_implies_x0_and_noise_that_make_up_x_t(prediction_type):
    x_t, output = draws(seed=1, dtype=torch.float64)
    arguments = (prediction_type, x_t, output, T, AC.double())
    x0, noise = diffusion.predicted_x0(*arguments), diffusion.predicted_noise(*arguments)
    torch.testing.assert_close(diffusion.add_noise(x0, noise, T, AC.double()), x_t, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
def test_predicted_x0_is_what_diffusers_predicts(prediction_type):
    x_t, output = draws(seed=2)
    ddim = DDIMScheduler.from_config(scheduler(prediction_type).config)
    ddim.set_timesteps(1000)
    ours = diffusion.predicted_x0(prediction_type, x_t, output, T, AC)
    for t in T.tolist():
        theirs = ddim.step(output[t], t, x_t[t]).pred_original_sample
        assert torch.equal(ours[t], theirs), f"timestep {t}"


def test_snr_is_that_of_diffusers():
    theirs = compute_snr(scheduler(), T)
    torch.testing.assert_close(diffusion.snr(T, AC), theirs, rtol=2e-4, atol=0)
    exact = AC.double() / (1 - AC.double())
    torch.testing.assert_close(diffusion.snr(T, AC).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights(gamma):
    snr = diffusion.snr(T, AC)
    capped = torch.minimum(snr, torch.tensor(gamma))
    eps = diffusion.loss_weights(T, AC, "epsilon", gamma)
    v = diffusion.loss_weights(T, AC, "v_prediction", gamma)
    torch.testing.assert_close(eps, capped / snr)
    torch.testing.assert_close(v, capped / (snr + 1))
    assert (eps > 0).all() and (eps <= 1).all() and (v > 0).all() and (v <= 1).all()


def test_min_snr_weights_have_their_known_means():
    # on Stable Diffusion's schedule with gamma = 5; v with min(SNR, gamma) / SNR + 1 would be above one
    assert diffusion.loss_weights(T, AC, "epsilon", 5.0).mean().item() == pytest.approx(0.917, abs=5e-4)
    assert diffusion.loss_weights(T, AC, "v_prediction", 5.0).mean().item() == pytest.approx(0.294, abs=5e-4)


@pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
def test_rescaled_weights_have_the_mean_one(prediction_type):
    plain = diffusion.loss_weights(T, AC, prediction_type, 5.0)
    rescaled = diffusion.loss_weights(T, AC, prediction_type, 5.0, rescale=True)
    assert rescaled.mean().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(rescaled * plain.mean(), plain)
    # the mean is that of all timesteps, whichever are asked for
    some = torch.tensor([3, 999])
    torch.testing.assert_close(diffusion.loss_weights(some, AC, prediction_type, 5.0, rescale=True), rescaled[some])
    assert torch.equal(diffusion.loss_weights(T, AC, prediction_type, rescale=True), torch.ones(1000))


def test_the_other_formula_for_v_is_far_off():
    """Negative control: min(SNR, gamma) / SNR + 1, as some scripts have it, instead of min(SNR, gamma) / (SNR + 1)."""
    snr = diffusion.snr(T, AC)
    wrong = snr.clamp(max=5.0) / snr + 1
    ratio = wrong / diffusion.loss_weights(T, AC, "v_prediction", 5.0)
    assert ratio[999].item() == pytest.approx(429, abs=1) and ratio.min() > 1


def test_weighted_losses_of_both_prediction_types_are_one_loss_on_x0():
    x0, noise = draws(seed=3, dtype=torch.float64)
    error = draws(seed=4, dtype=torch.float64)[0]
    ac = AC.double()
    x_t = diffusion.add_noise(x0, noise, T, ac)
    wanted = diffusion.snr(T, ac).clamp(max=5.0)
    for prediction_type in diffusion.PREDICTION_TYPES:
        target = diffusion.diffusion_target(prediction_type, x0, noise, T, ac)
        wrong_x0 = diffusion.predicted_x0(prediction_type, x_t, target + error, T, ac)
        on_x0 = wanted * ((wrong_x0 - x0) ** 2).mean(dim=(1, 2, 3))
        weights = diffusion.loss_weights(T, ac, prediction_type, 5.0)
        torch.testing.assert_close(weights * (error**2).mean(dim=(1, 2, 3)), on_x0, rtol=1e-8, atol=0)


@pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
def test_no_gamma_means_no_weighting(prediction_type):
    assert torch.equal(diffusion.loss_weights(T, AC, prediction_type), torch.ones(1000))


@pytest.mark.parametrize("gamma", [0, -1.0, float("nan")])
def test_gamma_must_be_positive(gamma):
    with pytest.raises(ValueError, match="snr_gamma must be positive"):
        diffusion.loss_weights(T, AC, "epsilon", gamma)


def test_unknown_prediction_type_is_named():
    x0, noise = draws()
    for call in (
        lambda: diffusion.diffusion_target("sample", x0, noise, T, AC),
        lambda: diffusion.predicted_x0("sample", x0, noise, T, AC),
        lambda: diffusion.predicted_noise("sample", x0, noise, T, AC),
        lambda: diffusion.loss_weights(T, AC, "sample"),
    ):
        with pytest.raises(ValueError, match="unknown prediction type 'sample'; known: epsilon, v_prediction"):
            call()


def test_half_precision_stays_half_and_any_shape_works():
    timesteps = torch.tensor([0, 500, 999])
    x0, noise = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for function in (diffusion.add_noise, diffusion.velocity):
        result = function(x0, noise, timesteps, AC)
        assert result.dtype == torch.bfloat16 and result.shape == (3, 7)
        exact = function(x0.float(), noise.float(), timesteps, AC)
        torch.testing.assert_close(result.float(), exact, rtol=0, atol=0.05)

"""Full fine-tuning: what moves, what does not, and that it is the loop of LoRA without LoRA."""

import dataclasses

import pytest
import torch

from helpers.base.provenance import tensor_hash
from helpers.presets.configuration import TrainConfig
from helpers.training.draws import draw_step
from helpers.training.full import full_fine_tuning

CONFIG = TrainConfig(steps=3, batch_size=4, learning_rate=1e-3)


def run(tiny, latents, **settings):
    return list(full_fine_tuning(tiny, latents, dataclasses.replace(CONFIG, **settings)))


def state(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def loss_by_hand(tiny, latents, config, step=0):
    """v-prediction written out: z_t = sqrt(ab) z + sqrt(1 - ab) eps, v = sqrt(ab) eps - sqrt(1 - ab) z."""
    draw = draw_step(config, latents, step)
    ab = tiny.noise_scheduler.alphas_cumprod[draw.timesteps].view(-1, 1, 1, 1)
    noisy = ab.sqrt() * draw.latents + (1 - ab).sqrt() * draw.noise
    v = ab.sqrt() * draw.noise - (1 - ab).sqrt() * draw.latents
    return (tiny.unet(noisy, draw.timesteps, draw.encoder_hidden_states).sample - v).square().mean()


def test_every_weight_that_has_a_gradient_moves(tiny, latents):
    tiny.unet.requires_grad_(True)
    loss_by_hand(tiny, latents, CONFIG).backward()
    moving = {name for name, p in tiny.unet.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    tiny.unet.zero_grad(set_to_none=True)
    before = state(tiny.unet)
    run(tiny, latents, weight_decay=0.0)
    after = tiny.unet.state_dict()
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert moving <= changed and len(moving) > 0.9 * len(before)


def test_the_other_parts_keep_their_bits(tiny, latents):
    before = [tensor_hash(part.state_dict()) for part in (tiny.vae, tiny.text_encoder)]
    run(tiny, latents)
    assert [tensor_hash(part.state_dict()) for part in (tiny.vae, tiny.text_encoder)] == before


def test_steps_are_counted_from_one(tiny, latents):
    assert run(tiny, latents) == [1, 2, 3]
    assert run(tiny, latents, steps=1) == [1]


def test_it_ends_frozen_and_in_evaluation_mode(tiny, latents):
    loop = full_fine_tuning(tiny, latents, CONFIG)
    next(loop)
    assert all(p.requires_grad for p in tiny.unet.parameters()) and not tiny.unet.training
    assert list(loop) == [2, 3]
    for part in (tiny.unet, tiny.vae, tiny.text_encoder):
        assert not any(p.requires_grad for p in part.parameters())
        assert not any(module.training for module in part.modules())


def test_stopped_early_it_is_frozen_too(tiny, latents):
    for _ in full_fine_tuning(tiny, latents, CONFIG):
        tiny.unet.train()
        break
    assert not any(p.requires_grad for p in tiny.unet.parameters()) and not tiny.unet.training


def test_the_first_update_is_adamw_on_a_plain_loss(tiny, latents):
    """The gradient of the loss by hand, clipped, through an optimizer of its own: the same weights after a step."""
    config = dataclasses.replace(CONFIG, steps=1, weight_decay=0.0, max_grad_norm=0.5)
    before = state(tiny.unet)
    tiny.unet.requires_grad_(True).train()
    loss_by_hand(tiny, latents, config).backward()
    gradients = {name: p.grad.clone() for name, p in tiny.unet.named_parameters()}
    tiny.unet.zero_grad(set_to_none=True)
    norm = torch.sqrt(sum(g.square().sum() for g in gradients.values()))
    assert norm > 0.5, "or nothing would be clipped"

    list(full_fine_tuning(tiny, latents, config))
    for name, p in tiny.unet.named_parameters():
        g = gradients[name] * (0.5 / norm)
        expected = before[name] - config.learning_rate * g / (g.abs() + 1e-8)  # AdamW's first step: m / sqrt(v)
        clear = g.abs() > 1e-5  # where it is all but zero, its sign is rounding
        assert torch.allclose(p[clear], expected[clear], atol=2e-6), name


def test_the_first_gradient_is_that_of_a_plain_loss(tiny, latents):
    config = dataclasses.replace(CONFIG, steps=1, max_grad_norm=0.0)
    tiny.unet.requires_grad_(True).train()
    loss_by_hand(tiny, latents, config).backward()
    expected = {name: p.grad.clone() for name, p in tiny.unet.named_parameters()}
    tiny.unet.zero_grad(set_to_none=True)
    list(full_fine_tuning(tiny, latents, config))
    for name, p in tiny.unet.named_parameters():  # the gradient of the last step is still there
        assert torch.allclose(p.grad, expected[name], rtol=1e-4, atol=1e-6), name


def test_the_loss_of_one_batch_falls(tiny, latents):
    """Overfitting: four pictures whose posterior is a point, again and again."""
    few = {name: getattr(latents, name)[:4] for name in ("mean", "std", "caption_index")}
    cache = dataclasses.replace(latents, **few)
    config = dataclasses.replace(CONFIG, steps=40, learning_rate=3e-3, caption_dropout=0.0)

    def loss():
        with torch.no_grad():
            return sum(loss_by_hand(tiny, cache, config, step).item() for step in range(5)) / 5

    before = loss()
    list(full_fine_tuning(tiny, cache, config))
    assert loss() < 0.9 * before


def test_between_two_updates_the_unet_may_be_in_any_mode(tiny, latents):
    torch.manual_seed(0)
    start = state(tiny.unet)
    run(tiny, latents)
    undisturbed = state(tiny.unet)
    tiny.unet.load_state_dict(start)
    for step in full_fine_tuning(tiny, latents, CONFIG):
        tiny.unet.train(step % 2 == 0)
        with torch.no_grad():
            loss_by_hand(tiny, latents, CONFIG)
        torch.manual_seed(step)  # a measurement may draw as it likes
    assert all(torch.equal(value, undisturbed[name]) for name, value in tiny.unet.state_dict().items())


def test_every_update_is_computed_in_training_mode(tiny, latents):
    """Whatever mode the loop is handed: what a dropout in the U-Net would depend on."""
    modes = []
    tiny.unet.register_forward_pre_hook(lambda unet, *_: modes.append(unet.training))
    for _ in full_fine_tuning(tiny, latents, CONFIG):
        assert not tiny.unet.training, "ready to be measured"
    assert modes == [True] * 3


def test_the_learning_rate_follows_the_schedule(tiny, latents, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def watched(self, *arguments, **settings):
        rates.extend(group["lr"] for group in self.param_groups)
        return step(self, *arguments, **settings)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    run(tiny, latents, steps=4, lr_schedule="linear", lr_warmup_steps=2, learning_rate=0.01)
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.005])

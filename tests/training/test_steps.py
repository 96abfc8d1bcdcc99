"""One training step: what it computes, and that its options change time and memory alone."""

import dataclasses
import math
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import tiny_components, tiny_minisd, tiny_unet
from training_tools import Stop, distance, make_preset, quiet, same_tensors, stop_at, weights

from helpers import lora
from helpers.base.device import resolve_dtype
from helpers.diffusion.schedule import loss_weights
from helpers.presets.configuration import LINEAR, TrainConfig
from helpers.training import loop as training
from helpers.training import steps
from helpers.training.checkpoints import load_checkpoint, load_last_checkpoint, save_checkpoint
from helpers.training.draws import draw_step
from helpers.training.loop import Loop, training_forward
from helpers.training.runs import Run, TrainingError
from helpers.training.steps import check_trainable, injected, learning_rate, new_accelerator, training_step


def test_only_the_lora_matrices_train_and_the_base_comes_back(tiny, latents, accelerator):
    before = {name: value.clone() for name, value in tiny.unet.state_dict().items()}
    modules = dict(tiny.unet.named_modules())
    config = TrainConfig(batch_size=4, rank=2)
    with injected(tiny, config, accelerator) as optimizer:
        start = {name: value.clone() for name, value in lora.lora_state_dict(tiny.unet).items()}
        for step in range(3):
            training_step(tiny, optimizer, draw_step(config, latents, step), config, step, accelerator)
        frozen = [p for p in tiny.unet.parameters() if not p.requires_grad]
        assert all(p.grad is None for p in frozen)
        moved = lora.lora_state_dict(tiny.unet)
        still = {name for name in start if torch.equal(start[name], moved[name])}
        # The tiny U-Net's middle is one latent pixel: a softmax over one key is 1 whatever query and key are, so that
        # their gradient is 0 (or, on some processors, a rounding error)
        alone = {f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{part}.lora_B.weight" for part in "qk"}
        assert still <= alone, f"every other matrix learns, but not {still - alone}"
    after = tiny.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert dict(tiny.unet.named_modules()) == modules and not tiny.unet.training


def test_the_start_depends_on_the_seed_alone(tiny, accelerator):
    def start(seed):
        torch.manual_seed(int(torch.randint(1000, ())))
        with injected(tiny, TrainConfig(rank=2, seed=seed), accelerator):
            return {name: value.clone() for name, value in lora.lora_state_dict(tiny.unet).items()}

    assert same_tensors(start(0), start(0)) and not same_tensors(start(0), start(1))


def test_an_adapter_of_the_callers_own_is_left_alone(tiny, accelerator):
    lora.inject(tiny.unet, ["to_q"], 2, 2.0)
    own = lora.lora_layers(tiny.unet)
    with pytest.raises(ValueError, match="already has LoRA layers"), injected(tiny, TrainConfig(rank=2), accelerator):
        pass
    assert own and lora.lora_layers(tiny.unet) == own


def test_what_should_train_is_checked(tiny, accelerator):
    with pytest.raises(TrainingError, match="no LoRA layers"):
        check_trainable(tiny, TrainConfig())
    with injected(tiny, TrainConfig(rank=2), accelerator):
        tiny.unet.conv_in.weight.requires_grad_(True)
        with pytest.raises(TrainingError, match="conv_in.weight should be frozen"):
            check_trainable(tiny, TrainConfig())
        tiny.unet.conv_in.weight.requires_grad_(False)
        name, layer = next(iter(lora.lora_layers(tiny.unet).items()))
        layer.lora_A.weight.data = layer.lora_A.weight.data.half()
        with pytest.raises(TrainingError, match="float16"):
            check_trainable(tiny, TrainConfig())
        layer.lora_A.weight.data = layer.lora_A.weight.data.float()
        layer.lora_A.weight.requires_grad_(False)
        with pytest.raises(TrainingError, match="lora_A.weight should be trained"):
            check_trainable(tiny, TrainConfig())


def test_the_loss_is_the_weighted_squared_error(tiny, latents, accelerator):
    config = TrainConfig(batch_size=4, rank=2, snr_gamma=5.0)
    ac = tiny.noise_scheduler.alphas_cumprod
    draw = draw_step(config, latents, 0)
    a, s = ac[draw.timesteps].sqrt()[:, None, None, None], (1 - ac[draw.timesteps]).sqrt()[:, None, None, None]
    with torch.no_grad():  # at the start the adapter changes nothing
        output = tiny.unet(a * draw.latents + s * draw.noise, draw.timesteps, draw.encoder_hidden_states).sample
    ratio = (ac / (1 - ac))[draw.timesteps]
    weight = ratio.clamp(max=5.0) / (ratio + 1)
    expected = (weight * (output - (a * draw.noise - s * draw.latents)).square().mean(dim=(1, 2, 3))).mean()
    with injected(tiny, config, accelerator) as optimizer:
        metrics = training_step(tiny, optimizer, draw, config, 0, accelerator)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["mean_timestep"] == draw.timesteps.float().mean().item()


def test_clipping_acts_on_the_gradient(tiny, latents, accelerator):
    """Plain gradient descent shows what AdamW hides: the update is no longer than learning rate times limit."""
    lengths = {}
    for limit in (1e-4, 0.0):
        config = TrainConfig(batch_size=4, rank=2, max_grad_norm=limit, learning_rate=1.0)
        with injected(tiny, config, accelerator):
            parameters = lora.lora_parameters(tiny.unet)
            before = [p.detach().clone() for p in parameters]
            descent = torch.optim.SGD(parameters, lr=1.0)
            metrics = training_step(tiny, descent, draw_step(config, latents, 0), config, 0, accelerator)
            moves = [(p - b).detach() for p, b in zip(parameters, before, strict=True)]
            lengths[limit] = torch.cat([m.flatten() for m in moves]).norm().item()
    assert metrics["grad_norm"] > 1e-3, "the norm before clipping is reported"
    assert lengths[1e-4] == pytest.approx(1e-4, rel=0.01)
    assert lengths[0.0] == pytest.approx(metrics["grad_norm"], rel=0.01)


def test_one_batch_is_overfitted(tiny, latents, accelerator):
    """Two pictures, one noise and one timestep each: nothing keeps the error from going to zero."""
    everything = ("conv_in", "conv1", "conv2", "conv_shortcut", "conv_out", "time_emb_proj", *LINEAR)
    config = TrainConfig(
        batch_size=2, rank=16, alpha=16.0, learning_rate=2e-2, targets=everything, steps=40, max_grad_norm=0.0,
        weight_decay=0.0, lr_schedule="cosine",
    )  # fmt: skip
    draw = draw_step(config, latents, 0)
    with injected(tiny, config, accelerator) as optimizer:
        losses = [
            training_step(tiny, optimizer, draw, config, step, accelerator)["loss"] for step in range(config.steps)
        ]
    assert losses[-1] < 0.02 * losses[0], losses[::10]


def test_lora_dropout_is_seeded_by_the_step(tiny, latents, accelerator):
    config = TrainConfig(batch_size=4, rank=2, lora_dropout=0.5, learning_rate=1e-2)

    def losses(noise_before):
        with injected(tiny, config, accelerator) as optimizer:
            found = []
            for step in range(4):
                torch.rand(noise_before)
                draw = draw_step(config, latents, step)
                found.append(training_step(tiny, optimizer, draw, config, step, accelerator)["loss"])
            return found

    with_dropout = losses(3)
    assert with_dropout == losses(11)
    config = dataclasses.replace(config, lora_dropout=0.0)
    assert with_dropout != losses(3), "the dropout has an effect"


def test_learning_rate_schedules():
    config = TrainConfig(steps=10, learning_rate=1.0, lr_warmup_steps=2)
    assert [learning_rate(config, k) for k in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
    linear = dataclasses.replace(config, lr_schedule="linear")
    assert learning_rate(linear, 2) == 1.0 and learning_rate(linear, 6) == 0.5
    cosine = dataclasses.replace(config, lr_schedule="cosine")
    assert learning_rate(cosine, 6) == pytest.approx(0.5) and learning_rate(cosine, 9) < 0.1


# --- options that change time and memory -------------------------------------------------------------------------


def few_steps(config, latents, components=None, accelerator=None, number=3):
    """(metrics of each step, the LoRA matrices after the last) of training on random latents."""
    components = components or tiny_minisd()
    accelerator = accelerator or new_accelerator(config, "cpu")
    with injected(components, config, accelerator) as optimizer:
        metrics = [
            training_step(components, optimizer, draw_step(config, latents, step), config, step, accelerator)
            for step in range(number)
        ]
        return metrics, {name: t.clone() for name, t in lora.lora_state_dict(components.unet).items()}


PLAIN = TrainConfig(batch_size=4, rank=2, learning_rate=1e-2, steps=3, targets=(*LINEAR, "conv1"))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_bits(dropout, tiny, latents):
    """With dropout too: computing an activation again drops the same inputs again."""
    plain = dataclasses.replace(PLAIN, lora_dropout=dropout)
    config = dataclasses.replace(plain, gradient_checkpointing=True)
    calls, forward = [], tiny.unet.down_blocks[0].resnets[0].forward
    tiny.unet.down_blocks[0].resnets[0].forward = lambda *a, **k: (calls.append(1), forward(*a, **k))[1]
    metrics, state = few_steps(config, latents, tiny)
    assert len(calls) == 6, "each of three steps computed the block twice"
    assert not tiny.unet.is_gradient_checkpointing, "it is switched off again"
    expected, expected_state = few_steps(plain, latents)
    assert metrics == expected and same_tensors(state, expected_state)


def test_channels_last_changes_the_result_by_rounding_and_comes_back(tiny, latents):
    before = {name: value.clone() for name, value in tiny.unet.state_dict().items()}
    config, seen = dataclasses.replace(PLAIN, channels_last=True), []
    handle = tiny.unet.conv_in.register_forward_pre_hook(
        lambda module, inputs: seen.append(module.weight.is_contiguous(memory_format=torch.channels_last))
    )
    metrics, state = few_steps(config, latents, tiny)
    handle.remove()
    assert seen == [True] * 3
    expected, expected_state = few_steps(PLAIN, latents)
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in expected], rel=1e-4)
    assert distance(state, expected_state) <= 1e-3 * torch.cat([t.flatten() for t in state.values()]).norm()
    after = tiny.unet.state_dict()
    assert same_tensors(before, after) and all(value.is_contiguous() for value in after.values())


def test_a_run_in_channels_last_resumes_to_the_same_bits(world, pictures, tiny):
    """Convolutions have LoRA matrices of that layout, and AdamW's moments have their layout."""
    settings = {"steps": 6, "validation_epochs": 1000, "held_out_eval": 0, "targets": ("to_q", "conv1")}
    preset = make_preset(pictures, channels_last=True, **settings)
    expected = weights(quiet(preset, tiny))
    with pytest.raises(Stop):
        quiet(preset, tiny, force=True, on_log=stop_at(4))
    assert same_tensors(weights(quiet(preset, tiny)), expected)


class Compiled(torch.nn.Module):
    """What torch.compile returns, for a test: the module itself, and a count of its calls."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod, self.calls = module, 0

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._orig_mod, name)

    def forward(self, *arguments, **settings):
        self.calls += 1
        return self._orig_mod(*arguments, **settings)


def test_a_compiled_run_compiles_the_step_and_validates_with_the_plain_module(
    world, pictures, tiny, whole, monkeypatch
):
    compiled, plain_calls = [], []
    monkeypatch.setattr(torch, "compile", lambda module, **settings: compiled.append(Compiled(module)) or compiled[-1])
    handle = tiny.unet.register_forward_hook(lambda *arguments: plain_calls.append(1))
    run = quiet(make_preset(pictures, compile=True), tiny)
    handle.remove()
    (one,) = compiled
    assert one._orig_mod is tiny.unet and one.calls == 10, "once a step"
    # Five validations: 2 steps of sampling, 8 timesteps of held-out pictures
    assert len(plain_calls) == 10 + 5 * (2 + 8)
    assert same_tensors(weights(run), weights(whole)) and run.key != whole.key
    assert not lora.lora_layers(tiny.unet) and not isinstance(tiny.unet, Compiled)


def test_torch_compile_takes_the_unet_with_its_lora_layers(latents, accelerator, monkeypatch):
    """The real one, with its tracing but without a compiler, on a small U-Net."""
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **settings: original(module, backend="eager", **settings))
    components = tiny_components(tiny_unet())
    for part in (components.unet, components.vae, components.text_encoder):
        part.requires_grad_(False)
    narrow = {name: getattr(latents, name)[..., :8] for name in ("caption_embeddings", "empty_embedding")}
    narrow |= {name: getattr(latents, name)[:, :4] for name in ("mean", "std")}
    cache = dataclasses.replace(latents, **narrow)
    config = TrainConfig(batch_size=4, rank=2, steps=2, compile=True)
    preset = make_preset("nowhere", **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    before = {name: value.clone() for name, value in components.unet.state_dict().items()}
    loop = Loop(None, preset, components, cache, None, accelerator)
    with injected(components, config, accelerator) as optimizer, training_forward(loop) as forward:
        assert type(forward.components.unet) is not type(components.unet) and loop.components.unet is components.unet
        losses = [forward.step(optimizer, step)["loss"] for step in range(2)]
    assert same_tensors(before, components.unet.state_dict())
    expected, _ = few_steps(config, cache, components, accelerator, number=2)
    assert losses == pytest.approx([m["loss"] for m in expected], rel=1e-4)


def test_bf16_keeps_the_adapter_in_float32_and_the_loss_close(tiny, latents):
    before = {name: value.clone() for name, value in tiny.unet.state_dict().items()}
    config, seen = dataclasses.replace(PLAIN, mixed_precision="bf16"), set()
    handle = tiny.unet.conv_in.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    metrics, state = few_steps(config, latents, tiny)
    handle.remove()
    assert seen == {torch.bfloat16}, "the forward pass is in bfloat16"
    assert all(t.dtype == torch.float32 for t in state.values())
    assert same_tensors(before, tiny.unet.state_dict())
    expected, _ = few_steps(PLAIN, latents)
    losses, others = ([m["loss"] for m in found] for found in (metrics, expected))
    assert losses != others and losses == pytest.approx(others, rel=0.05)


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(TrainingError, match="mixed_precision fp16 needs a GPU; on a CPU take bf16, or no"):
        new_accelerator(TrainConfig(mixed_precision="fp16"), "cpu")
    assert new_accelerator(TrainConfig(), "cpu").mixed_precision == "no", "the next one is not affected"


CPU, GPU, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.mark.parametrize(
    ("asked", "device", "has_it", "precision"),
    [("auto", CPU, False, "no"), ("auto", MPS, False, "no"), ("auto", GPU, True, "bf16"), ("auto", GPU, False, "fp16"),
     ("no", GPU, True, "no"), ("fp16", GPU, True, "fp16"), ("bf16", GPU, True, "bf16"), ("bf16", CPU, False, "bf16")]
)  # fmt: skip
def test_auto_is_the_half_precision_that_the_gpu_has(asked, device, has_it, precision, monkeypatch):
    """A T4, for one, has no bfloat16 of its own."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it or including_emulation)
    assert steps.resolve_precision(asked, device) == precision
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if asked == "auto":
        assert resolve_dtype("auto", device) == dtype, "the U-Net's weights go with it"


def test_bfloat16_that_a_gpu_only_imitates_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(TrainingError, match="no bfloat16 of its own.*fp16, or auto"):
        steps.resolve_precision("bf16", GPU)


# --- the loss's scale in fp16, on a CPU --------------------------------------------------------------------------


def scaling_accelerator(scale, growth_interval=2000):
    """An accelerator that scales the loss as for fp16, but computes in float32: what differs is the scale alone."""
    accelerator = new_accelerator(TrainConfig(), "cpu")
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    accelerator.autocast = nullcontext
    return accelerator


@pytest.fixture
def no_state_left():
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("no_state_left")
@pytest.mark.parametrize("limit", [1e-3, 0.0])
def test_gradients_are_unscaled_before_they_are_clipped(limit, latents):
    """A power of two scales without rounding, so that all bits are those of training without a scale."""
    config = dataclasses.replace(PLAIN, max_grad_norm=limit, batch_size=8, gradient_accumulation_steps=3)
    accelerator = scaling_accelerator(2.0**10)
    metrics, state = few_steps(config, latents, accelerator=accelerator)
    assert accelerator.scaler.get_scale() == 2.0**10
    expected, expected_state = few_steps(config, latents)
    assert metrics == expected and same_tensors(state, expected_state)
    assert all(m["grad_norm"] > 1e-2 for m in metrics), "the limit of 1e-3 does clip"


def overflowing(monkeypatch, at, value=math.inf):
    """From now on the gradient of one matrix is `value` at the `at`-th call (from 0) of `part_loss`."""
    original, calls = steps.part_loss, []

    def part_loss(components, part, config):
        calls.append(1)
        loss = original(components, part, config)
        if len(calls) - 1 != at:
            return loss
        total = lora.lora_parameters(components.unet)[1].sum()
        total.register_hook(lambda gradient: gradient * value)
        return loss + (total - total.detach())

    monkeypatch.setattr(steps, "part_loss", part_loss)


@pytest.mark.usefixtures("no_state_left")
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_step_that_overflows_is_skipped_and_halves_the_scale(value, tiny, latents, monkeypatch):
    accelerator = scaling_accelerator(8.0)
    overflowing(monkeypatch, at=1, value=value)
    with injected(tiny, PLAIN, accelerator) as optimizer:
        states, metrics, scales = [], [], []
        for step in range(3):
            draw = draw_step(PLAIN, latents, step)
            metrics.append(training_step(tiny, optimizer, draw, PLAIN, step, accelerator))
            states.append({name: t.clone() for name, t in lora.lora_state_dict(tiny.unet).items()})
            scales.append(accelerator.scaler.get_scale())
        counts = {state["step"].item() for state in optimizer.state.values()}
    assert scales == [8.0, 4.0, 4.0]
    assert same_tensors(states[0], states[1]) and not same_tensors(states[1], states[2])
    assert all(torch.isfinite(t).all() for t in states[2].values())
    assert counts == {2.0}, "AdamW counts the steps that it took"
    assert math.isfinite(metrics[1]["loss"]) and not math.isfinite(metrics[1]["grad_norm"])


@pytest.mark.usefixtures("no_state_left")
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_an_overflow_with_no_room_left_in_the_scale_is_an_error(scale, tiny, latents, monkeypatch):
    accelerator = scaling_accelerator(scale)
    overflowing(monkeypatch, at=0)
    with injected(tiny, PLAIN, accelerator) as optimizer:
        before = {name: t.clone() for name, t in lora.lora_state_dict(tiny.unet).items()}
        with pytest.raises(TrainingError, match="step 0: the loss is .* gradient's norm inf"):
            training_step(tiny, optimizer, draw_step(PLAIN, latents, 0), PLAIN, 0, accelerator)
        assert same_tensors(before, lora.lora_state_dict(tiny.unet))


@pytest.mark.usefixtures("no_state_left")
def test_a_loss_that_is_no_number_is_an_error_whatever_the_scale(tiny, latents, monkeypatch):
    accelerator, original = scaling_accelerator(2.0**10), steps.part_loss
    monkeypatch.setattr(steps, "part_loss", lambda *arguments: original(*arguments) * math.nan)
    with injected(tiny, PLAIN, accelerator) as optimizer, pytest.raises(TrainingError, match="the loss is nan"):
        training_step(tiny, optimizer, draw_step(PLAIN, latents, 0), PLAIN, 0, accelerator)


@pytest.mark.usefixtures("no_state_left")
def test_a_checkpoint_keeps_the_scale(whole, tiny, tmp_path):
    run = Run(tmp_path / "run", whole.preset, whole.dataset, whole.key)
    run.dir.mkdir()
    shutil.copy(whole.dir / "config.json", run.dir)
    accelerator = scaling_accelerator(64.0)
    with injected(tiny, PLAIN, accelerator) as optimizer:
        for p in lora.lora_parameters(tiny.unet):
            optimizer.state[p] = {"step": torch.ones(()), "exp_avg": p.detach() + 1, "exp_avg_sq": p.detach() + 2}
        accelerator.scaler.load_state_dict(accelerator.scaler.state_dict() | {"scale": 32.0, "_growth_tracker": 7})
        save_checkpoint(run, 1, {"unet": tiny.unet}, optimizer, 1.0, accelerator.scaler)
        fresh = torch.amp.GradScaler("cpu", init_scale=64.0)
        load_checkpoint(run, 1, {"unet": tiny.unet}, optimizer, fresh)
    assert fresh.get_scale() == 32.0 and fresh.state_dict()["_growth_tracker"] == 7


@pytest.mark.usefixtures("no_state_left")
def test_a_run_that_goes_on_in_another_precision_keeps_its_checkpoints(whole, tiny, tmp_path):
    """With mixed_precision "auto" a run begun in bfloat16 may go on, on another GPU, in float16, which has a scale."""
    run = Run(tmp_path / "run", whole.preset, whole.dataset, whole.key)
    run.dir.mkdir()
    shutil.copy(whole.dir / "config.json", run.dir)
    with injected(tiny, PLAIN, new_accelerator(TrainConfig(), "cpu")) as optimizer:
        for p in lora.lora_parameters(tiny.unet):
            optimizer.state[p] = {"step": torch.ones(()), "exp_avg": p.detach() + 1, "exp_avg_sq": p.detach() + 2}
        save_checkpoint(run, 1, {"unet": tiny.unet}, optimizer, 1.0)
        fresh = torch.amp.GradScaler("cpu", init_scale=64.0)
        assert load_last_checkpoint(run, {"unet": tiny.unet}, optimizer, fresh)["step"] == 1
    assert run.checkpoints() == [1] and fresh.get_scale() == 64.0


def test_in_fp16_each_process_needs_a_picture(monkeypatch):
    """Its scaler learns its scale from a loss, and a process without one would stop the others for hours."""
    several = SimpleNamespace(scaler=object(), num_processes=4)
    monkeypatch.setattr(steps, "Accelerator", lambda **settings: several)
    monkeypatch.setattr(steps, "resolve_precision", lambda *_: "fp16")
    with pytest.raises(TrainingError, match="each of the 4 processes needs a picture, and a batch has 3"):
        new_accelerator(TrainConfig(batch_size=3), "cpu")
    assert new_accelerator(TrainConfig(batch_size=4), "cpu") is several


@pytest.mark.usefixtures("no_state_left")
def test_a_run_with_a_scale_resumes_to_the_same_bits(world, pictures, tiny, monkeypatch):
    """The scale doubles after every three steps and has overflowed once: both are in the checkpoint."""
    accelerators = []

    def scaling(*arguments):
        accelerators.append(scaling_accelerator(2.0**8, growth_interval=3))
        return accelerators[-1]

    monkeypatch.setattr(training, "new_accelerator", scaling)
    preset = make_preset(pictures, steps=8, validation_epochs=1000, held_out_eval=0)
    with monkeypatch.context() as patch:
        overflowing(patch, at=2)
        run = quiet(preset, tiny)
    expected, metrics, scale = weights(run), run.metrics(), accelerators[-1].scaler.state_dict()
    with monkeypatch.context() as patch, pytest.raises(Stop):
        overflowing(patch, at=2)
        quiet(preset, tiny, force=True, on_log=stop_at(5))
    resumed = quiet(preset, tiny)
    assert accelerators[-1].scaler.state_dict() == scale and scale["scale"] == 2.0**8
    assert same_tensors(weights(resumed), expected)
    same = [m for m in resumed.metrics() if m["step"] != 2], [m for m in metrics if m["step"] != 2]
    assert same[0] == same[1]


# --- weights of the loss -----------------------------------------------------------------------------------------


def test_rescaled_weights_divide_the_loss_by_their_mean(tiny, latents, accelerator):
    ac = tiny.noise_scheduler.alphas_cumprod
    mean = loss_weights(torch.arange(1000), ac, "v_prediction", 5.0).mean().item()
    assert tiny.prediction_type == "v_prediction" and mean == pytest.approx(0.294, abs=5e-4)
    config = dataclasses.replace(PLAIN, snr_gamma=5.0)
    (plain,), _ = few_steps(config, latents, tiny, accelerator, number=1)
    (rescaled,), _ = few_steps(dataclasses.replace(config, rescale_weights=True), latents, tiny, accelerator, number=1)
    assert rescaled["loss"] * mean == pytest.approx(plain["loss"], rel=1e-5)
    assert rescaled["grad_norm"] * mean == pytest.approx(plain["grad_norm"], rel=1e-4)

"""The training loop: its draws, its step, and that stopping, resuming and watching it change nothing."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_minisd

from helpers import adapters, lora, provenance, runs, steps, training
from helpers.data import LatentCache
from helpers.presets import ROOT, Datasets, DatasetSpec, TrainConfig, get_preset
from helpers.runs import Run, is_finished, run_config
from helpers.steps import (
    check_trainable,
    draw_step,
    held_out_loss,
    injected,
    learning_rate,
    seed_for,
    steps_per_epoch,
    training_step,
)
from helpers.training import TrainingError, export_reference, replay, resume_from, run_key, train, validation_steps

STEPS = 10


def write_pictures(folder):
    """13 captioned pictures of 16 pixels: 10 to train on, 3 held out."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    for i in range(13):
        pixels = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"a {'cat' if i % 2 else 'man'}")


def make_preset(folder, **settings):
    defaults = dict(steps=STEPS, batch_size=4, rank=2, alpha=4.0, validation_epochs=1, checkpoint_every=2,
                    held_out_eval=3, num_inference_steps=2, resolution=16)  # fmt: skip
    return get_preset(
        "smoke",
        datasets=Datasets((DatasetSpec("own", f"folder:{folder}", train_rows=10, held_out_rows=3),)),
        validation_prompts={"own": ("a cat", "a man")},
        **{**defaults, **settings},
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pictures"
    write_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """A run that nothing disturbed, for comparison; tests only read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_RUNS", str(tmp_path_factory.mktemp("whole")))
        return quiet(make_preset(pictures), tiny_minisd())


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A runs folder and a reference folder of this test's own."""
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(runs, "REFERENCE", tmp_path / "reference")
    return tmp_path


@pytest.fixture
def preset(world, pictures):
    return make_preset(pictures)


@pytest.fixture
def finished(preset, whole) -> Run:
    """A copy of the undisturbed run in this test's runs folder: what an earlier `train` would have left."""
    folder = runs.run_dir(preset, "own", whole.key)
    shutil.copytree(whole.dir, folder)
    return Run(folder, preset.name, "own", whole.key, "found in runs")


@pytest.fixture
def cache():
    """23 rows of random latents [4, 4, 4], 5 captions."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return LatentCache(
        mean=normal(23, 4, 4, 4),
        std=normal(23, 4, 4, 4).abs() * 0.1,
        caption_embeddings=normal(5, 24, 16),
        caption_index=torch.arange(23) % 5,
        empty_embedding=normal(1, 24, 16),
    )


def quiet(preset, components, **settings) -> Run:
    return train(preset, "own", progress=False, components=components, **settings)


def weights(run: Run) -> dict:
    return {name: value.clone() for name, value in load_file(run.adapter).items()}


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Stop(Exception):
    """Stands for a process that ends in the middle."""


def stop_at(step):
    def on_log(at, metrics):
        if at == step:
            raise Stop

    return on_log


# --- draws -------------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_seed_and_step_alone(cache):
    config = TrainConfig(batch_size=4)
    torch.manual_seed(1)
    first = draw_step(config, cache, 7)
    torch.manual_seed(2)
    draw_step(config, cache, 3)
    state = torch.get_rng_state()
    again = draw_step(config, cache, 7)
    assert torch.equal(torch.get_rng_state(), state), "a draw must not use the global generator"
    for field in dataclasses.fields(first):
        assert torch.equal(getattr(first, field.name), getattr(again, field.name)), field.name
    for other in (draw_step(config, cache, 8), draw_step(dataclasses.replace(config, seed=1), cache, 7)):
        assert not torch.equal(first.noise, other.noise) and not torch.equal(first.timesteps, other.timesteps)


def test_a_draw_does_not_depend_on_the_memory_layout_of_the_cache(cache):
    """Convolutions leave channels-last latents behind, files give contiguous ones; their sums round differently."""
    config = TrainConfig(batch_size=4)
    other = dataclasses.replace(
        cache, **{name: getattr(cache, name).to(memory_format=torch.channels_last) for name in ("mean", "std")}
    )
    a, b = draw_step(config, cache, 7), draw_step(config, other, 7)
    assert torch.equal(a.latents, b.latents)
    assert a.latents.stride() == b.latents.stride() == a.noise.stride() == b.noise.stride() == (64, 16, 4, 1)


def test_purposes_do_not_share_their_numbers(cache):
    draw = draw_step(TrainConfig(batch_size=4), cache, 0)
    posterior_noise = (draw.latents - cache.mean[draw.indices]) / cache.std[draw.indices]
    assert not torch.allclose(posterior_noise, draw.noise, atol=1e-3)
    seeds = [seed_for(s, p, k) for s in range(3) for p in ("noise", "timesteps", "order") for k in range(50)]
    assert len(set(seeds)) == len(seeds) == 450


def test_each_epoch_is_its_own_permutation(cache):
    config = TrainConfig(batch_size=4)
    assert steps_per_epoch(config, 23) == 6
    epochs = [torch.cat([draw_step(config, cache, 6 * e + k).indices for k in range(6)]).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert len(draw_step(config, cache, 5).indices) == 3  # 23 = 5 * 4 + 3


def test_steps_per_epoch_of_the_two_datasets():
    assert [steps_per_epoch(TrainConfig(), rows) for rows in (1000, 685)] == [125, 86]
    assert validation_steps(TrainConfig(), 1000) == [0, 250, 500, 750, 1000]
    assert validation_steps(TrainConfig(), 685) == [0, 172, 344, 516, 688, 860, 1000]


def test_latents_are_samples_of_the_posterior(cache):
    config = TrainConfig(batch_size=23, caption_dropout=0.0)
    noises = []
    for step in range(40):
        draw = draw_step(config, cache, step)
        noises.append((draw.latents - cache.mean[draw.indices]) / cache.std[draw.indices])
        assert torch.equal(draw.encoder_hidden_states, cache.caption_embeddings[cache.caption_index[draw.indices]])
    noises = torch.stack(noises)
    assert abs(noises.mean()) < 0.02 and abs(noises.std() - 1) < 0.02


def test_caption_dropout_puts_the_empty_caption_now_and_then(cache):
    config = TrainConfig(batch_size=23, caption_dropout=0.3)
    draws = [draw_step(config, cache, step).encoder_hidden_states for step in range(40)]
    empty = torch.stack([(states == cache.empty_embedding).flatten(1).all(dim=1) for states in draws])
    assert 0.2 < empty.float().mean() < 0.4
    all_dropped = draw_step(dataclasses.replace(config, caption_dropout=1.0), cache, 0).encoder_hidden_states
    assert torch.equal(all_dropped, cache.empty_embedding.expand(23, -1, -1))


def test_timesteps_cover_the_schedule(cache):
    config = TrainConfig(batch_size=23)
    t = torch.cat([draw_step(config, cache, step, 1000).timesteps for step in range(100)])
    assert t.min() < 10 and t.max() >= 990 and abs(t.float().mean() - 499.5) < 20
    assert draw_step(config, cache, 0, 10).timesteps.max() < 10


# --- one step ----------------------------------------------------------------------------------------------------


def ingredients(tiny):
    return tiny.noise_scheduler.alphas_cumprod, tiny.prediction_type


def test_only_the_lora_matrices_train_and_the_base_comes_back(tiny, cache):
    before = {name: value.clone() for name, value in tiny.unet.state_dict().items()}
    modules = dict(tiny.unet.named_modules())
    config = TrainConfig(batch_size=4, rank=2)
    with injected(tiny.unet, config) as optimizer:
        start = {name: value.clone() for name, value in lora.lora_state_dict(tiny.unet).items()}
        for step in range(3):
            training_step(tiny.unet, optimizer, draw_step(config, cache, step), *ingredients(tiny), config, step)
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


def test_the_start_depends_on_the_seed_alone(tiny):
    def start(seed):
        torch.manual_seed(int(torch.randint(1000, ())))
        with injected(tiny.unet, TrainConfig(rank=2, seed=seed)):
            return {name: value.clone() for name, value in lora.lora_state_dict(tiny.unet).items()}

    assert same_tensors(start(0), start(0)) and not same_tensors(start(0), start(1))


def test_an_adapter_of_the_callers_own_is_left_alone(tiny):
    lora.inject(tiny.unet, ["to_q"], 2, 2.0)
    own = lora.lora_layers(tiny.unet)
    with pytest.raises(ValueError, match="already has LoRA layers"), injected(tiny.unet, TrainConfig(rank=2)):
        pass
    assert own and lora.lora_layers(tiny.unet) == own


def test_what_should_train_is_checked(tiny):
    with pytest.raises(TrainingError, match="no LoRA layers"):
        check_trainable(tiny.unet)
    with injected(tiny.unet, TrainConfig(rank=2)):
        tiny.unet.conv_in.weight.requires_grad_(True)
        with pytest.raises(TrainingError, match="conv_in.weight should be frozen"):
            check_trainable(tiny.unet)
        tiny.unet.conv_in.weight.requires_grad_(False)
        name, layer = next(iter(lora.lora_layers(tiny.unet).items()))
        layer.lora_A.weight.data = layer.lora_A.weight.data.half()
        with pytest.raises(TrainingError, match="float16"):
            check_trainable(tiny.unet)
        layer.lora_A.weight.data = layer.lora_A.weight.data.float()
        layer.lora_A.weight.requires_grad_(False)
        with pytest.raises(TrainingError, match="lora_A.weight should be trained"):
            check_trainable(tiny.unet)


def test_the_loss_is_the_weighted_squared_error(tiny, cache):
    config = TrainConfig(batch_size=4, rank=2, snr_gamma=5.0)
    ac, kind = ingredients(tiny)
    draw = draw_step(config, cache, 0)
    a, s = ac[draw.timesteps].sqrt()[:, None, None, None], (1 - ac[draw.timesteps]).sqrt()[:, None, None, None]
    with torch.no_grad():  # at the start the adapter changes nothing
        output = tiny.unet(a * draw.latents + s * draw.noise, draw.timesteps, draw.encoder_hidden_states).sample
    ratio = (ac / (1 - ac))[draw.timesteps]
    weight = ratio.clamp(max=5.0) / (ratio + 1)
    expected = (weight * (output - (a * draw.noise - s * draw.latents)).square().mean(dim=(1, 2, 3))).mean()
    with injected(tiny.unet, config) as optimizer:
        metrics = training_step(tiny.unet, optimizer, draw, ac, kind, config, 0)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["mean_timestep"] == draw.timesteps.float().mean().item()


def test_clipping_acts_on_the_gradient(tiny, cache):
    """Plain gradient descent shows what AdamW hides: the update is no longer than learning rate times limit."""
    lengths = {}
    for limit in (1e-4, 0.0):
        config = TrainConfig(batch_size=4, rank=2, max_grad_norm=limit, learning_rate=1.0)
        with injected(tiny.unet, config):
            parameters = lora.lora_parameters(tiny.unet)
            before = [p.detach().clone() for p in parameters]
            descent = torch.optim.SGD(parameters, lr=1.0)
            metrics = training_step(tiny.unet, descent, draw_step(config, cache, 0), *ingredients(tiny), config, 0)
            moves = [(p - b).detach() for p, b in zip(parameters, before, strict=True)]
            lengths[limit] = torch.cat([m.flatten() for m in moves]).norm().item()
    assert metrics["grad_norm"] > 1e-3, "the norm before clipping is reported"
    assert lengths[1e-4] == pytest.approx(1e-4, rel=0.01)
    assert lengths[0.0] == pytest.approx(metrics["grad_norm"], rel=0.01)


def test_one_batch_is_overfitted(tiny, cache):
    targets = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in", "conv_out")
    config = TrainConfig(batch_size=2, rank=8, alpha=8.0, learning_rate=2e-2, targets=targets, steps=60)
    draw = draw_step(config, cache, 0)
    with injected(tiny.unet, config) as optimizer:
        losses = [
            training_step(tiny.unet, optimizer, draw, *ingredients(tiny), config, step)["loss"] for step in range(60)
        ]
    assert losses[-1] < 0.5 * losses[0], losses[::10]


def test_lora_dropout_is_seeded_by_the_step(tiny, cache):
    config = TrainConfig(batch_size=4, rank=2, lora_dropout=0.5, learning_rate=1e-2)

    def losses(noise_before):
        with injected(tiny.unet, config) as optimizer:
            found = []
            for step in range(4):
                torch.rand(noise_before)
                draw = draw_step(config, cache, step)
                found.append(training_step(tiny.unet, optimizer, draw, *ingredients(tiny), config, step)["loss"])
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


def test_the_held_out_loss_is_on_a_fixed_grid(tiny, cache):
    small = LatentCache(
        cache.mean[:5], cache.std[:5], cache.caption_embeddings, cache.caption_index[:5], cache.empty_embedding
    )
    first = held_out_loss(tiny, small)
    torch.manual_seed(5)
    assert held_out_loss(tiny, small) == first
    assert held_out_loss(tiny, small, batch_size=2) == pytest.approx(first, rel=1e-5)

    class Silent(torch.nn.Module):
        dtype = torch.float32

        def forward(self, latents, timesteps, states):
            return SimpleNamespace(sample=torch.zeros_like(latents))

    # a model that answers nothing errs by the target: v = sqrt(ab) eps - sqrt(1 - ab) x0
    fake = SimpleNamespace(
        unet=Silent(), noise_scheduler=tiny.noise_scheduler, device=torch.device("cpu"), prediction_type="v_prediction"
    )
    noise = torch.randn(small.mean.shape, generator=steps.generator_for(0, "held-out noise", 0))
    ac = tiny.noise_scheduler.alphas_cumprod
    grid = (62, 187, 312, 437, 562, 687, 812, 937)
    expected = [(ac[t].sqrt() * noise - (1 - ac[t]).sqrt() * small.mean).square().mean().item() for t in grid]
    assert held_out_loss(fake, small) == pytest.approx(sum(expected) / 8, rel=1e-5)


# --- runs --------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(preset, tiny):
    seen = []
    run = quiet(preset, tiny, on_log=lambda step, metrics: seen.append((step, metrics["loss"])))
    assert run.source == "trained now" and is_finished(run.dir)
    metrics = run.metrics()
    assert [m["step"] for m in metrics] == list(range(STEPS)) == [step for step, _ in seen]
    assert [m["epoch"] for m in metrics] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert all(set(m) == {"step", "epoch", "loss", "lr", "grad_norm", "mean_timestep"} for m in metrics)
    assert [m["loss"] for m in metrics] == [loss for _, loss in seen]
    assert run.validations() == [(0, 0), (3, 1), (6, 2), (9, 3), (10, 3)]
    assert all(m["held_out_loss"] > 0 for m in run.validation_metrics())
    pictures = run.validation_pictures(3)
    assert [p.size for p in pictures] == [(16, 16)] * 2
    assert run.validation_latents(10).shape == run.initial_latents().shape == (2, 4, 4, 4)
    assert run.checkpoints() == [8, 10]
    assert set(run.hashes) == {"code", "weights", "data", "adapter", "initial_latents"}
    assert run.hashes["adapter"] == provenance.tensor_hash(weights(run))
    assert run.done["losses"]["last"] == metrics[-1]["loss"]

    said, config = adapters.read_adapter(run.adapter).metadata, run.config
    assert (said["base_model"], said["base_model_hash"]) == (config["model"], run.hashes["weights"])
    assert (said["dataset"], said["dataset_hash"]) == (run.dataset, run.hashes["data"])
    for name in ("seed", "rank", "alpha", "targets"):
        assert said[name] == config["train"][name]
    assert said["prediction_type"] == config["prediction_type"] and said["versions"]["torch"] == torch.__version__
    assert said["step"] == config["train"]["steps"]
    last = adapters.read_adapter(run.checkpoint_dir(run.checkpoints()[0]) / "adapter.safetensors").metadata
    assert last == said | {"step": run.checkpoints()[0]}
    assert f"| dataset | {run.dataset} |" in (run.adapter.parent / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"no validation at step 4; known: \[0, 3, 6, 9, 10\]"):
        run.validation_pictures(4)
    assert not [path.name for path in run.dir.rglob(".*")], "no temporary files stay"
    assert not lora.lora_layers(tiny.unet)


def test_validation_pictures_start_from_the_same_latents(preset, tiny, whole):
    from helpers.sampling import sample

    again = sample(tiny, ["a cat", "a man"], whole.initial_latents(), 2, preset.guidance_scale)
    assert torch.equal(whole.validation_latents(0), again), "step 0 is the base model"
    assert not torch.equal(whole.validation_latents(0), whole.validation_latents(10))


@pytest.mark.parametrize("stopped_after", [1, 5, 9])
def test_a_stopped_run_resumes_to_the_same_bits(preset, tiny, whole, stopped_after):
    with pytest.raises(Stop):
        quiet(preset, tiny, on_log=stop_at(stopped_after))
    resumed_steps = []
    resumed = quiet(preset, tiny, on_log=lambda step, metrics: resumed_steps.append(step))
    assert resumed.dir != whole.dir and resumed.key == whole.key
    # a checkpoint every 2 steps: stopped within step 5, it goes on with step 4
    assert resumed_steps == list(range(stopped_after // 2 * 2, STEPS))
    assert resumed.metrics() == whole.metrics()
    assert same_tensors(weights(resumed), weights(whole))
    assert resumed.validations() == whole.validations()
    for step, _ in whole.validations():
        assert torch.equal(resumed.validation_latents(step), whole.validation_latents(step))
    assert resumed.validation_metrics() == whole.validation_metrics()
    for name in ("adapter", "optimizer"):
        file = f"checkpoints/step-000010/{name}.safetensors"
        assert same_tensors(load_file(resumed.dir / file), load_file(whole.dir / file))


KILLED = """
import os, signal, sys
sys.path[:0] = [os.getcwd(), sys.argv[2]]
import torch
torch.set_num_threads(int(sys.argv[3]))
from pathlib import Path
import test_training
preset = test_training.make_preset(Path(sys.argv[1]))
tiny = test_training.tiny_minisd()
kill = lambda step, metrics: os.kill(os.getpid(), signal.SIGKILL) if step == 7 else None
test_training.quiet(preset, tiny, on_log=kill)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_process_resumes_to_the_same_bits(preset, tiny, whole, world, pictures):
    # The order of summation depends on the number of threads: the same in both processes.
    command = [sys.executable, "-c", KILLED, str(pictures), str(ROOT / "tests"), str(torch.get_num_threads())]
    process = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=600)
    assert process.returncode == -signal.SIGKILL, process.stderr
    (left,) = (world / "runs" / "smoke").iterdir()
    assert left.name == whole.dir.name and not (left / "done.json").exists()
    resumed_steps = []
    resumed = quiet(preset, tiny, on_log=lambda step, metrics: resumed_steps.append(step))
    assert resumed_steps == [6, 7, 8, 9] and resumed.dir == left
    assert same_tensors(weights(resumed), weights(whole)) and resumed.metrics() == whole.metrics()


def test_validating_more_often_changes_nothing(tiny, whole, world, pictures):
    rarely = quiet(make_preset(pictures, validation_epochs=1000, held_out_eval=0, checkpoint_every=7), tiny)
    assert rarely.validations() == [(0, 0), (10, 3)] and rarely.key != whole.key and len(whole.validations()) == 5
    assert same_tensors(weights(whole), weights(rarely))
    assert [m["loss"] for m in whole.metrics()] == [m["loss"] for m in rarely.metrics()]


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(preset, tiny, monkeypatch):
    def poisoned(config, cache, step, T):
        draw = draw_step(config, cache, step, T)
        return dataclasses.replace(draw, latents=draw.latents * float("nan")) if step == 7 else draw

    monkeypatch.setattr(training, "draw_step", poisoned)
    rows = [int(i) for i in steps.batch_indices(preset.train, 10, 7)]
    with pytest.raises(TrainingError, match=r"step 7: the loss is nan.* timesteps \[.*\], rows ") as error:
        quiet(preset, tiny)
    assert f"rows {rows}" in str(error.value)
    (left,) = [path for path in (runs.presets.runs_folder() / "smoke").iterdir()]
    run = Run(left, "smoke", "own", "")
    assert run.checkpoints() == [4, 6] and not (left / "done.json").exists() and not run.adapter.exists()
    assert all(torch.isfinite(t).all() for t in load_file(run.checkpoint_dir(6) / "adapter.safetensors").values())
    assert not lora.lora_layers(tiny.unet), "the base model is restored"


def test_a_broken_checkpoint_falls_back_to_the_one_before(preset, tiny, whole, world):
    with pytest.raises(Stop):
        quiet(preset, tiny, on_log=stop_at(7))
    (left,) = (world / "runs" / "smoke").iterdir()
    broken = left / "checkpoints" / "step-000006" / "optimizer.safetensors"
    broken.write_bytes(broken.read_bytes()[:-100])
    with (left / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # a line that was being written
    resumed_steps = []
    resumed = quiet(preset, tiny, on_log=lambda step, metrics: resumed_steps.append(step))
    assert resumed_steps[0] == 4
    assert same_tensors(weights(resumed), weights(whole)) and resumed.metrics() == whole.metrics()


def test_own_run_then_reference_then_training(preset, tiny, world, finished):
    assert quiet(preset, tiny) == finished
    reference = export_reference(finished)
    assert reference == world / "reference" / finished.dir.name
    assert quiet(preset, tiny).source == "found in runs", "our own run comes first"
    shutil.rmtree(finished.dir)
    found = quiet(preset, tiny)
    assert (found.source, found.dir) == ("reference", reference)
    assert found.metrics() and found.validation_pictures(10) and found.hashes["adapter"]
    assert quiet(preset, tiny, from_scratch=True).source == "trained now"
    assert quiet(preset, tiny, from_scratch=True).source == "found in runs"


def test_force_trains_a_finished_run_again(preset, tiny, whole, finished):
    trained_steps = []
    again = quiet(preset, tiny, force=True, on_log=lambda step, metrics: trained_steps.append(step))
    assert trained_steps == list(range(STEPS)) and again.source == "trained now" and again.dir == finished.dir
    assert same_tensors(weights(again), weights(whole))


def test_a_damaged_run_is_not_taken_for_finished(preset, tiny, whole, finished):
    finished.adapter.write_bytes(finished.adapter.read_bytes()[:-4])
    repaired = quiet(preset, tiny)
    assert repaired.source == "trained now" and same_tensors(weights(repaired), weights(whole))
    (finished.dir / "done.json").write_text("{")
    assert quiet(preset, tiny).source == "trained now"


def test_a_reference_run_resumes_and_replays(preset, tiny, world, whole):
    run = whole
    folder = export_reference(run)
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter", "checkpoints", "config.json", "done.json", "initial_latents.safetensors", "metrics.jsonl",
        "validation",
    ]  # fmt: skip
    reference = Run(folder, preset.name, "own", run.key, "reference")
    assert reference.checkpoints() == [8] and is_finished(folder)
    resumed = resume_from(reference, world / "resumed", preset, tiny)
    assert same_tensors(weights(resumed), weights(run)) and resumed.metrics() == run.metrics()
    assert torch.equal(resumed.validation_latents(10), run.validation_latents(10))
    assert [m["loss"] for m in replay(reference, 4, preset, tiny)] == [m["loss"] for m in run.metrics()[:4]]
    assert reference.metrics() == run.metrics(), "resuming and replaying write nothing into the reference"


def test_only_finished_runs_become_references(finished):
    (finished.dir / "done.json").unlink()
    with pytest.raises(TrainingError, match="not finished"):
        export_reference(finished)


def test_the_key_follows_configuration_code_weights_and_data(preset, tiny, world, pictures, monkeypatch):
    key = run_key(preset, "own", tiny)
    assert key == run_key(make_preset(pictures), "own", tiny) and len(key) == 12
    changes = [{"seed": 1}, {"rank": 3}, {"steps": 11}, {"num_inference_steps": 3}, {"guidance_scale": 1.0}]
    keys = {run_key(make_preset(pictures, **change), "own", tiny) for change in changes} | {key}
    assert len(keys) == len(changes) + 1

    weight = tiny.unet.conv_in.weight
    weight.data[0, 0, 0, 0] += 1
    assert run_key(preset, "own", tiny) != key
    weight.data[0, 0, 0, 0] -= 1

    caption = pictures / "00.txt"
    text = caption.read_text()
    caption.write_text("another")
    assert run_key(preset, "own", tiny) != key
    caption.write_text(text)
    assert run_key(preset, "own", tiny) == key

    monkeypatch.setattr(provenance, "code_hash", lambda *modules: "other code")
    assert run_key(preset, "own", tiny) != key


def test_every_module_a_result_depends_on_is_in_the_key():
    assert all((ROOT / "helpers" / f"{name}.py").is_file() for name in runs.CODE)
    assert {"diffusion", "lora", "steps", "training", "data", "sampling", "components"} == set(runs.CODE)


def test_the_configuration_names_no_folder_of_the_preset(preset, tiny):
    config = run_config(get_preset("smoke", resolution=16), "doodles", tiny)
    assert str(ROOT) not in json.dumps(config)


def test_a_model_that_predicts_something_else_is_refused(world, pictures, tiny):
    with pytest.raises(TrainingError, match="predicts v_prediction"):
        quiet(make_preset(pictures, prediction_type="epsilon"), tiny)


def test_missing_weights_and_unknown_names_are_one_sentence(world, pictures, capsys):
    with pytest.raises(ValueError, match="no folder nowhere"):
        train(make_preset(pictures, model="nowhere"), "own", progress=False)
    assert training.main(["--preset", "maxi"]) == 1
    assert "error: unknown preset 'maxi'" in capsys.readouterr().err
    assert training.main(["--preset", "smoke", "--dataset", "photos"]) == 1
    assert "unknown dataset 'photos'" in capsys.readouterr().err


# --- tracking ----------------------------------------------------------------------------------------------------


@pytest.fixture
def short(world, pictures):
    return make_preset(pictures, steps=2, validation_epochs=1000, held_out_eval=0)


def test_a_tracker_that_fails_is_noted_once_and_stops_nothing(short, tiny, monkeypatch):
    class Broken:
        def init(self, **settings):
            return self

        def Settings(self, **settings):
            return settings

        def log(self, metrics, step):
            raise OSError("disk full")

        def finish(self):
            raise OSError("disk full")

    monkeypatch.setitem(sys.modules, "wandb", Broken())
    run = quiet(short, tiny, tracker="wandb")
    notes = [(m["step"], m["note"]) for m in run.metrics() if "note" in m]
    assert notes == [(0, "tracking stopped: OSError: disk full")] and is_finished(run.dir)


def test_wandb_records_offline_inside_the_run_and_says_nothing(short, tiny, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = quiet(short, tiny, tracker="wandb")
    out = capfd.readouterr()
    assert (out.out, out.err) == ("", "")
    assert not [m["note"] for m in run.metrics() if "note" in m]
    assert list((run.dir / "wandb").glob("offline-run-*/*.wandb"))


def test_unknown_trackers_are_refused(short, tiny):
    with pytest.raises(ValueError, match="unknown tracker 'mlflow'"):
        quiet(short, tiny, tracker="mlflow")

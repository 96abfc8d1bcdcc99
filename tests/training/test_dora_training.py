"""DoRA in the training loop: what a run leaves, and that a stopped one resumes to the same bits."""

import pytest
import torch
from safetensors.torch import load_file
from training_tools import Stop, make_preset, quiet, same_run, same_tensors, stop_at, stopped_and_resumed, weights

from helpers import lora
from helpers.adapters import loading
from helpers.lora import dora
from helpers.presets.configuration import TrainConfig


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory):
    """A run of DoRA that nothing stopped."""
    from tiny import tiny_minisd

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_RUNS", str(tmp_path_factory.mktemp("dora")))
        return quiet(make_preset(pictures, use_dora=True), tiny_minisd())


def magnitudes(tensors):
    return {name: value for name, value in tensors.items() if "magnitude" in name}


def test_a_run_saves_a_magnitude_for_every_layer(undisturbed):
    tensors = weights(undisturbed)
    layers = [name for name in tensors if name.endswith("lora_A.weight")]
    assert len(magnitudes(tensors)) == len(layers) > 0
    assert len(tensors) == 3 * len(layers)


def test_the_magnitudes_have_learnt(undisturbed, tiny):
    before = tiny.unet.state_dict()
    for name, value in magnitudes(weights(undisturbed)).items():
        layer = name.removeprefix("unet.").removesuffix(".lora_magnitude_vector")
        start = dora.row_norms(before[f"{layer}.weight"]).flatten()
        assert (value.flatten() - start).abs().max() > 0, name
        assert torch.allclose(value.flatten(), start, atol=0.1), f"{name} begins as the length of the weight's rows"


def test_a_stopped_run_of_dora_resumes_to_the_same_bits(undisturbed, world, pictures, tiny):
    preset = make_preset(pictures, use_dora=True)
    with pytest.raises(Stop):
        quiet(preset, tiny, on_log=stop_at(5))
    assert not lora.lora_layers(tiny.unet)
    steps = []
    resumed = quiet(preset, tiny, on_log=lambda step, metrics: steps.append(step))
    assert steps == list(range(4, 10)) and resumed.dir != undisturbed.dir
    assert not same_run(resumed, undisturbed)


def test_dora_is_another_run_than_lora(undisturbed, whole):
    assert undisturbed.key != whole.key
    plain, trained = weights(whole), weights(undisturbed)
    assert not magnitudes(plain) and plain.keys() < trained.keys()
    assert not same_tensors(plain, {name: trained[name] for name in plain})


def test_the_adapter_of_a_run_loads_as_dora(undisturbed, tiny):
    loading.load_adapter(undisturbed.adapter, tiny.unet)
    loaded, saved = lora.lora_state_dict(tiny.unet), weights(undisturbed)
    assert sorted(t.double().sum().item() for t in loaded.values()) == pytest.approx(
        sorted(t.double().sum().item() for t in saved.values())
    )


def test_dora_is_refused_with_dropout():
    with pytest.raises(ValueError, match="lora_dropout must be 0"):
        TrainConfig(use_dora=True, lora_dropout=0.1)
    assert TrainConfig(use_dora=True).use_dora and not TrainConfig(lora_dropout=0.1).use_dora


def test_dora_of_a_text_encoder_resumes_to_the_same_bits(world, pictures, tiny):
    preset = make_preset(pictures, use_dora=True, train_text_encoder=True, steps=6, validation_epochs=1000)
    whole = quiet(preset, tiny)
    tensors, metrics = weights(whole), whole.metrics()
    optimizer = load_file(whole.checkpoint_dir(6) / "optimizer.safetensors")
    ours = {name for name in magnitudes(tensors) if name.startswith("text_encoder.")}
    assert len(ours) == 2 * 4, "4 matrices of each of 2 layers"

    resumed, steps = stopped_and_resumed(preset, tiny, at=5)
    assert steps == [4, 5] and resumed.metrics() == metrics
    assert same_tensors(weights(resumed), tensors)
    assert same_tensors(load_file(resumed.checkpoint_dir(6) / "optimizer.safetensors"), optimizer)

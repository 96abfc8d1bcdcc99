"""The exported files against PyTorch, part by part: what they compute, what they hold, what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny import random_adapter, random_engine, tiny_minisd
from torch import nn

from helpers import lora
from helpers.adapters import read_adapter
from helpers.base.errors import CourseError
from helpers.diffusion.pictures import to_pictures
from helpers.diffusion.text import encode_tokens, tokenize
from helpers.lora.lowrank import LoRAWeights, attach, compose
from helpers.playground.engine import STYLES, Engine, Settings
from helpers.presets.variants import get_preset

onnx = pytest.importorskip("onnx", reason="onnx is not installed: make site installs it")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: make site installs it")
from helpers.playground import export  # noqa: E402

FIRST = Settings("a cat", steps=2, adapter="doodles")
TOLERANCE = 1e-4
MOST = 30_000_000  # bytes that a reader loads beside the runtime


def run(path, **inputs):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    [output] = session.run(None, {name: np.asarray(value) for name, value in inputs.items()})
    return torch.from_numpy(output)


@pytest.fixture(scope="module", params=["tiny", "minisd"])
def both(request, tmp_path_factory):
    """(engine, its export): of random weights, and the course's own MiniSD with the adapters of its finished runs."""
    folder = tmp_path_factory.mktemp("export") / request.param
    if request.param == "minisd":
        engine = Engine(get_preset("mini"))
        export.export(engine, folder)
    else:
        engine = random_engine(tiny_minisd())
        export.export(engine, folder, FIRST)
    return engine, folder


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < TOLERANCE, (ours - theirs).abs().max()


def test_the_text_encoder(both):
    engine, folder = both
    ids = tokenize(engine.components, ["a drawing of a cat with a red scarf", ""])
    for rows in (ids, ids[:1]):
        close(run(folder / "text_encoder.onnx", input_ids=rows.int()), encode_tokens(engine.components, rows))


def test_the_decoder(both):
    engine, folder = both
    latents = torch.randn(2, *engine.components.latent_shape, generator=torch.Generator().manual_seed(0))
    close(run(folder / "decoder.onnx", latents=latents), to_pictures(engine.components, latents))


@pytest.mark.parametrize("choice", ["none", "doodles", "mix"])
def test_the_unet_with_every_adapter(both, choice):
    engine, folder = both
    c, g = engine.components, torch.Generator().manual_seed(0)
    adapter = engine.adapters.get(choice, {})
    if choice == "mix":
        adapter = compose([(engine.adapters["doodles"], 0.2), (engine.adapters["vintage"], -0.3)])
    names = [name for name, *_ in json.loads((folder / "manifest.json").read_text())["layers"]]
    A, B = export.flat(adapter, c.unet, names)
    ids = tokenize(c, ["a drawing of a cat", ""])
    for batch, t in ((1, 1), (2, 741)):
        latents, text = torch.randn(batch, *c.latent_shape, generator=g), encode_tokens(c, ids[:batch])
        inputs = {"latents": latents, "encoder_hidden_states": text, "lora_A": A, "lora_B": B}
        ours = run(folder / "unet.onnx", timestep=torch.tensor([float(t)]), **inputs)
        if adapter:
            attach(c.unet, adapter)
        with torch.no_grad():
            theirs = c.unet(latents, t, encoder_hidden_states=text).sample
            base = lora.remove(c.unet) if adapter else None
        close(ours, theirs)
        assert base is None


def test_an_adapter_changes_what_the_unet_says(both):
    engine, folder = both
    c = engine.components
    names = [name for name, *_ in json.loads((folder / "manifest.json").read_text())["layers"]]
    text = encode_tokens(c, tokenize(c, ["a drawing of a cat"]))
    inputs = {"latents": torch.zeros(1, *c.latent_shape), "timestep": torch.ones(1), "encoder_hidden_states": text}
    outputs = []
    for adapter in ({}, engine.adapters["doodles"]):
        A, B = export.flat(adapter, c.unet, names)
        outputs.append(run(folder / "unet.onnx", **inputs, lora_A=A, lora_B=B))
    assert (outputs[0] - outputs[1]).abs().max() > 100 * TOLERANCE


def test_the_model_is_left_as_it_was(engine, tmp_path):
    before = {name: id(module) for name, module in engine.components.unet.named_modules()}
    export.export(engine, tmp_path / "export", FIRST)
    assert {name: id(module) for name, module in engine.components.unet.named_modules()} == before


def test_adapters_are_files_that_others_read(both):
    engine, folder = both
    for name in STYLES:
        found = read_adapter(folder / f"{name}.safetensors").of("unet")
        assert found.keys() == engine.adapters[name].keys()
        for layer, weights in engine.adapters[name].items():
            assert torch.equal(found[layer].A, weights.A.half().float()) and found[layer].scaling == weights.scaling


def test_a_reader_loads_less_than_30_mb(both):
    _, folder = both
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(sizes.values()) < MOST, sizes
    manifest = json.loads((folder / "manifest.json").read_text())
    said = {name: file["bytes"] for name, file in manifest["files"].items()}
    assert said == {name: size for name, size in sizes.items() if name != "manifest.json"}


def test_half_precision_is_used_where_it_loses_nothing(tmp_path):
    layer = nn.Linear(16, 2)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.half())
        layer.bias.copy_(torch.tensor([0.1, 1e6]))
    x = torch.randn(3, 16)
    export.write_onnx(layer, {"x": x}, {"x": {0: "batch"}}, tmp_path / "layer.onnx")
    weights = onnx.load(str(tmp_path / "layer.onnx")).graph.initializer
    kinds = {tuple(weight.dims): weight.data_type for weight in weights}
    assert kinds[2,] == onnx.TensorProto.FLOAT
    assert onnx.TensorProto.FLOAT16 in (kinds.get((2, 16)), kinds.get((16, 2)))
    assert torch.allclose(run(tmp_path / "layer.onnx", x=x), layer(x).detach(), rtol=1e-6)


def test_a_weight_that_half_precision_would_change_stays(tmp_path):
    layer = nn.Linear(16, 16, bias=False)
    export.write_onnx(layer, {"x": torch.zeros(1, 16)}, {"x": {0: "batch"}}, tmp_path / "layer.onnx")
    [weight] = onnx.load(str(tmp_path / "layer.onnx")).graph.initializer
    assert weight.data_type == onnx.TensorProto.FLOAT


def test_an_adapter_of_another_kind_is_refused(engine, tmp_path):
    with pytest.raises(CourseError, match="DoRA"):
        dora = {
            name: dataclasses.replace(w, magnitude=torch.ones(len(w.B)))
            for name, w in engine.adapters["vintage"].items()
        }
        export.export(Engine(engine.preset, engine.components, {"vintage": dora}), tmp_path / "dora", FIRST)
    conv = {"conv_in": LoRAWeights(torch.zeros(1, 4, 3, 3), torch.zeros(8, 1, 1, 1), alpha=1)}
    with pytest.raises(CourseError, match="conv_in, which is not linear"):
        export.export(Engine(engine.preset, engine.components, {"vintage": conv}), tmp_path / "conv", FIRST)
    assert not any(isinstance(module, export.Slot) for module in engine.components.unet.modules())


def test_an_adapter_of_a_smaller_rank_and_fewer_layers_fits(engine, tmp_path):
    unet = engine.components.unet
    small = dict(list(random_adapter(unet, 5, rank=1).items())[:3])
    adapters = {"doodles": engine.adapters["doodles"], "vintage": small}
    manifest = export.export(Engine(engine.preset, engine.components, adapters), tmp_path / "export", FIRST)
    assert len(manifest["layers"]) == len(adapters["doodles"])
    A, B = export.flat(small, unet, [name for name, *_ in manifest["layers"]])
    assert A.shape[0] == B.shape[1] == 1 and A.shape[1] == sum(columns for _, columns, _ in manifest["layers"])
    assert A[:, sum(columns for _, columns, _ in manifest["layers"][:3]) :].abs().max() == 0


def test_the_command_writes_and_says_what_it_wrote(tmp_path, capsys, monkeypatch, engine):
    monkeypatch.setattr(export, "Engine", lambda preset: engine)
    monkeypatch.setattr(export, "first_settings", lambda engine: FIRST)
    assert export.main(["--out", str(tmp_path / "export"), "--preset", "smoke"]) == 0
    assert "export: MiniSD" in capsys.readouterr().out
    assert json.loads((tmp_path / "export" / "manifest.json").read_text())["first"]["prompt"]
    engine.adapters["vintage"] = {"conv_in": LoRAWeights(torch.zeros(1, 4, 3, 3), torch.zeros(8, 1, 1, 1), alpha=1)}
    assert export.main(["--out", str(tmp_path / "export")]) == 1
    assert "conv_in" in capsys.readouterr().err

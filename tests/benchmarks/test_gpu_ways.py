"""What the benchmark of a GPU tries besides the course's own way: what each changes, and that nothing stays changed."""

import importlib
import sys

import pytest
import torch
from torch import nn

from helpers import lora
from helpers.base.paths import ROOT
from helpers.course import notebooks
from helpers.lora.layer import LoRALayer

sys.path.insert(0, str(ROOT))  # benchmarks/ is no installed package
names = ("gpu", "gpu_loops", "gpu_model", "gpu_notebooks", "gpu_plan", "gpu_ways")
bench, loops, model, books, plan, ways = (importlib.import_module(f"benchmarks.{name}") for name in names)

CPU, HALF = torch.device("cpu"), torch.bfloat16


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return model.build_model("tiny", CPU, HALF, torch.float32)


def point_named(name):
    return next(point for point in plan.plan(bench.TINY, "bf16", {}) if point.name == name)


def trained(tiny, *some):
    """A and B after two training steps in these ways, and the dtypes that norms returned."""
    point = loops.replace(point_named(plan.BASE), ways=some)
    dtypes = set()
    with loops.course_side(point, tiny, seed=0) as course:
        norms = [module for module in tiny.unet.modules() if isinstance(module, (nn.GroupNorm, nn.LayerNorm))]
        hooks = [norm.register_forward_hook(lambda norm, given, out: dtypes.add(out.dtype)) for norm in norms]
        course.train(2)
        weights = [p.detach().clone() for p in lora.lora_parameters(tiny.unet)]
        for hook in hooks:
            hook.remove()
    return weights, dtypes


def test_every_way_is_a_point_beside_the_one_without_it():
    points = plan.plan(bench.TINY, "bf16", {})
    tried = {way for point in points for way in point.ways}
    assert tried == set(ways.WAYS) | {ways.FREE_MEMORY}
    base = point_named(plan.BASE)
    for name, (some, changed) in plan.FASTER.items():
        point = point_named(name)
        assert point.ways == some and point.kind == "training"
        settings = {**vars(base.preset.train), **changed}
        assert vars(point.preset.train) == settings and (some or changed)
    steps = {"batch_size": 4, "step_seconds": 0.2, "blocks": [0.2] * 3}
    found = bench.measures({plan.BASE: steps, "channels_last": steps | {"blocks": [0.1] * 3}}, 1.0)
    assert found[f"channels_last vs {plan.BASE}"]["value"] == 2


def test_the_ways_of_training_keep_the_bits_where_they_say_so(tiny):
    plain, _ = trained(tiny)
    for way in ("lean_lora", "encoders_off"):
        weights, _ = trained(tiny, way)
        assert all(torch.equal(a, b) for a, b in zip(plain, weights, strict=True)), way
    weights, dtypes = trained(tiny, "half_norms", "cudnn_benchmark")
    assert dtypes == {HALF} and all(torch.allclose(a, b, atol=5e-3) for a, b in zip(plain, weights, strict=True))


def test_norms_in_half_precision_are_norms():
    """Where autocast would make float32 of them, as it does on CUDA."""
    for norm, x in ((nn.GroupNorm(2, 4), torch.randn(2, 4, 3, 3)), (nn.LayerNorm(4), torch.randn(2, 3, 4))):
        nn.init.normal_(norm.weight)
        expected = norm(x)
        with ways.half_norms(None, HALF):
            found = norm(x.to(HALF))
        assert found.dtype == HALF and torch.allclose(found.float(), expected, atol=0.05)
        with pytest.raises(RuntimeError):
            norm(x.to(HALF).double())  # and nothing stays changed: float32 weights do not take float64


def test_nothing_stays_changed(tiny, monkeypatch):
    before = nn.GroupNorm.forward, nn.LayerNorm.forward, LoRALayer.forward
    moved, to = [], nn.Module.to

    def spy(self, *args):
        moved.append((self, args))
        return to(self, *args)

    monkeypatch.setattr(nn.Module, "to", spy)
    with loops.adapter_for_drawing(point_named("drawing 4 merged"), tiny, 0):
        weights = {name: value.clone() for name, value in tiny.unet.state_dict().items()}
        moved.clear()
        with pytest.raises(ZeroDivisionError), ways.within(tuple(ways.WAYS), tiny, HALF):
            assert torch.is_autocast_enabled("cpu") and torch.backends.cudnn.benchmark
            assert nn.GroupNorm.forward is not before[0] and LoRALayer.forward is not before[2]
            assert all(layer.original_weight is not None for layer in lora.lora_layers(tiny.unet).values())
            assert moved == [(tiny.vae, ("cpu",)), (tiny.text_encoder, ("cpu",))]
            raise ZeroDivisionError
        after = tiny.unet.state_dict()
        assert after.keys() == weights.keys() and all(torch.equal(after[name], weights[name]) for name in weights)
    assert moved[2:4] == [(tiny.vae, (CPU,)), (tiny.text_encoder, (CPU,))]
    assert (nn.GroupNorm.forward, nn.LayerNorm.forward, LoRALayer.forward) == before
    assert not torch.is_autocast_enabled("cpu") and not torch.backends.cudnn.benchmark
    assert not lora.lora_layers(tiny.unet)


@pytest.mark.parametrize("name", plan.DRAWING)
def test_both_sides_of_a_drawing_point_draw_the_same_pictures(tiny, name, monkeypatch):
    monkeypatch.setattr(loops, "pictures_at_once", lambda model, wanted: 3)
    sizes, drawn = [], loops.sample
    monkeypatch.setattr(
        loops, "sample", lambda *args, batch_size=None: sizes.append(batch_size) or drawn(*args, batch_size=batch_size)
    )
    point = loops.replace(point_named(name), batch=4)
    with loops.adapter_for_drawing(point, tiny, 0):
        adapted = next(iter(lora.lora_layers(tiny.unet).values()))
        assert adapted.lora_B.weight.abs().max() > 0, "a new adapter would do nothing"
        way, course = (side.call() for side in loops.adapted_sides(point, tiny, bench.TINY).values())
    assert way.shape == course.shape == (4, 3, 128, 128) and (way - course).abs().mean() < 0.05 * course.std()
    assert sizes == [3 if "free memory" in name else None, None]


@pytest.mark.parametrize(
    ("growth", "free", "wanted", "at_once"), [(10, 100, 16, 8), (10, 1000, 16, 16), (10, 5, 16, 1), (0, 5, 16, 4)]
)
def test_as_many_pictures_as_memory_has_room_for(growth, free, wanted, at_once):
    assert ways.fitting(growth, free, wanted) == at_once


def test_free_memory_is_asked_of_the_gpu(tiny, monkeypatch):
    """One picture takes 70 bytes; 100 are free, and 30 more are held and unused: 104 of 130 is one picture."""
    assert ways.pictures_at_once(tiny, 16) == 16
    told = {"memory_allocated": 50, "max_memory_allocated": 120, "memory_reserved": 80, "mem_get_info": (100, 1000)}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(ways, "sample", lambda *args, **more: None)
    monkeypatch.setattr(ways, "initial_latents", lambda *args: None)
    on_gpu = type("OnGpu", (), {"device": torch.device("cuda")})()
    assert ways.pictures_at_once(on_gpu, 16) == 1


# --- the notebooks on a GPU ------------------------------------------------------------------------------------------


def test_each_notebooks_copy_trains_twenty_steps(tmp_path):
    for path in notebooks.select(books.ONLY):
        copy = books.with_steps(path, tmp_path)
        before, after = (notebooks.read(one).cells for one in (path, copy))
        changed = [(a.source, b.source) for a, b in zip(before, after, strict=True) if a.source != b.source]
        assert len(changed) == 1 and changed[0][1].count("get_preset(PRESET, steps=20") == 1
    with pytest.raises(ValueError, match="has no get_preset"):
        books.with_steps(ROOT / "notebooks" / "playground.ipynb", tmp_path)


def test_what_failed_is_written_after_each_notebook(monkeypatch, tmp_path):
    import json

    written = []

    def execute(path, output, given, environment):
        file = tmp_path / "gpu_notebooks.json"
        written.append(len(json.loads(file.read_text())["found"].get("SD", {})) if file.exists() else None)
        assert given == {"PRESET": "sd21-base@trial"} and environment["COURSE_LOCAL"] == "here"
        if "02" in path.name:
            raise RuntimeError("CUDA error")
        return 1.5

    monkeypatch.setattr(notebooks, "execute", execute)
    given = {"SD": lambda: books.Side("sd21-base@trial", {"COURSE_LOCAL": "here"})}
    found = books.run_all(given, notebooks.select("01,02,03"), tmp_path)
    assert list(found["SD"].values()) == [{"seconds": 1.5}, {"failed": "RuntimeError: CUDA error"}, {"seconds": 1.5}]
    assert written == [None, 1, 2]
    monkeypatch.setattr(books, "run_all", lambda *args: found)
    assert books.main(["--tiny", "--output", str(tmp_path)]) == 1


def test_the_written_model_is_loaded_through_course_local(monkeypatch, tmp_path):
    from helpers.diffusion.components import load_components
    from helpers.presets.variants import get_preset

    side = books.sides(tmp_path, CPU, tiny=True)["sd21-base"]()
    monkeypatch.setenv("COURSE_LOCAL", side.environment["COURSE_LOCAL"])
    components = load_components(get_preset(side.preset), "cpu")
    assert components.unet.config.cross_attention_dim == 1024 and not components.is_minisd
    assert side.preset == "sd21-base@trial@128px" and side.environment["HF_HUB_OFFLINE"] == "1"


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(books, "default_device", lambda: CPU)
    assert books.main([]) == 2 and "needs a CUDA GPU" in capsys.readouterr().err

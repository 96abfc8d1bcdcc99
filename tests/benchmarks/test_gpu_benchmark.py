"""The benchmark of a GPU as a program: what it counts, measures, leaves out and writes. On a CPU, with a tiny model;
how fast anything is, no test says."""

import importlib
import json
import math
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import nn

from helpers import lora
from helpers.base.paths import ROOT
from helpers.diffusion.pictures import to_pictures
from helpers.diffusion.sampling import sample
from helpers.presets.configuration import ATTENTION
from helpers.presets.memory import rungs
from helpers.presets.variants import get_preset
from helpers.training import loop as training

sys.path.insert(0, str(ROOT))  # benchmarks/ is no installed package
names = ("gpu", "gpu_loops", "gpu_model", "gpu_plan", "records", "timing")
bench, loops, model, plan, records, timing = (importlib.import_module(f"benchmarks.{name}") for name in names)

CPU = torch.device("cpu")
TINY = replace(bench.TINY, rounds=1, drawings=1, minutes=600)  # however busy the machine is
MEMORY = rungs(get_preset("sd21-base"))
RUNGS = {"some": {"gradient_accumulation_steps": 2}, "least": {"gradient_accumulation_steps": 8}}


class FakeMeter:
    """Counts resets and reads. A peak is the number of resets, so that one that was not reset shows."""

    def __init__(self):
        self.calls = []

    def reset(self):
        self.calls.append("reset")

    def read(self):
        self.calls.append("read")
        return {"peak_allocated": self.calls.count("reset"), "peak_reserved": 10 * self.calls.count("reset")}


@pytest.fixture(autouse=True)
def one_thread():
    """One thread; and no collections, which take longer than these tiny steps."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with patch.object(timing.gc, "collect"):
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def meter():
    return FakeMeter()


@pytest.fixture(scope="module")
def kept():
    """The records that the run left on the way."""
    return []


@pytest.fixture(scope="module")
def record(meter, kept):
    """A whole run with the tiny model."""
    with patch.object(bench, "Meter", lambda device: meter), patch.object(timing.gc, "collect"):
        return bench.measure(TINY, RUNGS, CPU, lambda record: kept.append(json.loads(json.dumps(record))))


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return model.build_model("tiny", CPU, torch.float32, torch.float32)


def new_bench(settings=TINY):
    return loops.Bench(settings, CPU, FakeMeter())


def point_named(name, rungs=RUNGS, precision="bf16"):
    return next(point for point in plan.plan(TINY, precision, rungs) if point.name == name)


# --- operations ------------------------------------------------------------------------------------------------------


def test_the_operations_of_stable_diffusion():
    each = model.operations("sd21-base")
    assert each["forward"] == pytest.approx(0.80e12, rel=0.03) and each["encode"] == pytest.approx(1.12e12, rel=0.03)
    step = model.lora_step_operations("sd21-base", 1, ATTENTION, False)
    assert step == pytest.approx(1.71e12, rel=0.01)
    assert 2 * each["forward"] < step < 3 * each["forward"]  # no gradients of frozen weights
    assert not lora.lora_layers(model.meta_model("sd21-base").unet)  # the model is as it was


def test_the_tiny_model_is_counted_in_the_same_way():
    each = model.operations("tiny")
    config = get_preset("sd21-base", batch_size=3, rank=2).train
    plain = model.step_operations("tiny", config)
    assert plain % 3 == 0 and plain < model.step_operations("tiny", replace(config, rank=4))
    assert model.step_operations("tiny", config, stock=True) == plain + 3 * (each["encode"] + each["text"])
    again = model.step_operations("tiny", replace(config, gradient_checkpointing=True))
    assert plain < again < plain + 3 * each["forward"]  # most activations are computed twice
    drawn = model.drawing_operations("tiny", 5, 7)
    assert drawn == 5 * (14 * each["forward"] + 2 * each["text"] + each["decode"])


def test_only_executed_operations_count():
    n, width, out, rank = 7, 5, 3, 2
    layers = nn.ModuleDict({"frozen": nn.Linear(width, width), "adapted": nn.Linear(width, out)}).to("meta")
    lora.inject(layers, ["adapted"], rank, 1.0)
    layers.to("meta")
    x = torch.empty(n, width, device="meta")
    # 2 for each multiplication and addition. Forward: both layers, A and B; backward: of A and B the weights, and of B
    # its input. Nothing flows into the frozen layers
    forward = width * width + width * out + width * rank + rank * out
    backward = width * rank + rank * out + rank * out
    counted = model.executed(lambda: layers["adapted"](layers["frozen"](x)).sum().backward())
    assert counted == 2 * n * (forward + backward)


# --- the model -------------------------------------------------------------------------------------------------------


def test_precisions_are_those_of_a_run(monkeypatch):
    models, held = loops.Models("tiny", CPU), []
    build = loops.build_model
    monkeypatch.setattr(loops, "build_model", lambda *args: held.append(models.model) or build(*args))
    ours = models.get(point_named(plan.BASE))
    assert ours.unet.dtype == torch.bfloat16
    assert ours.vae.dtype == ours.text_encoder.dtype == torch.float32
    assert models.get(point_named("rank 64")) is ours
    stock = models.get(point_named(plan.STOCK))
    assert {stock.unet.dtype, stock.vae.dtype, stock.text_encoder.dtype} == {torch.bfloat16}
    assert models.model is stock and held == [None, None]  # the first was let go before the second was built


def test_both_loops_train_the_same_and_leave_the_model_as_it_was(tiny):
    for name, side in {plan.BASE: loops.course_side, plan.STOCK: loops.stock_side}.items():
        point = point_named(name)
        weights = {key: value.clone() for key, value in tiny.unet.state_dict().items()}
        with side(point, tiny, seed=0) as loop:
            trained = [p for p in tiny.unet.parameters() if p.requires_grad]
            assert {p.dtype for p in trained} == {torch.float32}
            before = [p.detach().clone() for p in trained]
            loop.train(2)
            assert any(not torch.equal(p, old) for p, old in zip(trained, before, strict=True))
            assert loop.step == 2
        numbers = sum(p.numel() for p in trained)
        assert numbers == sum(p.numel() for p in before) and not any(p.requires_grad for p in tiny.unet.parameters())
        after = tiny.unet.state_dict()
        assert after.keys() == weights.keys() and all(torch.equal(after[key], weights[key]) for key in weights)


def test_only_the_stock_loop_encodes(tiny, monkeypatch):
    asked = []
    for part, method in ((tiny.vae, "encode"), (tiny.text_encoder, "forward")):
        before = getattr(part, method)
        monkeypatch.setattr(
            part, method, lambda *a, before=before, method=method, **k: asked.append(method) or before(*a, **k)
        )
    with loops.course_side(point_named(plan.BASE), tiny, 0) as loop:
        loop.train(2)
    assert not asked
    with loops.stock_side(point_named(plan.STOCK), tiny, 0) as loop:
        loop.train(2)
    assert asked == ["encode", "forward"] * 2


def test_the_stock_loop_goes_through_accelerate(tiny):
    """Which scales the loss in fp16; and only the forward pass is in half precision."""
    seen = []
    with loops.stock_side(point_named(plan.STOCK), tiny, 0) as loop:
        for owner, name in (
            (loop.accelerator, "backward"),
            (loop.accelerator, "clip_grad_norm_"),
            (tiny.unet, "forward"),
        ):
            before = getattr(owner, name)

            def spy(*args, name=name, before=before, **named):
                seen.append((name, torch.is_autocast_enabled("cpu")))
                return before(*args, **named)

            setattr(owner, name, spy)
        try:
            loop.train(1)
        finally:
            del tiny.unet.forward
    assert seen == [("forward", True), ("backward", False), ("clip_grad_norm_", False)]


def test_compile_reaches_the_training_forward_alone(tiny, monkeypatch):
    class Compiled(nn.Module):
        """In the place of what torch.compile returns: counts its calls."""

        calls = 0

        def __init__(self, unet):
            super().__init__()
            self.unet = unet

        def forward(self, *args):
            Compiled.calls += 1
            return self.unet(*args)

        def __getattr__(self, name):  # as torch.compile's own wrapper does
            return super().__getattr__(name) if name == "unet" else getattr(self.unet, name)

    monkeypatch.setattr(torch, "compile", Compiled)
    loops.measure_training(point_named(plan.BASE), tiny, new_bench())
    assert Compiled.calls == 0
    found = loops.measure_training(point_named(plan.COMPILED), tiny, new_bench())
    assert Compiled.calls == TINY.warmup + TINY.rounds * TINY.steps and found["warmup_seconds"] > 0


def test_both_samplers_draw_the_same_pictures(tiny):
    # A random VAE may draw flat pictures; latents would differ by far more than rounding if the work were not the same
    sides = loops.drawing_sides(point_named("sampling, batch 4"), tiny, TINY)
    ours, stock = (side.call() for side in sides.values())
    assert ours.shape == stock.shape == (4, 3, 128, 128) and ours.std() > 1e-3
    assert torch.allclose(ours, stock, atol=2e-3)
    assert not torch.allclose(ours[0], ours[1], atol=2e-2)  # each picture has its own noise


def test_the_stand_in_tokenizer_tells_prompts_apart(tiny):
    z = torch.randn(2, *tiny.latent_shape)
    pictures = to_pictures(tiny, sample(tiny, ["a", "another"], z[:1].expand(2, -1, -1, -1), 2))
    assert tiny.tokenizer(["", "a"]).input_ids[0] != tiny.tokenizer(["", "a"]).input_ids[1]
    assert tiny.tokenizer("ab", return_tensors="pt").input_ids.shape == (1, 8) and pictures.isfinite().all()


# --- one run ---------------------------------------------------------------------------------------------------------


def test_every_point_is_measured_or_named_with_a_reason(record):
    everything = [point.name for point in plan.plan(TINY, "bf16", RUNGS)]
    assert len(set(everything)) == len(everything)
    assert sorted([*record["points"], *record["not_measured"]]) == sorted(everything)
    assert record["not_measured"] == {
        **dict.fromkeys(
            ["fp16", "memory no variant-fp16", "memory some-fp16", "memory least-fp16"], "fp16 needs a GPU"
        ),
        **dict.fromkeys(["compile, batch 4", "compile, batch 16"], "torch.compile is measured on a GPU only"),
    }
    ranks = {point["rank"] for point in record["points"].values() if point["kind"] == "training"}
    batches = {point["batch_size"] for point in record["points"].values() if point["kind"] == "training"}
    assert ranks == {1, 4, 16, 64} and batches == {1, 4, 8, 16}
    shown = bench.table(record)
    assert all(f"\n{name} " in shown for name in everything)


def test_each_peak_is_of_its_own_point(record, meter):
    # Never read without a reset, nor twice after one
    assert meter.calls == ["reset", "read"] * (len(meter.calls) // 2)
    peaks = []

    def collect(found):
        peaks.extend([found["peak_allocated"]] if "peak_allocated" in found else [])
        for value in found.values():
            if isinstance(value, dict):
                collect(value)

    collect(record["points"])
    assert sorted(peaks) == list(range(1, len(peaks) + 1))  # a rung has two, sampling and drawing one for each side
    assert len(peaks) == 11 + len(plan.FASTER) + 1 + 2 * 3 + 2 * 3 + 2 * len(plan.DRAWING)


def test_rates_follow_from_times_and_operations(record):
    for point in record["points"].values():
        if point["kind"] in ("training", "stock"):
            assert point["pictures_per_second"] == pytest.approx(point["batch_size"] / point["step_seconds"])
            assert point["operations_per_second"] == pytest.approx(point["operations"] / point["step_seconds"])
    points = record["points"]
    assert points["batch 8"]["operations"] == 2 * points[plan.BASE]["operations"]
    each = record["operations_per_picture"]
    assert points[plan.BASE]["operations"] == 4 * each["lora_step"]
    assert points["checkpointing"]["operations"] == 4 * each["lora_step_with_checkpointing"]
    assert points[plan.STOCK]["operations"] == 4 * (each["lora_step"] + each["encode"] + each["text"])


def test_the_record_says_where_it_comes_from(record, kept):
    assert record["settings"] == vars(TINY) and record["goals"] == bench.GOALS
    assert {"torch", "diffusers", "peft", "cuda", "device"} <= set(record["versions"])
    assert all(len(value) == 64 for value in record["code"].values()) and "helpers.training.steps" in record["code"]
    assert record["ceiling_operations_per_second"] > 0 and record["device"].startswith("cpu")
    json.dumps(record, allow_nan=False)
    # One record after each point; the first names all others as not reached
    assert len(kept) == len(record["points"]) + len(record["not_measured"]) and kept[-1] == json.loads(
        json.dumps(record)
    )
    assert list(kept[0]["points"]) == [plan.STOCK]
    assert set(kept[0]["not_measured"].values()) == {"the run ended before"}


def test_a_rung_measures_steps_of_eight_pictures_and_a_validation(tiny, monkeypatch):
    validated, parts, validate = [], [], training.validate
    monkeypatch.setattr(training, "validate", lambda *args: validate(*args) or validated.append(args[0].prompts))
    step = training.training_step
    monkeypatch.setattr(training, "training_step", lambda *args: parts.append((len(args[2]), args[3])) or step(*args))
    found = loops.measure_rung(point_named("memory least"), tiny, new_bench())
    assert validated == [list(get_preset("sd21-base").validation_prompts["doodles"])]
    assert len(parts) == TINY.warmup + TINY.rung_rounds * TINY.steps
    assert {(count, config.gradient_accumulation_steps) for count, config in parts} == {(8, 8)}
    # Each has its own reset before it
    assert found["training"]["peak_allocated"] == 1 and found["validation"]["peak_allocated"] == 2
    assert found["validation"]["pictures"] == 4


def test_the_rungs_are_those_of_the_presets(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(bench, "measure", lambda settings, rungs, *_: asked.append(rungs) or example())
    assert bench.main(["--model", "tiny"]) == 0 and asked == [MEMORY]
    wanted = [f"memory {rung}{half}" for half in ("", "-fp16") for rung in ("no variant", *MEMORY)]
    planned = [point for point in plan.plan(TINY, "bf16", MEMORY) if point.kind == "rung"]
    assert [point.name for point in planned] == wanted
    named, half = [point.name for point in plan.plan(TINY, "fp16", MEMORY) if point.kind == "rung"], 1 + len(MEMORY)
    assert named == wanted[half:] + wanted[:half]
    for point in planned:
        rung = MEMORY.get(point.name.removeprefix("memory ").removesuffix("-fp16"), {})
        config = point.preset.train
        assert all(getattr(config, name) == value for name, value in rung.items()) and config.batch_size == 8
        assert config.mixed_precision == ("fp16" if point.name.endswith("-fp16") else "bf16")
    with pytest.raises(ValueError, match="unknown setting"):
        plan.plan(TINY, "bf16", {"wrong": {"no_such_setting": 1}})


# --- time and failures -----------------------------------------------------------------------------------------------


def test_what_no_longer_fits_is_left_out_by_name(monkeypatch):
    clock = iter(range(0, 10_000, 7))  # each look at it takes 7 seconds
    monkeypatch.setattr(plan.time, "monotonic", lambda: float(next(clock)))
    ran = []
    for kind in loops.KINDS:
        fake = {"kind": kind, "warmup_seconds": 1.0, "blocks": [1.0], "pictures_per_second": 1.0}
        fake |= {"operations_per_second": 1.0, "training": {"step_seconds": 1.0}, "seconds_per_picture": 1.0}
        fake |= {"validation": {"seconds": 1.0, "pictures": 4}, "step_seconds": 1.0}
        monkeypatch.setitem(loops.KINDS, kind, lambda point, *_, fake=fake: ran.append(point.name) or fake)
    found = bench.measure(replace(TINY, minutes=1), RUNGS, CPU)
    assert ran and ran[0] == plan.STOCK and list(found["points"]) == ran
    no_time = {name: why for name, why in found["not_measured"].items() if why.startswith("no time")}
    everything = {point.name for point in plan.plan(TINY, "bf16", RUNGS)}
    assert no_time and everything == set(ran) | set(found["not_measured"])
    assert all(f"{name} " in bench.table(found) for name in no_time)


def test_time_is_foretold_from_the_slowest_of_its_kind(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(plan.time, "monotonic", lambda: now[0])
    budget = plan.Budget(60, ceiling=1000.0, began=100.0)
    assert budget.left == 60 and budget.expected("training", 500) == 500 / (plan.FIRST_SHARE * 1000)
    budget.note("training", 400, 4.0, {})
    budget.note("training", 800, 2.0, {})  # a faster one does not make it hopeful
    assert budget.expected("training", 500) == 5
    assert budget.expected("compile", 500) == plan.COMPILE_SECONDS + 5
    budget.note("compile", 500, 200.0, {"warmup_seconds": 195.0})
    assert budget.expected("compile", 500) == 200 and budget.expected("training", 500) == 5
    now[0] = 130.0
    assert budget.left == 30


def test_work_is_what_a_point_executes():
    """The count on the meta device, against a count of the steps that really run."""
    each = model.operations("tiny")
    encoding = plan.work_of(point_named(plan.ENCODING), TINY)
    assert encoding == 2 * loops.ENCODED * (each["encode"] + each["text"])
    step = model.step_operations("tiny", point_named(plan.BASE).preset.train)
    assert plan.work_of(point_named(plan.BASE), replace(TINY, rounds=3, steps=2, warmup=4)) == 10 * step
    eight = model.step_operations("tiny", point_named("memory some").preset.train)
    assert plan.work_of(point_named("memory some"), TINY) == 2 * eight + model.drawing_operations("tiny", 4, 2)
    assert plan.work_of(point_named("sampling, batch 8"), TINY) == 4 * model.drawing_operations("tiny", 8, 2)
    assert plan.work_of(point_named("drawing 4 merged"), TINY) == 4 * model.drawing_operations("tiny", 4, 2)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "out of memory"),
        (ValueError("first line\nsecond line"), "failed: ValueError: first line"),
        (AssertionError(), "failed: AssertionError: no message"),
    ],
)
def test_a_point_that_fails_leaves_the_others(monkeypatch, error, reason):
    def fails(point, held, shared):
        if point.name == plan.BASE:
            raise error
        return {"warmup_seconds": 1.0, "blocks": [1.0], "operations_per_second": 1.0, "step_seconds": 1.0}

    for kind in loops.KINDS:
        monkeypatch.setitem(loops.KINDS, kind, fails)
    monkeypatch.setattr(bench, "homework", lambda *_: {})
    found = bench.measure(TINY, {}, CPU)
    assert found["not_measured"][plan.BASE] == reason and "rank 1" in found["points"]
    assert "caching_vs_stock" not in found["measures"] and "rank_64_vs_rank_1" in found["measures"]
    monkeypatch.setattr(bench, "measure", lambda *_: example(not_measured={plan.BASE: reason}))
    assert bench.main(["--model", "tiny"]) == (1 if reason.startswith("failed") else 0)


def test_what_a_device_cannot_do(monkeypatch):
    cuda = torch.device("cuda")
    assert plan.impossible(point_named("fp16"), CPU) and plan.impossible(point_named(plan.COMPILED), CPU)
    monkeypatch.setattr(plan, "has_bfloat16", lambda device: True)
    assert plan.precision_of(cuda) == "bf16"
    assert not any(plan.impossible(point, cuda) for point in plan.plan(TINY, "bf16", RUNGS))
    monkeypatch.setattr(plan, "has_bfloat16", lambda device: False)
    assert plan.precision_of(cuda) == "fp16"
    points = plan.plan(TINY, "fp16", RUNGS)
    assert {p.name for p in points if plan.impossible(p, cuda)} == {
        "bf16", "memory no variant", "memory some", "memory least",
    }  # fmt: skip


def test_the_meter_asks_cuda(monkeypatch):
    calls = []
    for name, value in {"empty_cache": 0, "reset_peak_memory_stats": 0, "max_memory_allocated": 5}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name, value=value: calls.append(name) or value)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda *_: 7)
    meter = loops.Meter(torch.device("cuda"))
    meter.reset()
    assert calls == ["empty_cache", "reset_peak_memory_stats"]
    assert meter.read() == {"peak_allocated": 5, "peak_reserved": 7}
    assert loops.Meter(CPU).read() == {}


@pytest.mark.parametrize("changed", [{"rounds": 0}, {"minutes": 0}, {"drawings": 0}, {"minutes": math.nan}])
def test_settings_that_measure_nothing_are_refused(changed):
    with pytest.raises(ValueError, match="more than 0"):
        replace(TINY, **changed)


def test_the_ceiling_is_the_fastest_block(monkeypatch):
    monkeypatch.setattr(loops, "time_in_turn", lambda sides, *_: {"": [4.0, 2.0, 8.0]})
    assert loops.matmul_ceiling(new_bench(replace(TINY, matrix=10)), torch.float32) == 2 * 10**3 / 2


# --- what follows from it --------------------------------------------------------------------------------------------


def trained(batch, seconds, **more):
    rates = {"pictures_per_second": batch / seconds, "operations_per_second": more.pop("rate", 1.0)}
    return {"kind": "training", "batch_size": batch, "step_seconds": seconds, "blocks": [seconds] * 3, **rates, **more}


def test_the_measures_are_the_right_way_up():
    points = {
        plan.STOCK: trained(4, 0.4),
        plan.BASE: trained(4, 0.2),
        plan.COMPILED: trained(4, 0.1),
        plan.AGAIN: trained(4, 0.25),
        "rank 1": trained(4, 0.2),
        "rank 64": trained(4, 0.22),
        "batch 16": trained(16, 1.0, rate=30.0),
        "compile, batch 16": trained(16, 1.0, rate=50.0),
        "checkpointing, batch 1": trained(1, 0.1, peak_allocated=7_500_000_000),
    }
    found = bench.measures(points, ceiling=100.0)
    values = {name: measure["value"] for name, measure in found.items()}
    assert values == pytest.approx({
        "caching_vs_stock": 2.0, "compile_vs_stock": 4.0, "rank_64_vs_rank_1": 1.1, "drift": 0.8,
        "share_of_ceiling_at_batch_16": 0.3, "gb_with_checkpointing_at_batch_1": 7.5,
    })  # fmt: skip
    assert found["caching_vs_stock"]["interval"] == pytest.approx([2.0, 2.0])
    assert found["share_of_ceiling_at_batch_16"]["with_compile"] == pytest.approx(0.5)
    assert bench.measures({}, 1.0) == {}


def test_the_time_of_the_homework():
    preset = get_preset("sd21-base")
    # 1000 doodles by 8 are 125 steps an epoch: validations at 0, 250 … 750 and 1000. 685 vintage pictures are 86: at
    # 0, 172 … 860 and 1000, and both at 15, 30, 60 and 125 besides. Four prompts each; four seeds in figures 3
    # to 5, two adapters' pictures in 8 and 9
    assert bench.homework_pictures(preset) == (9 + 11) * 4 + 3 * 4 * 4 + 2 * 4 * 2
    rung = {"kind": "rung", "training": {"step_seconds": 0.5}, "validation": {"seconds": 6.0, "pictures": 4}}
    points = {
        "encoding": {"kind": "encoding", "seconds_per_picture": 0.1},
        "memory 8gb": rung,
        plan.BASE: trained(4, 1),
    }
    assert bench.homework(preset, points) == {
        "memory 8gb": {"caches": pytest.approx(168.5), "training": 1000.0, "pictures": 144 * 1.5,
                       "whole": pytest.approx(168.5 + 1000 + 216)},
    }  # fmt: skip
    assert bench.homework(preset, {"memory 8gb": rung}) == {}  # without the caches it would not be the whole


def example(not_measured=None, **values):
    """A record with these measures; goals that are not named are met."""
    met = {"caching_vs_stock": 1.6, "compile_vs_stock": 2.0, "share_of_ceiling_at_batch_16": 0.3}
    met |= {"gb_with_checkpointing_at_batch_1": 8.0, "rank_64_vs_rank_1": 1.1}
    measures = {name: {"value": value} for name, value in (met | values).items()}
    return {"goals": bench.GOALS, "measures": measures, "points": {}, "not_measured": not_measured or {},
            "device": "cpu-x", "device_name": "cpu", "ceiling_operations_per_second": 1e12}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "missed"),
    [
        ({}, []),
        ({"caching_vs_stock": 1.59}, ["caching_vs_stock"]),
        ({"gb_with_checkpointing_at_batch_1": 8.1, "rank_64_vs_rank_1": 0.5}, ["gb_with_checkpointing_at_batch_1"]),
        ({"rank_64_vs_rank_1": 1.11, "compile_vs_stock": math.nan}, ["compile_vs_stock", "rank_64_vs_rank_1"]),
    ],
)
def test_the_exit_status_follows_the_goals(monkeypatch, capsys, values, missed):
    record = example(**values)
    assert bench.missed(record) == missed
    monkeypatch.setattr(bench, "measure", lambda *_: record)
    assert bench.main(["--model", "tiny", "--check"]) == (1 if missed else 0) and bench.main(["--model", "tiny"]) == 0


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(bench, "default_device", lambda: CPU)
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("nothing to measure"))
    assert bench.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "needs a CUDA GPU" in said.err


def test_a_tiny_run_is_written_only_where_it_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "default_device", lambda: CPU)
    monkeypatch.setattr(bench, "measure", lambda settings, rungs, device, keep: keep(example()) or example())
    monkeypatch.setattr(records, "RESULTS", tmp_path / "committed")
    for argv, folder in ((["--model", "tiny"], None), (["--model", "tiny", "--results", str(tmp_path)], tmp_path)):
        assert bench.main(argv) == 0
        assert [path.name for path in tmp_path.iterdir()] == (["cpu-x.json"] if folder else [])
    assert records.read_results(tmp_path / "cpu-x.json") == {"gpu": example()}


def test_the_minutes_reach_the_settings(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "measure", lambda settings, *_: asked.append(settings) or example())
    bench.main(["--model", "tiny", "--minutes", "3"])
    assert asked == [replace(bench.TINY, minutes=3)] and loops.Settings().minutes == 8

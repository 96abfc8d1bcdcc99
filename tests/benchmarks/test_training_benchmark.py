"""The benchmark of the training loop as a program: what it compares, counts and writes. How fast anything is, no test
says."""

import importlib
import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from helpers.base.paths import ROOT
from helpers.data import caches
from helpers.presets.configuration import LINEAR
from helpers.presets.variants import get_preset
from helpers.training import loop as training

sys.path.insert(0, str(ROOT))  # benchmarks/ is no installed package
names = ("training_loop", "loops", "pair", "records", "timing")
bench, loops, pair, records, timing = (importlib.import_module(f"benchmarks.{name}") for name in names)

CPU = torch.device("cpu")
TINY = loops.Settings(model="tiny", batch_size=2, rank=2, pictures=8, held_out=4, rounds=2, size_rounds=2, steps=1,
                      warmup=1, loss_steps=9, piece_steps=2, rows=(5, 12), processes=0, memory_steps=1)  # fmt: skip
VERSIONS = {"python", "torch", "diffusers", "transformers", "device", "peft", "accelerate", "datasets"}
pytestmark = pytest.mark.filterwarnings("ignore:.*tokens and were cut")  # the tiny text encoder reads few


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A runs folder for the drawn pictures of these tests."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch, runs):
    """On the CPU everywhere, in one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("COURSE_RUNS", str(runs))
    monkeypatch.setattr(bench, "default_device", lambda: CPU)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_loops(tmp_path):
    """The three loops on the same 8 pictures."""
    components = pair.load_model("tiny", CPU)
    pictures = loops.doodles(TINY, "train", components.resolution)
    cache = caches.compute_cache(components, pictures)
    with loops.course_loop(TINY, cache, tmp_path / "run", components) as ours:
        yield {
            "ours": ours,
            "bare": loops.bare_loop(TINY, cache, CPU),
            "stock": loops.stock_loop(TINY, pictures, CPU),
        }


def trained(loop):
    """A and B of a loop's U-Net by one name for both kinds of LoRA, copied."""
    unet = loop.unet if isinstance(loop, loops.BareLoop) else loop.components.unet
    found = {name: p.detach().clone() for name, p in unet.named_parameters() if p.requires_grad}
    return {name.replace(".default.", "."): value for name, value in found.items()}


def test_the_settings_are_those_of_the_course():
    config, mini = loops.Settings().train_config(), get_preset("mini").train
    assert replace(config, lr_schedule=mini.lr_schedule) == mini and config.targets == LINEAR
    assert bench.GOALS.keys() == bench.ROWS.keys() and loops.Settings().rows[::3] == (100, 100_000)


@pytest.mark.parametrize("changed", [{"rounds": 0}, {"warmup": 0}, {"rows": ()}, {"rows": (1, 12)}])
def test_settings_that_measure_nothing_are_refused(changed):
    with pytest.raises(ValueError):
        replace(TINY, **changed)


# --- the three loops -------------------------------------------------------------------------------------------------


def test_all_loops_start_from_the_same_weights_and_train(tiny_loops):
    start = trained(tiny_loops["ours"])
    assert any(value.any() for value in start.values())
    for loop in tiny_loops.values():
        before = trained(loop)
        assert before.keys() == start.keys()
        assert all(torch.equal(before[name], start[name]) for name in start)
        loop.train(3)
        assert loop.step == 3
        moved = [not torch.equal(value, start[name]) for name, value in trained(loop).items()]
        # Where the tiny U-Net's latents are a single pixel, attention has no choice, and its queries learn nothing
        assert sum(moved) > 0.8 * len(moved)
    # One line of metrics for each step of ours
    lines = tiny_loops["ours"].loop.run.metrics()
    assert [line["step"] for line in lines] == [0, 1, 2] and all(math.isfinite(line["loss"]) for line in lines)


def test_a_bare_step_is_the_update_of_our_step(tiny_loops):
    ours, bare = tiny_loops["ours"], tiny_loops["bare"]
    for loop in (ours, bare):
        loop.train(1)  # B starts at zero, and small gradients are not clipped
    assert ours.loop.run.metrics()[0]["grad_norm"] < ours.loop.config.max_grad_norm
    for name, value in trained(ours).items():
        assert torch.allclose(value, trained(bare)[name], atol=1e-5), name


def test_only_the_stock_loop_asks_the_vae_and_the_text_encoder(tiny_loops, monkeypatch):
    asked = []
    for name in ("ours", "stock"):
        parts = tiny_loops[name].components
        for module, method in ((parts.vae, "encode"), (parts.text_encoder, "forward")):
            before = getattr(module, method)
            spy = lambda *args, name=name, method=method, before=before, **named: (  # noqa: E731
                asked.append((name, method)) or before(*args, **named)
            )
            monkeypatch.setattr(module, method, spy)
        tiny_loops[name].train(6)  # over the end of an epoch of 4 steps
    assert asked == [("stock", "encode"), ("stock", "forward")] * 6


def test_smaller_batches_are_left_out(tmp_path, monkeypatch):
    components, sizes = pair.load_model("tiny", CPU), []
    monkeypatch.setattr(
        training, "training_step", lambda c, o, draw, *_: sizes.append(len(draw)) or {"loss": 1.0, "grad_norm": 1.0}
    )
    for rows in (5, 6):
        cache = pair.random_cache(components, rows, 0)
        with loops.course_loop(TINY, cache, tmp_path, components) as course:
            course.train(7)
            assert course.step == (7 if rows == 6 else 10)  # with 5 rows every third batch has one picture
    assert sizes == [2] * 14


# --- caches of many sizes --------------------------------------------------------------------------------------------


def test_a_mapped_cache_stays_on_the_disk(tmp_path, monkeypatch):
    modes, load = [], caches.np.load
    monkeypatch.setattr(bench, "CHUNK", 5)
    monkeypatch.setattr(caches.np, "load", lambda path, mmap_mode: modes.append(mmap_mode) or load(path, mmap_mode))
    cache = bench.mapped_cache(pair.load_model("tiny", CPU), 12, tmp_path, seed=0)
    assert set(modes) == {"c"} and len(cache) == 12 and len(cache.caption_embeddings) == bench.CAPTIONS
    assert 0.8 < cache.mean.std() < 1.2 and len({row.sum().item() for row in cache.mean}) == 12
    assert cache.caption_index.max() < bench.CAPTIONS and len(cache.caption_index.unique()) > 4


def test_sizes_that_do_not_fit_the_disk_are_left_out(tmp_path, monkeypatch):
    assert bench.rows_that_fit((10, 1000, 100), 4, free=2 * 8 * 110) == [10, 100]
    assert bench.rows_that_fit((10,), 4, free=0) == []
    monkeypatch.setattr(bench.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 0}))
    assert bench.compare_sizes(TINY, tmp_path, CPU) is None


# --- the clock -------------------------------------------------------------------------------------------------------


def test_pieces_and_the_rest_make_the_whole(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))

    class Thing:
        def first(self):
            return "first"

        second = third = first

    thing = Thing()
    pieces = [(thing, "first", "a"), (thing, "second", "a"), (thing, "third", "b")]
    watch = timing.Stopwatch(CPU)
    # Each look at the clock takes a second: six in the pieces, two around them
    assert watch.medians(lambda: (thing.first(), thing.second(), thing.third()), pieces, 3) == {
        "a": 2, "b": 1, "rest": 4,
    }  # fmt: skip
    assert vars(thing) == {}  # put back


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["validating", "training"])
def test_a_process_tells_its_peak(monkeypatch, capsys, side):
    validated, validate = [], training.validate

    def spy(loop, step, tracker):
        validate(loop, step, tracker)
        validated.append(
            (len(loop.prompts), loop.run.validations(), "held_out_loss" in loop.run.validation_metrics()[0])
        )

    monkeypatch.setattr(training, "validate", spy)
    monkeypatch.setattr(loops, "get_preset", lambda name: get_preset(name, num_inference_steps=2))
    assert bench.main(["--worker", json.dumps({"side": side, "settings": vars(TINY)})]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told is None or told["peak"] > 1e8  # None on Windows
    assert validated == ([(4, [(1, 0)], True)] if side == "validating" else [])


def test_peaks_of_both_kinds_are_compared(monkeypatch):
    told = {"validating": {"peak": 330, "growth": 60}, "training": {"peak": 300, "growth": 20}}
    monkeypatch.setattr(bench, "in_new_process", lambda benchmark, order: told[order["side"]])
    found = bench.compare_memory(replace(TINY, processes=2))
    assert found["ratio"] == 1.1 and found["without_imports"]["ratio"] == 3
    assert bench.compare_memory(TINY) is None  # no processes asked for


# --- the record ------------------------------------------------------------------------------------------------------


def test_a_tiny_measurement(monkeypatch):
    monkeypatch.setattr(bench, "compare_memory", lambda settings: {"validating": 2, "training": 2, "ratio": 1.0,
                                                                   "interval": [1.0, 1.0]})  # fmt: skip
    record = bench.measure(TINY)
    assert record["settings"] == {**vars(TINY), "rows": [5, 12]} and set(record["versions"]) == VERSIONS
    assert record["goals"] == bench.GOALS and set(record["measures"]) == set(bench.GOALS)
    assert all(len(value) == 64 for value in record["code"].values()) and "helpers.training.steps" in record["code"]
    assert record["threads"] == 1 and record["device"].endswith("-1-threads")
    for measured in record["measures"].values():
        one, other = list(measured)[:2]
        assert measured["ratio"] == measured[one] / measured[other] > 0 and len(measured["interval"]) == 2

    stock, sizes = (record["measures"][name] for name in list(bench.GOALS)[1:3])
    assert set(stock["shares"]) == {"decoding", "vae", "text_encoder", "unet", "rest"}
    assert sum(stock["shares"].values()) == pytest.approx(1) and stock["ratio_bound"] == 1 / stock["shares"]["unet"]
    assert stock["cache_seconds"] > 0
    assert sizes["rows"] == [5, 12] and set(sizes["draw_step_ms"]) == set(sizes["step_seconds"]) == {"5", "12"}
    assert sizes["left_out_for_lack_of_disk"] == []
    pieces = {"draw", "noising_and_target", "unet_forward", "backward", "clip", "adamw", "bookkeeping"}
    assert set(record["where_a_step_goes_ms"]) == pieces and min(record["where_a_step_goes_ms"].values()) > 0
    losses = record["held_out_loss"]
    assert losses["steps"] == TINY.loss_steps and min(losses["start"], losses["ours"], losses["stock"]) > 0
    assert len({losses["start"], losses["ours"], losses["stock"]}) == 3  # both have trained, on different draws
    json.dumps(record, allow_nan=False)
    assert "held-out loss after 9 steps" in bench.table(record)


def test_what_was_not_measured_is_said(monkeypatch):
    found = {"measures": example()["measures"], "where_a_step_goes_ms": {"draw": 1.0}, "held_out_loss": None}
    monkeypatch.setattr(bench, "compare_loops", lambda *_: found)
    monkeypatch.setattr(bench, "compare_sizes", lambda *_: None)
    record = bench.measure(replace(TINY, loss_steps=0))
    assert list(record["measures"]) == ["train_images_per_s_vs_stock"] and "held_out_loss" not in record
    assert bench.table(record).count("not measured") == 3 and not bench.missed(record)


def example(**ratios):
    """A record with these ratios, all goals met otherwise."""
    ratios = {"train_images_per_s_vs_stock": 1.5, **ratios}
    measures = {name: {"one": 1.0, "other": 1.0, "ratio": ratio, "interval": [1, 2]} for name, ratio in ratios.items()}
    cache = {"cache_seconds": 3.0, "steps_until_cache_pays": None}
    measures["train_images_per_s_vs_stock"] |= {"shares": {"unet": 0.5}, "ratio_bound": 2.0, **cache}
    if sizes := measures.get("cost_per_step_100_to_100000"):
        sizes["draw_step_ms"] = {"100": 1.0}
    where = {"where_a_step_goes_ms": {"draw": 1.0}}
    return {"goals": bench.GOALS, "measures": measures, "device": "cpu-example-2-threads", **where}


@pytest.mark.parametrize(
    ("record", "status"),
    [
        (example(step_time_vs_bare=1.03, cost_per_step_100_to_100000=0.9, validation_memory_vs_training=1.1), 0),
        (example(step_time_vs_bare=1.031), 1),
        (example(train_images_per_s_vs_stock=1.49), 1),
        (example(validation_memory_vs_training=1.2), 1),
        (example(step_time_vs_bare=math.nan), 1),
    ],
)
def test_the_exit_status_follows_the_goals(monkeypatch, tmp_path, capsys, record, status):
    asked = []
    monkeypatch.setattr(bench, "measure", lambda settings: asked.append(settings) or record)
    monkeypatch.setattr(records, "write_record", lambda *_: None)
    assert bench.main(["--check"]) == status and bench.main([]) == 0
    assert capsys.readouterr().out.rstrip().endswith("goals met") == (status == 0)
    assert asked == [loops.Settings()] * 2


def test_the_command_line_reaches_the_settings_and_the_folder(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(bench, "measure", lambda settings: asked.append(settings) or example(step_time_vs_bare=1.0))
    path = tmp_path / "results" / "cpu-example-2-threads.json"
    records.write_record(path, "lora_vs_peft", {"old": True})
    bench.main(f"--rounds 2 --loss-steps 0 --rows 8 9 --model tiny --results {path.parent}".split())
    assert asked == [loops.Settings(rounds=2, loss_steps=0, rows=(8, 9), model="tiny")]
    assert list(json.loads(path.read_text())) == ["lora_vs_peft", "training_loop"]


def committed():
    """Result files that have a record of this benchmark."""
    return [path for path in sorted(records.RESULTS.glob("*.json")) if bench.NAME in records.read_results(path)]


@pytest.mark.parametrize("path", committed(), ids=lambda path: path.stem)
def test_committed_results_say_where_they_come_from(path):
    record = records.read_results(path)[bench.NAME]
    assert set(record["settings"]) == set(vars(loops.Settings())) and set(record["versions"]) == VERSIONS
    assert record["settings"]["model"] == "mini" and record["goals"] == bench.GOALS
    assert record["device"] == path.stem and record["threads"] >= 1
    # The record that is committed was made before the library had rooms: its files are called as they were then.
    then = "training steps draws caches progress validation diffusion lora sampling".split()
    assert set(record["code"]) in ({f"helpers.{name}" for name in bench.CODE}, {f"helpers/{name}.py" for name in then})
    assert all(measured["ratio"] > 0 for measured in record["measures"].values())

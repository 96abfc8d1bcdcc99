"""The benchmarks as programs: what they count, compare and write. How fast anything is, no test says."""

import importlib
import json
import math
import sys

import pytest
import torch
from torch import nn

from helpers import lora
from helpers.base.paths import ROOT
from helpers.presets.configuration import LINEAR
from helpers.presets.variants import get_preset

sys.path.insert(0, str(ROOT))  # benchmarks/ is no installed package
names = ("lora_vs_peft", "pair", "records", "timing")
bench, pair, records, timing = (importlib.import_module(f"benchmarks.{name}") for name in names)

CPU = torch.device("cpu")
TINY = pair.Settings(model="tiny", rank=2, batch_size=2, pairs=2, steps=1, warmup=0, processes=0, memory_steps=1)
VERSIONS = {"python", "torch", "diffusers", "transformers", "peft", "device"}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Tiny layers gain nothing from threads, and wait for each other long on a busy machine. On the CPU everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # for processes that are started
    monkeypatch.setattr(bench, "default_device", lambda: CPU)
    yield
    torch.set_num_threads(before)


def test_the_settings_are_those_of_the_course():
    config, mini = pair.Settings().train_config(), get_preset("mini").train
    for name in ("targets", "rank", "alpha", "batch_size", "learning_rate", "betas", "max_grad_norm", "lora_dropout"):
        assert getattr(config, name) == getattr(mini, name), name
    assert config.targets == LINEAR


def test_settings_that_measure_nothing_are_refused():
    with pytest.raises(ValueError, match="pairs"):
        pair.Settings(pairs=0)


def test_a_tiny_measurement():
    record = bench.measure(TINY)
    assert record["settings"] == vars(TINY) and VERSIONS <= set(record["versions"])
    assert record["threads"] == 1 and record["device"].endswith("-1-threads") and record["limit"] == 1.03
    names = ["helpers.lora.layer", "helpers.lora.injection", "helpers.lora.merging"]
    assert list(record["code"]) == names and all(len(value) == 64 for value in record["code"].values())
    assert record["largest_difference"] == 0 and record["trained_parameters"] > 0
    assert set(record["costs"]) == {"step_seconds", "saved_bytes"}
    for cost in record["costs"].values():
        assert min(cost["ours"], cost["peft"]) > 0 and math.isfinite(cost["ratio"])
        assert cost["ratio"] == cost["ours"] / cost["peft"]
    assert record["costs"]["saved_bytes"]["ratio"] == 1  # the same tensors, counted and not timed
    low, high = record["costs"]["step_seconds"]["interval"]
    assert 0 < low <= high < math.inf
    json.dumps(record, allow_nan=False)


def test_what_new_processes_tell_is_recorded(monkeypatch):
    told = {"peak": {"ours": [3, 4, 8], "peft": [8, 8, 8]}, "growth": {"ours": [1, 1, 1], "peft": [1, 1, 1]}}
    monkeypatch.setattr(bench, "peaks", lambda settings: told)
    record = bench.measure(TINY)
    peak, growth = record["costs"]["peak_bytes"], record["costs"]["growth_bytes"]
    assert (peak["ours"], peak["peft"], peak["ratio"]) == (4, 8, 0.5) and growth["ratio"] == 1
    assert bench.above_limit({**record, "limit": 0}) == ["step_seconds", "saved_bytes", "peak_bytes", "growth_bytes"]
    assert "peak without the imports" in bench.table(record)


def test_each_block_of_a_pair_is_timed_in_turned_order(monkeypatch):
    order = []
    monkeypatch.setattr(timing, "block_seconds", lambda side, steps, device: order.append(side) or 1.0)

    class Named(str):
        def train(self, steps):
            assert steps == TINY.warmup

    seconds = timing.time_in_turn({name: Named(name) for name in pair.SIDES}, 2, 1, TINY.warmup, CPU)
    assert order == ["ours", "peft", "peft", "ours"] and seconds == {"ours": [1.0, 1.0], "peft": [1.0, 1.0]}


def test_the_interval_of_a_constant_ratio_is_that_ratio():
    assert timing.ratio_interval([2.0] * 5, [4.0] * 5) == [0.5, 0.5]
    low, high = timing.ratio_interval([1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 2.0, 2.0])
    assert 0.5 <= low < 1.25 < high <= 2


def test_saved_bytes_of_one_linear_layer():
    n, width, rank = 7, 5, 2
    model = nn.ModuleDict({"layer": nn.Linear(width, 3)})
    x, float32 = torch.randn(n, width), 4
    # Frozen, and its input needs no gradient: nothing is kept
    model.requires_grad_(False)
    assert bench.saved_bytes(model, lambda: model["layer"](x)) == 0
    # A's gradient needs x, B's needs A(x); the weights that are kept too are no extra memory
    lora.inject(model, ["layer"], rank, alpha=rank)
    assert bench.saved_bytes(model, lambda: model["layer"](x)) == float32 * (n * width + n * rank)
    # Twice the same input is kept once
    twice = float32 * (n * width + 2 * n * rank)
    assert bench.saved_bytes(model, lambda: (model["layer"](x), model["layer"](x))) == twice


def test_different_models_are_not_compared():
    def side(name, **changed):
        return pair.build_side(name, pair.Settings(**{**vars(TINY), **changed}), CPU)

    assert pair.check_equal(side("ours"), side("peft")) == 0
    with pytest.raises(pair.DifferentModels, match="differ by"):
        pair.check_equal(side("ours", alpha=3.0), side("peft"))
    with pytest.raises(pair.DifferentModels):
        pair.check_equal(side("ours", targets="attention"), side("peft"))


def test_the_peak_of_a_new_process():
    peak = bench.peak_in_new_process("ours", TINY)
    if peak is not None:  # None on Windows
        assert peak["peak"] > 1e8 and 0 <= peak["growth"] < peak["peak"]  # PyTorch alone is more than 100 MB


def test_peaks_alternate_and_stay_with_their_side(monkeypatch):
    asked = []

    def measured(side, settings):
        asked.append(side)
        return {"peak": 100 + len(asked), "growth": len(asked)}

    monkeypatch.setattr(bench, "peak_in_new_process", measured)
    settings = pair.Settings(**{**vars(TINY), "processes": 2})
    assert bench.peaks(settings)["peak"] == {"ours": [101, 103], "peft": [102, 104]}
    assert bench.peaks(TINY) == {} and asked == ["ours", "peft", "ours", "peft"]
    monkeypatch.setattr(bench, "peak_in_new_process", lambda *_: None)  # a system that does not tell
    assert bench.peaks(settings) == {}


def example(**ratios):
    costs = {name: {"ours": ratio, "peft": 1.0, "ratio": ratio} for name, ratio in ratios.items()}
    return {"limit": bench.LIMIT, "costs": costs, "device": "cpu-example-2-threads"}


@pytest.mark.parametrize(
    ("record", "status"),
    [
        (example(step_seconds=1.0, saved_bytes=1.03, peak_bytes=0.9), 0),
        (example(step_seconds=1.031, saved_bytes=1.0), 1),
        (example(step_seconds=1.0, saved_bytes=1.2), 1),
        (example(step_seconds=1.0, saved_bytes=1.0, peak_bytes=1.04), 1),
    ],
)
def test_the_exit_status_follows_the_ratios(monkeypatch, tmp_path, capsys, record, status):
    monkeypatch.setattr(bench, "measure", lambda settings: record)
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    assert bench.main(["--check"]) == status and bench.main([]) == 0
    assert ("goal at most 1.03: met" in capsys.readouterr().out) == (status == 0)
    [file] = tmp_path.iterdir()
    assert json.loads(file.read_text()) == {"lora_vs_peft": record} and file.name == "cpu-example-2-threads.json"


def test_the_command_line_reaches_the_settings(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(bench, "measure", lambda settings: asked.append(settings) or example(step_seconds=1.0))
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    bench.main("--pairs 2 --steps 3 --batch-size 4 --rank 5 --targets attention".split())
    assert asked == [pair.Settings(pairs=2, steps=3, batch_size=4, rank=5, targets="attention")]


def test_a_record_is_put_beside_those_of_other_benchmarks(tmp_path):
    path = tmp_path / "results" / "cpu.json"
    records.write_record(path, "other", {"a": 1})
    records.write_record(path, "lora_vs_peft", {"old": True})
    records.write_record(path, "lora_vs_peft", {"new": True})
    assert json.loads(path.read_text()) == {"lora_vs_peft": {"new": True}, "other": {"a": 1}}


@pytest.mark.parametrize("text", ["[]", "{"])
def test_a_file_that_is_not_ours_is_left_alone(tmp_path, text):
    path = tmp_path / "cpu.json"
    path.write_text(text)
    with pytest.raises(ValueError):
        records.write_record(path, "lora_vs_peft", {})
    assert path.read_text() == text


def test_the_device_slug_names_a_kind_of_device(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert records.device_slug(CPU) == "cpu-x86_64-1-threads"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert records.device_slug(torch.device("cuda")) == "nvidia-h100-80gb-hbm3"


@pytest.mark.parametrize("path", sorted(records.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_results_say_where_they_come_from(path):
    record = records.read_results(path).get("lora_vs_peft")
    if record is None:  # a device on which only the others were measured
        return
    assert set(record["settings"]) == set(vars(pair.Settings())) and VERSIONS <= set(record["versions"])
    assert record["device"] == path.stem and record["threads"] >= 1 and record["code"]
    assert all(cost["ratio"] > 0 for cost in record["costs"].values())

"""The benchmark of the solvers as a program. What it measures, no test says."""

import importlib
import sys

import pytest
from PIL import Image

from helpers.base.paths import ROOT
from helpers.evaluation.measures import Measure

sys.path.insert(0, str(ROOT))  # benchmarks/ is no installed package
bench, records = (importlib.import_module(f"benchmarks.{name}") for name in ("solvers", "records"))


@pytest.fixture
def asked(monkeypatch, tiny, tmp_path):
    """What was asked for: one tuple a way. Pictures and measures are pretended."""
    log = []

    def generate(components, texts, seeds, sampler, num_inference_steps):
        log.append((texts[0], list(seeds), sampler.__name__, num_inference_steps))
        return [Image.new("RGB", (32, 32))] * len(texts)

    monkeypatch.setattr(bench, "load_components", lambda preset: tiny)
    monkeypatch.setattr(bench, "generate", generate)
    monkeypatch.setattr(bench, "fidelity_to_drawings", lambda *_: Measure(1.5, 1.25, 1.75, 3))
    monkeypatch.setattr(bench, "faces", lambda *_: Measure(0.5, 0.0, 1.0, 3))
    return log


def run(monkeypatch, tmp_path, *arguments):
    monkeypatch.setattr(sys, "argv", ["solvers", "--count", "3", "--results", str(tmp_path), *arguments])
    bench.main()
    (file,) = tmp_path.iterdir()
    return records.read_results(file)["solvers"]


def test_all_ways_draw_the_same_prompts_from_the_same_noise(asked, monkeypatch, tmp_path, capsys):
    record = run(monkeypatch, tmp_path)
    assert [entry[2:] for entry in asked] == [
        (bench.SAMPLERS[solver].__name__, steps) for solver, steps in bench.WAYS
    ]  # fmt: skip
    assert len({(text, *seeds) for text, seeds, *_ in asked}) == 1 and asked[0][1] == [0, 1, 2]
    found = record["styles"]["render"]
    assert list(found) == [f"{solver}, {steps} steps" for solver, steps in bench.WAYS]
    assert all(row["distance"] == [1.5, 1.25, 1.75] and row["seconds"] > 0 for row in found.values())
    assert capsys.readouterr().out.count("DPM-Solver++") == 3


def test_a_second_style_stands_beside_the_first(asked, monkeypatch, tmp_path):
    run(monkeypatch, tmp_path)
    record = run(monkeypatch, tmp_path, "--style", "vintage")
    assert list(record["styles"]) == ["render", "vintage"] and asked[-1][0].endswith("vintage style")

"""The table of GPUs in the pages: what it says of a record, and that the committed pages have the one of today."""

import importlib
import sys

import pytest

from helpers.base.paths import ROOT

sys.path.insert(0, str(ROOT))  # benchmarks/ is no installed package
tables, records, gpu = (importlib.import_module(f"benchmarks.{name}") for name in ("tables", "records", "gpu"))


def rung(training, validation, seconds):
    peaks = {"training": training, "validation": validation}
    found = {
        name: {"peak_allocated": int(gb * 1e9), "peak_reserved": int((gb + 1) * 1e9)} for name, gb in peaks.items()
    }
    found["training"]["step_seconds"] = seconds
    return {"kind": "rung", **found}


def trained(rate):
    return {"kind": "training", "pictures_per_second": rate}


def example(**changed):
    """A record of `benchmarks.gpu` on an imagined GPU, as far as the table reads it."""
    record = {
        "settings": {"model": "sd21-base"},
        "device_name": "Imagined 24",
        "memory_bytes": 25_769_803_776,
        "precision": "bf16",
        "versions": {"torch": "2.9", "cuda": "12.8", "diffusers": "0.40"},
        "ceiling_operations_per_second": 120e12,
        "points": {
            "stock loop, batch 4": trained(10.0),
            "rank 16, batch 4": trained(17.0),
            "memory 24gb": rung(11.0, 6.5, 0.75),
            "memory 8gb": rung(5.25, 6.5, 1.5),
            "sampling, batch 4": {"kind": "sampling", "ours": 2.0, "stock": 1.6, "ratio": 1.25},
        },
        "not_measured": {"memory no variant": "out of memory", "compile, batch 4": "no time: 90 s expected, 3 s left"},
        "measures": {
            "caching_vs_stock": {"value": 1.7},
            "share_of_ceiling_at_batch_16": {"value": 0.34, "with_compile": None},
        },
        "homework": {"memory 24gb": {"whole": 1800.0}},
    }
    return record | changed


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    records.write_record(folder / "imagined-24.json", "gpu", example())
    return folder


def test_the_numbers_of_a_record(results):
    table = tables.gpu_table(results)
    assert table.startswith("**Imagined 24**, 25.8 GB (torch 2.9, CUDA 12.8, diffusers 0.40)")
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert rows[2:5] == [
        "| 24gb | 11.0 (12.0) | 6.5 (7.5) | 0.750 | 30 |",
        "| 8gb | 5.2 (6.2) | 6.5 (7.5) | 1.500 | unknown |",
        "| no variant | out of memory | | | |",
    ]
    assert rows[7:] == [
        "| training, batch 4, latents from the cache | 17.00 | 10.00 | 1.70 |",
        "| sampling, batch 4 | 2.00 | 1.60 | 1.25 |",
    ]
    assert "executes 34% of the operations a second of a large matrix product (120 TFLOP/s in bf16)." in table
    assert table.endswith("Not measured: compile, batch 4 (no time: 90 s expected, 3 s left).")


def test_torch_compile_has_its_row(results):
    points = example()["points"] | {"compile, batch 4": trained(25.0)}
    measures = example()["measures"] | {"compile_vs_stock": {"value": 2.5}}
    measures["share_of_ceiling_at_batch_16"]["with_compile"] = 0.46
    record = example(points=points, measures=measures, not_measured={})
    records.write_record(results / "imagined-24.json", "gpu", record)
    table = tables.gpu_table(results)
    assert (
        "| the same with torch.compile | 25.00 | 10.00 | 2.50 |" in table and ", and 46% with torch.compile." in table
    )
    assert "Not measured" not in table


def test_each_gpu_has_a_block(results):
    records.write_record(results / "other.json", "gpu", example(device_name="Imagined 80"))
    table = tables.gpu_table(results)
    assert table.index("**Imagined 24**") < table.index("**Imagined 80**")


@pytest.mark.parametrize("changed", [{"settings": {"model": "tiny"}}, {"memory_bytes": None}])
def test_runs_that_only_try_the_program_are_no_measurements(tmp_path, changed):
    records.write_record(tmp_path / "cpu.json", "gpu", example(**changed))
    records.write_record(tmp_path / "other.json", "lora_vs_peft", {})
    assert tables.gpu_table(tmp_path) == tables.NOTHING


def test_pages_are_written_and_checked(results, tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n", encoding="utf-8")
    settings = {"pages": (page,), "results": results}
    assert tables.main(["--check"], **settings) == 1 and "old" in page.read_text(encoding="utf-8")
    assert tables.main([], **settings) == 0 and tables.main(["--check"], **settings) == 0
    text = page.read_text(encoding="utf-8")
    assert text == f"before\n{tables.BEGIN}\n{tables.gpu_table(results)}\n{tables.END}\nafter\n"


@pytest.mark.parametrize("text", ["", "<!-- gpu-table -->", "<!-- /gpu-table --><!-- gpu-table -->"])
def test_a_page_without_its_marks_is_refused(text):
    with pytest.raises(ValueError, match="once each"):
        tables.with_table(text, "table")


def test_the_committed_pages_have_the_table_of_the_committed_records():
    assert not tables.outdated(tables.PAGES, tables.gpu_table(records.RESULTS))
    for path in tables.PAGES:
        text = path.read_text(encoding="utf-8")
        assert tables.gpu_table(records.RESULTS) in text


def test_the_table_reads_what_the_benchmark_writes():
    """Names of points that the table looks for are names that the plan has."""
    planned = {point.name for point in gpu.plan(gpu.TINY, "bf16", {"24gb": {}, "8gb": {}})}
    assert set(example()["points"]) | set(example()["not_measured"]) <= planned
    assert set(example()["measures"]) <= set(gpu.GOALS)

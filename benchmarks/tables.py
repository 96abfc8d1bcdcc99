"""What Stable Diffusion costs on a GPU as a table, from the records of `benchmarks.gpu`: `python -m benchmarks.tables`

It stands in site/using.md and benchmarks/README.md between two marks, and a test compares it with the records.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import records
from benchmarks.gpu import NAME
from benchmarks.gpu_model import SD
from helpers.base.paths import ROOT

BEGIN, END = "<!-- gpu-table -->", "<!-- /gpu-table -->"
NOTHING = "Not yet measured: no run of `python -m benchmarks.gpu` on a CUDA GPU has been recorded."
PAGES = (ROOT / "site" / "using.md", ROOT / "benchmarks" / "README.md")
RUNGS_HEAD = (
    "| variant of the preset | peak of training, GB | peak of validation, GB | a step, s | the homework, min |",
    "| --- | --- | --- | --- | --- |",
)
SPEED_HEAD = ("| pictures a second | the course | stock | times as fast |", "| --- | --- | --- | --- |")


def gpu_table(results: Path) -> str:
    """One block in Markdown for each CUDA GPU with a record, or one sentence where there is none.

    Runs on a CPU and runs of a tiny model are left out: they only try the program.
    """
    found = [records.read_results(path).get(NAME) for path in sorted(results.glob("*.json"))]
    real = [record for record in found if record and record["memory_bytes"] and record["settings"]["model"] == SD]
    return "\n\n".join(block(record) for record in real) or NOTHING


def block(record: dict) -> str:
    """What one GPU needs: memory and time of each variant, the comparisons with stock, and what was not measured."""
    versions = record["versions"]
    title = f"**{record['device_name']}**, {record['memory_bytes'] / 1e9:.1f} GB"
    title += f" (torch {versions['torch']}, CUDA {versions['cuda']}, diffusers {versions['diffusers']})"
    rungs = [name for name, point in all_points(record).items() if name.startswith("memory ")]
    parts = [
        title,
        "\n".join([*RUNGS_HEAD, *(rung_row(record, name) for name in rungs)]),
        "\n".join([*SPEED_HEAD, *speed_rows(record)]),
        ceiling_line(record),
        *left_out(record),
    ]
    return "\n\n".join(part for part in parts if part)


def all_points(record: dict) -> dict[str, dict | str]:
    """What was measured and, in words, why the rest was not."""
    return record["points"] | record["not_measured"]


def rung_row(record: dict, name: str) -> str:
    """Peak memory, seconds of a step of 8 pictures, and minutes of the homework with one variant."""
    point, title = all_points(record)[name], name.removeprefix("memory ")
    if isinstance(point, str):
        return f"| {title} | {point} | | | |"
    training, validation = (gigabytes(point[phase]) for phase in ("training", "validation"))
    homework = record["homework"].get(name)
    minutes = f"{homework['whole'] / 60:.0f}" if homework else "unknown"
    return f"| {title} | {training} | {validation} | {point['training']['step_seconds']:.3f} | {minutes} |"


def gigabytes(peaks: dict) -> str:
    """What tensors took, and in brackets what PyTorch's allocator held: 10^9 bytes."""
    return f"{peaks['peak_allocated'] / 1e9:.1f} ({peaks['peak_reserved'] / 1e9:.1f})"


def speed_rows(record: dict) -> list[str]:
    """Training and sampling beside stock, as far as both sides were measured."""
    rows, points = [], record["points"]
    stock = points.get("stock loop, batch 4")
    ours = {
        "caching_vs_stock": ("training, batch 4, latents from the cache", "rank 16, batch 4"),
        "compile_vs_stock": ("the same with torch.compile", "compile, batch 4"),
    }
    for measure, (title, name) in ours.items():
        if measure in record["measures"]:
            value = record["measures"][measure]["value"]
            rates = f"{points[name]['pictures_per_second']:.2f} | {stock['pictures_per_second']:.2f}"
            rows.append(f"| {title} | {rates} | {value:.2f} |")
    for name, point in points.items():
        if point["kind"] == "sampling":
            rows.append(f"| {name} | {point['ours']:.2f} | {point['stock']:.2f} | {point['ratio']:.2f} |")
    return rows


def ceiling_line(record: dict) -> str:
    """How much of the matrix product's rate a training step reaches; empty where that was not measured."""
    share = record["measures"].get("share_of_ceiling_at_batch_16")
    if not share:
        return ""
    compiled = f", and {100 * share['with_compile']:.0f}% with torch.compile" if share["with_compile"] else ""
    ceiling = record["ceiling_operations_per_second"] / 1e12
    return (
        f"At batch 16 a step executes {100 * share['value']:.0f}% of the operations a second of a large matrix product "
        f"({ceiling:.0f} TFLOP/s in {record['precision']}){compiled}."
    )


def left_out(record: dict) -> list[str]:
    """One sentence that names what was not measured besides the variants, if there is anything."""
    others = [f"{name} ({why})" for name, why in record["not_measured"].items() if not name.startswith("memory ")]
    return [f"Not measured: {'; '.join(others)}."] if others else []


# --- the pages ---------------------------------------------------------------------------------------------------


def with_table(page: str, table: str) -> str:
    """The page with the table between its two marks. Raises ValueError unless it has each mark once, in order."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"the page needs {BEGIN} and {END} once each, in this order")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def outdated(pages: tuple[Path, ...], table: str) -> dict[Path, str]:
    """{page: what it should say} of those that say something else."""
    texts = {path: path.read_text(encoding="utf-8") for path in pages}
    wanted = {path: with_table(text, table) for path, text in texts.items()}
    return {path: text for path, text in wanted.items() if text != texts[path]}


def main(argv: list[str] | None = None, pages: tuple[Path, ...] = PAGES, results: Path = records.RESULTS) -> int:
    """Exit status 1 when --check finds a page that is not up to date; without it the pages are rewritten."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only tell: exit status 1 if a page is not up to date")
    check = parser.parse_args(argv).check
    changed = outdated(pages, gpu_table(results))
    for path, text in changed.items():
        print(f"{path.name}: {'not up to date' if check else 'written'}")
        if not check:
            path.write_text(text, encoding="utf-8", newline="\n")
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(main())

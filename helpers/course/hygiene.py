"""Committed notebooks are clean: executed as a whole, with nothing of the machine they ran on, and small."""

from __future__ import annotations

import base64
import io
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from PIL import Image

from helpers.course.figures import jpeg
from helpers.course.notebooks import execute, read, write
from helpers.course.results import output_folder

MAX_BYTES = 1_000_000
MAX_CELL_LINES = 40


def refresh(path: Path, environment: dict[str, str] | None = None) -> list[str]:
    """Executes a committed notebook in place with its own defaults, cleans it, and returns what is still wrong.

    The file is replaced only when every cell succeeded.
    """
    work = output_folder("mini").parent / "refresh" / path.name
    try:
        execute(path, work, {}, environment)
        notebook = clean(read(work))
    finally:
        shutil.rmtree(work.parent, ignore_errors=True)
    write(notebook, path)
    return problems(path)


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Removes what belongs to one execution or machine, turns pictures into JPEG, and numbers the cells from 1."""
    for name in ("papermill", "widgets"):
        notebook.metadata.pop(name, None)
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata["language_info"] = {"name": "python"}
    count = 0
    for cell in notebook.cells:
        for name in ("papermill", "execution", "collapsed", "scrolled", "ExecuteTime"):
            cell.metadata.pop(name, None)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if cell.cell_type != "code":
            continue
        executed = bool(cell.source.strip())
        count += executed
        cell.execution_count = count if executed else None
        cell.outputs = [_clean_output(output, count) for output in cell.outputs]
    return notebook


def _clean_output(output: nbformat.NotebookNode, count: int) -> nbformat.NotebookNode:
    if output.output_type == "execute_result":
        output.execution_count = count
    data = output.get("data", {})
    data.pop("application/vnd.jupyter.widget-view+json", None)
    if "image/png" in data:
        with Image.open(io.BytesIO(base64.b64decode(data.pop("image/png")))) as picture:
            data["image/jpeg"] = base64.b64encode(jpeg(picture)).decode()
        if "image/png" in output.metadata:
            output.metadata["image/jpeg"] = output.metadata.pop("image/png")
    return output


# A path below one of the usual top folders, unless it continues a word (as in a web address), or a Windows drive.
_ABSOLUTE = re.compile(r"(?<![\w.:/-])/(?:home|root|work|tmp|Users|usr|opt|var|mnt|private|media|srv)/|\b[A-Z]:\\\w")
_NO_ALT = re.compile(r"!\[\s*\]\(")


def problems(path: Path | str) -> list[str]:
    """Everything that keeps a notebook from being committed, one sentence each.

    Rules: at most 1 MB; a cell tagged `parameters`; no papermill or widget metadata; code cells of at most 40 lines,
    executed 1, 2, 3 … in order; no errors, nothing on stderr, no widgets, no absolute paths in what was typed or
    printed; pictures as JPEG, diagrams as SVG, each with an alt text.
    """
    path = Path(path)
    notebook = read(path)
    found = []
    if path.stat().st_size > MAX_BYTES:
        found.append(f"the file has {path.stat().st_size / 1e6:.2f} MB; at most 1 MB")
    if not any("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells if cell.cell_type == "code"):
        found.append("no code cell is tagged `parameters`")
    for name in ("papermill", "widgets"):
        if name in notebook.metadata:
            found.append(f"the metadata has {name!r}")
    expected = 0
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "code" and cell.source.strip():
            expected += 1
        found += [f"cell {number}: {problem}" for problem in _cell_problems(cell, expected)]
    return found


def _cell_problems(cell: nbformat.NotebookNode, expected: int) -> Iterator[str]:
    if "papermill" in cell.metadata:
        yield "its metadata has 'papermill'"
    if _ABSOLUTE.search(cell.source):
        yield "its source has an absolute path"
    if cell.cell_type == "markdown" and _NO_ALT.search(cell.source):
        yield "a picture without alt text"
    if cell.cell_type != "code":
        return
    lines = cell.source.count("\n") + 1
    if lines > MAX_CELL_LINES:
        yield f"{lines} lines of code; at most {MAX_CELL_LINES}"
    if cell.source.strip() and cell.execution_count != expected:
        yield f"its execution count is {cell.execution_count}, not {expected}"
    for output in cell.outputs:
        yield from _output_problems(output)


def _output_problems(output: nbformat.NotebookNode) -> Iterator[str]:
    if output.output_type == "error":
        yield f"an error output ({output.get('ename', 'unknown')})"
        return
    if output.output_type == "stream":
        if output.name == "stderr":
            yield "output on stderr"
        if _ABSOLUTE.search(output.text):
            yield "its output has an absolute path"
        return
    data, metadata = output.get("data", {}), output.get("metadata", {})
    if "application/vnd.jupyter.widget-view+json" in data:
        yield "a widget in its output"
    if any(_ABSOLUTE.search(text) for kind, text in data.items() if kind.startswith("text/") and isinstance(text, str)):
        yield "its output has an absolute path"
    for kind in data:
        if not kind.startswith("image/"):
            continue
        if kind not in ("image/jpeg", "image/svg+xml"):  # vectors are diagrams
            yield f"a picture as {kind} instead of image/jpeg"
        text = data.get("text/plain", "")
        alt = metadata.get(kind, {}).get("alt") or ("" if text.startswith("<") else text)
        if not alt.strip():
            yield "a picture without alt text"


def main(arguments: list[str]) -> int:
    """Names what keeps notebooks from being committed: `python -m helpers.course.hygiene FILE…`. Status 1 for any."""
    found = [f"{path}: {problem}" for path in arguments for problem in problems(path)]
    print("\n".join(found) or f"{len(arguments)} notebooks, no problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

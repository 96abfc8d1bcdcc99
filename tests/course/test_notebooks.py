"""The committed notebooks are clean and complete; every rule of hygiene can fail; refreshing repairs what it should."""

import ast
import base64
import copy
import importlib
import io
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from helpers.base.errors import CourseError
from helpers.base.paths import ROOT
from helpers.course import hygiene, notebooks
from helpers.course.hygiene import clean, problems
from helpers.course.results import approx

COMMITTED = notebooks.committed()


def test_the_seven_notebooks_are_there():
    assert [path.name[:2] for path in COMMITTED][:7] == ["01", "02", "03", "04", "05", "06", "07"]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_notebooks_are_clean(path):
    assert problems(path) == []


def code_of(notebook) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_every_helper_a_notebook_imports_exists(path):
    assert missing_helpers(code_of(notebooks.read(path))) == []


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_every_notebook_takes_the_preset(path):
    expected = {"PRESET": "'mini'"} | ({"FROM_SCRATCH": "False"} if path.name.startswith("04") else {})
    found = {name: default.replace('"', "'") for name, default in notebooks.parameters(path).items()}
    assert expected.items() <= found.items()


def missing_helpers(code: str) -> list[str]:
    """Names that the code takes from helpers, by import or as an attribute of an imported module, and that are not."""
    missing, modules = [], {}
    tree = ast.parse("\n".join(line for line in code.splitlines() if not line.lstrip().startswith(("%", "!"))))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias for alias in node.names if alias.name.split(".")[0] == "helpers"]
            modules |= {alias.asname: importlib.import_module(alias.name) for alias in names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "helpers":
            for alias in node.names:
                found = imported(node.module, alias.name)
                if found is None:
                    missing.append(f"{node.module}.{alias.name}")
                elif type(found).__name__ == "module":
                    modules[alias.asname or alias.name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            if not hasattr(modules[node.value.id], node.attr):
                missing.append(f"{modules[node.value.id].__name__}.{node.attr}")
    return missing


def imported(module: str, name: str):
    try:
        parent = importlib.import_module(module)
        return getattr(parent, name) if hasattr(parent, name) else importlib.import_module(f"{module}.{name}")
    except ImportError:
        return None


def shown_imports(path) -> list[str]:
    """The import lines of a notebook's first cell that imports from helpers, folded cells aside."""
    cells = [cell for cell in notebooks.read(path).cells if cell.cell_type == "code" and "from helpers" in cell.source]
    shown = [cell for cell in cells if "hide-input" not in cell.metadata.get("tags", [])]
    return [line for line in shown[0].source.splitlines() if line.startswith(("import ", "from "))]


# What records, hashes, locks or measures the course itself.
BOOKKEEPING = (
    *("Results", "approx", "exercise", "save_figure", "provenance", "tensor_hash", "atomic_path", "write_json_atomic"),
    *("locked", "Tracker", "Progress", "Run", "run_config", "config_key", "disk_errors", "memory_errors"),
)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_notebook_begins_with_what_it_teaches(path):
    lines = shown_imports(path)
    assert 3 <= len(lines) <= 12
    names = set(re.findall(r"\w+", " ".join(line.partition(" import ")[2] for line in lines)))
    assert not names & set(BOOKKEEPING)
    assert not [line for line in lines if line.endswith("(")], "one line a room"


def test_missing_helpers_are_found():
    assert (
        missing_helpers("from helpers.course.results import approx\nfrom helpers.course import figures\nfigures.grid")
        == []
    )
    assert missing_helpers("from helpers.course.results import gone") == ["helpers.course.results.gone"]
    assert missing_helpers("from helpers.course import figures as f\nf.gone()") == ["helpers.course.figures.gone"]
    assert missing_helpers("from helpers.nowhere import x") == ["helpers.nowhere.x"]


# ------------------------------------------------------------------------------------------------ rules can fail
def picture_bytes(format: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, format=format)
    return base64.b64encode(buffer.getvalue()).decode()


def sound() -> nbformat.NotebookNode:
    """A notebook without problems: text, parameters, a printed line and a picture."""
    picture = new_output("display_data", {"image/jpeg": picture_bytes("JPEG"), "text/plain": "a red square"})
    return new_notebook(
        cells=[
            new_markdown_cell("# Title\n![a red square](red.jpg) and https://example.org/home/x"),
            new_code_cell('PRESET = "mini"', metadata={"tags": ["parameters"]}, execution_count=1),
            new_code_cell("print('hello')", execution_count=2, outputs=[new_output("stream", text="hello\n")]),
            new_code_cell("picture", execution_count=3, outputs=[picture]),
        ]
    )


def write(notebook, folder):
    path = folder / "01_x.ipynb"
    notebooks.write(notebook, path)
    return path


def test_a_sound_notebook_has_no_problems(tmp_path):
    assert problems(write(sound(), tmp_path)) == []


def test_a_diagram_is_an_svg_with_words_beside_it(tmp_path):
    notebook = sound()
    notebook.cells[3].outputs[0].data = {"image/svg+xml": "<svg/>", "text/plain": "a red square"}
    assert problems(write(notebook, tmp_path)) == [] == problems(write(clean(notebook), tmp_path))


def set_count(nb):
    nb.cells[2].execution_count = 7


def not_executed(nb):
    nb.cells[3].execution_count = None


def no_parameters(nb):
    del nb.cells[1].metadata["tags"]


def error_output(nb):
    nb.cells[2].outputs = [new_output("error", ename="ValueError", evalue="x", traceback=[])]


def on_stderr(nb):
    nb.cells[2].outputs = [new_output("stream", name="stderr", text="warning")]


def path_in_stream(nb):
    nb.cells[2].outputs = [new_output("stream", text="saved to /home/someone/x.png")]


def path_in_data(nb):
    nb.cells[2].outputs = [new_output("display_data", {"text/plain": "PosixPath('/tmp/x')"})]


def path_in_source(nb):
    nb.cells[2].source = "open('/Users/someone/x')"


def windows_path(nb):
    nb.cells[2].source = "open(r'C:\\data')"


def long_cell(nb):
    nb.cells[2].source = "\n".join(["x = 1"] * 41)


def png(nb):
    nb.cells[3].outputs[0].data = {"image/png": picture_bytes("PNG"), "text/plain": "a red square"}


def svg_without_alt(nb):
    nb.cells[3].outputs[0].data = {"image/svg+xml": "<svg/>", "text/plain": "<Picture>"}


def no_alt(nb):
    nb.cells[3].outputs[0].data["text/plain"] = "<Figure size 8x8>"


def markdown_alt(nb):
    nb.cells[0].source = "![](red.jpg)"


def widget(nb):
    nb.cells[2].outputs = [new_output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}})]


def papermill_metadata(nb):
    nb.metadata["papermill"] = {"duration": 1}


def widget_metadata(nb):
    nb.metadata["widgets"] = {}


def papermill_cell(nb):
    nb.cells[2].metadata["papermill"] = {"duration": 1}


def large(nb):
    nb.cells[0].source = "x" * 1_000_001


BROKEN = {
    set_count: "execution count is 7, not 2",
    not_executed: "execution count is None, not 3",
    no_parameters: "tagged `parameters`",
    error_output: "error output (ValueError)",
    on_stderr: "stderr",
    path_in_stream: "output has an absolute path",
    path_in_data: "output has an absolute path",
    path_in_source: "source has an absolute path",
    windows_path: "source has an absolute path",
    long_cell: "41 lines",
    png: "image/png",
    no_alt: "without alt text",
    svg_without_alt: "without alt text",
    markdown_alt: "without alt text",
    widget: "widget",
    papermill_metadata: "'papermill'",
    widget_metadata: "'widgets'",
    papermill_cell: "'papermill'",
    large: "1.00 MB",
}


@pytest.mark.parametrize("breaking", BROKEN, ids=lambda f: f.__name__)
def test_every_rule_can_fail(breaking, tmp_path):
    notebook = sound()
    breaking(notebook)
    found = problems(write(notebook, tmp_path))
    assert len(found) == 1 and BROKEN[breaking] in found[0]


def test_the_command_names_what_is_wrong(tmp_path, capsys):
    path = write(sound(), tmp_path)
    assert hygiene.main([str(path)]) == 0 and capsys.readouterr().out == "1 notebooks, no problems\n"
    broken = sound()
    on_stderr(broken)
    assert hygiene.main([str(write(broken, tmp_path))]) == 1 and "stderr" in capsys.readouterr().out


REPAIRED = [set_count, not_executed, png, papermill_metadata, widget_metadata, papermill_cell, widget]


@pytest.mark.parametrize("breaking", REPAIRED, ids=lambda f: f.__name__)
def test_cleaning_repairs(breaking, tmp_path):
    notebook = sound()
    breaking(notebook)
    assert problems(write(clean(notebook), tmp_path)) == []


@pytest.mark.parametrize("breaking", [error_output, on_stderr, path_in_stream], ids=lambda f: f.__name__)
def test_cleaning_hides_nothing(breaking, tmp_path):
    notebook = sound()
    breaking(notebook)
    assert problems(write(clean(notebook), tmp_path))


def test_cleaning_twice_changes_nothing():
    once = clean(sound())
    assert clean(copy.deepcopy(once)) == once


def test_what_is_no_notebook_is_said_in_a_sentence(tmp_path):
    (tmp_path / "x.ipynb").write_text("not json")
    with pytest.raises(CourseError, match="x.ipynb is not a notebook"):
        notebooks.read(tmp_path / "x.ipynb")
    with pytest.raises(CourseError, match="there is no notebook"):
        notebooks.read(tmp_path / "y.ipynb")


# ------------------------------------------------------------------------------------------------------ sanitize
SANITIZE = ROOT / "notebooks" / "nbval_sanitize.cfg"


def rules() -> list[tuple[str, str]]:
    from nbval.plugin import get_sanitize_patterns

    return get_sanitize_patterns(SANITIZE.read_text(encoding="ascii"))


def sanitize(text: str) -> str:
    for regex, replacement in rules():
        text = re.sub(regex, replacement, text)
    return text


def test_every_sanitize_rule_is_read_and_has_a_replacement():
    lines = SANITIZE.read_text(encoding="ascii").splitlines()
    assert len(rules()) == sum(line.startswith("regex:") for line in lines) > 0
    assert all(regex.strip() and replacement.strip() for regex, replacement in rules())


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (f"style {approx(0.93)}", f"style {approx(0.87)}"),
        (f"| {approx(9.5, 1):>8} dB |", f"| {approx(27.25, 1):>8} dB |"),
        (f"x={approx(-0.5)},", f"x={approx(1234.5)},"),
        ("≈1,234", "≈7"),
        ("≈1.5e-07", "≈2e+03"),
    ],
)
def test_measured_numbers_compare_equal(first, second):
    assert sanitize(first) == sanitize(second)


@pytest.mark.parametrize(("first", "second"), [("0.93", "0.87"), ("≈0.93 dB", "≈0.93 s"), ("≈0.9 of 5", "≈0.9 of 6")])
def test_everything_else_is_still_compared(first, second):
    assert sanitize(first) != sanitize(second)

"""Code taught is code used: a definition in a notebook is the one in helpers, docstrings and comments aside.

Every function and class that a notebook defines under the name of one that a helpers module defines must have the
same syntax tree. So a lesson cannot drift from the library, and a name cannot mean two things in one course.
"""

import ast
import copy
from collections.abc import Iterator

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers.base.paths import ROOT
from helpers.course import notebooks

NOTEBOOKS = notebooks.committed()
MAX_LINES = 40  # a taught definition fits one cell
# What a lesson is about must be written in front of the reader, not imported.
MUST_TEACH = {
    "02": {
        *("LoRALayer", "LoRALinear", "LoRAConv2d", "find_targets", "wrap", "inject", "scaled", "compose"),
        *("delta_weight", "merge", "unmerge", "remove"),
    },
    "04": {"diffusion_target", "batch_indices", "draw_step", "part_loss", "training_step"},
    "08": {"shuffled_shares"},
    "09": {"loss_weights", "crossed_bootstrap"},
    "11": {"best_of_rank"},
}
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(body: list[ast.stmt]) -> Iterator[Definition]:
    """Functions and classes at the top level of some code, those inside `if`, `with`, `for` and `try` included."""
    for node in body:
        if isinstance(node, Definition):
            yield node
            continue
        for block in ("body", "orelse", "finalbody"):
            yield from definitions(getattr(node, block, []))
        for handler in getattr(node, "handlers", []):
            yield from definitions(handler.body)


def normal(node: Definition) -> str:
    """The definition's syntax tree as text, without any docstring in it."""
    node = copy.deepcopy(node)
    for inner in ast.walk(node):
        if isinstance(inner, Definition) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
    return ast.dump(node)


def python_of(source: str) -> ast.Module:
    """A cell's code; lines of IPython's own (%magic, !shell) count as empty."""
    lines = ["" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()]
    return ast.parse("\n".join(lines))


def taught(notebook) -> list[Definition]:
    """Every definition in the notebook's code cells, in order."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [node for cell in cells for node in definitions(python_of(cell.source).body)]


def library() -> dict[str, dict[str, str]]:
    """{name: {module: normal form}} of everything that the modules of helpers define at their top level."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted((ROOT / "helpers").rglob("*.py")):
        for node in definitions(ast.parse(path.read_text(encoding="utf-8")).body):
            found.setdefault(node.name, {})[path.relative_to(ROOT).as_posix()] = normal(node)
    return found


def drifted(notebook, known: dict[str, dict[str, str]]) -> list[str]:
    """One sentence for each definition that shares its name, but not its code, with one in helpers."""
    problems = []
    for node in taught(notebook):
        modules = known.get(node.name)
        if modules and normal(node) not in modules.values():
            problems.append(f"{node.name} is not the {node.name} of {', '.join(modules)}: copy it, or rename it")
    return problems


def shared(notebook, known: dict[str, dict[str, str]]) -> set[str]:
    """Names of the definitions that the notebook has in common with helpers."""
    return {node.name for node in taught(notebook)} & known.keys()


@pytest.fixture(scope="module")
def known():
    return library()


def numbered(number: str):
    found = [path for path in NOTEBOOKS if path.name.startswith(number)]
    assert found, f"there is no notebook {number}"
    return notebooks.read(found[0])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_taught_definitions_are_those_of_the_library(path, known):
    assert drifted(notebooks.read(path), known) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_taught_definitions_fit_a_cell(path, known):
    too_long = [
        node.name
        for node in taught(notebooks.read(path))
        if node.name in known and node.end_lineno - node.lineno + 1 > MAX_LINES
    ]
    assert too_long == []


@pytest.mark.parametrize("number", MUST_TEACH)
def test_lessons_write_their_subject_in_front_of_the_reader(number, known):
    missing = MUST_TEACH[number] - shared(numbered(number), known)
    assert not missing, f"notebook {number} no longer defines {', '.join(sorted(missing))}"


# --- the test itself can fail ------------------------------------------------------------------------------------


def altered(notebook, old: str, new: str):
    """A copy of the notebook with one piece of its code replaced, wherever it stands."""
    other = copy.deepcopy(notebook)
    hits = [cell for cell in other.cells if cell.cell_type == "code" and old in cell.source]
    assert hits, f"no cell has {old!r}"
    for cell in hits:
        cell.source = cell.source.replace(old, new)
    return other


@pytest.mark.parametrize(
    "old, new, name",
    [
        ("alpha / (math.sqrt(rank)", "alpha * (math.sqrt(rank)", "scaling_of"),
        ("nn.init.zeros_(self.lora_B.weight)", "nn.init.zeros_(self.lora_A.weight)", "LoRALayer"),
        ("lora_A = nn.Linear(base.in_features", "lora_A = nn.Linear(rank", "LoRALinear"),
        ("use_rslora: bool = False,\n    init", "use_rslora: bool = True,\n    init", "inject"),
        ("weight.float() + delta_weight(self)", "weight.float() - delta_weight(self)", "LoRALayer"),
        ("layer.merged_weight().to(weight.dtype)", "layer.merged_weight()", "merge"),
    ],
)  # fmt: skip
def test_a_changed_lesson_is_found(known, old, new, name):
    lesson = numbered("02")
    problems = drifted(altered(lesson, old, new), known)
    assert len(problems) == 1 and problems[0].startswith(f"{name} is not the {name} of helpers/lora/")


def test_every_taught_definition_is_watched(known):
    """Add one statement to each definition in turn: each time that one, and no other, is reported."""
    lesson = numbered("02")
    names = shared(lesson, known)
    assert len(names) >= len(MUST_TEACH["02"])
    for name in names:
        changed = {module: form.replace("body=[", "body=[Pass(), ", 1) for module, form in known[name].items()}
        problems = drifted(lesson, known | {name: changed})
        assert [problem.split()[0] for problem in problems] == [name]


def test_docstrings_comments_and_layout_do_not_count(known):
    cell = new_code_cell('def replace_module(model, name, module):\n    """Words."""  # more words\n    pass')
    assert len(drifted(new_notebook(cells=[cell]), known)) == 1
    path = ROOT / "helpers" / "lora" / "merging.py"
    node = next(n for n in ast.parse(path.read_text(encoding="utf-8")).body if getattr(n, "name", "") == "merge")
    node.body[0].value.value = "Other words."
    cell = new_code_cell("# a comment\n%matplotlib inline\n" + ast.unparse(node))
    assert drifted(new_notebook(cells=[new_markdown_cell("def merge(): no code"), cell]), known) == []


def test_definitions_inside_blocks_are_seen_and_names_of_ones_own_are_free(known):
    block = new_code_cell("if True:\n    with open('x'):\n        def merge(model):\n            return model")
    own = new_code_cell("def a_name_that_only_the_lesson_has(x):\n    def merge():\n        return x\n    return merge")
    assert [p.split()[0] for p in drifted(new_notebook(cells=[block, own]), known)] == ["merge"]

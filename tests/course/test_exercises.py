"""Exercises of the notebooks: stubs fail, solutions pass, and both are checked by the same lines."""

from __future__ import annotations

import ast
import contextlib
import io
import re

import pytest

from helpers.base.paths import ROOT
from helpers.course import notebooks
from helpers.course.exercises import exercise

SOLUTIONS = ROOT / "notebooks" / "solutions"
CHAPTERS = notebooks.committed()
NAMES = [path.stem for path in CHAPTERS]


def test_the_four_ends_of_an_exercise(capsys):
    def ends(error: Exception | None) -> str:
        with exercise("1.2"):
            if error:
                raise error
        return capsys.readouterr().out.strip()

    assert ends(None) == "exercise 1.2: solved"
    assert ends(NotImplementedError()) == "exercise 1.2: not solved yet"
    assert ends(AssertionError("too many")) == "exercise 1.2: not right yet: too many"
    assert ends(AssertionError()) == "exercise 1.2: not right yet: the check failed"
    assert ends(KeyError("x")) == "exercise 1.2: not right yet: KeyError: 'x'"
    with pytest.raises(KeyboardInterrupt), exercise("1.2"):
        raise KeyboardInterrupt


def exercise_cells(path) -> dict[str, str]:
    """{number: source} of a notebook's exercise cells."""
    cells = [cell.source for cell in notebooks.read(path).cells if cell.cell_type == "code"]
    found = [(re.findall(r'^with exercise\("([\d.]+)"\):', source, re.MULTILINE), source) for source in cells]
    assert all(len(numbers) <= 1 for numbers, _ in found)
    return {numbers[0]: source for numbers, source in found if numbers}


def check_of(source: str) -> str:
    """The `with exercise` block of a cell, as a syntax tree."""
    blocks = [node for node in ast.parse(source).body if isinstance(node, ast.With)]
    assert len(blocks) == 1
    return ast.dump(blocks[0])


def definitions(source: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def printed(source: str, names: dict) -> str:
    """What a cell prints when it runs in these global names."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(source, "<cell>", "exec"), names)
    return out.getvalue()


def answering_none(source: str) -> str:
    """The cell with every stub returning None at once."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and "NotImplementedError" in ast.dump(node):
            node.exc, node.cause = None, None
    return ast.unparse(tree).replace("raise\n", "return None\n").replace("raise", "return None")


@pytest.mark.parametrize("path", CHAPTERS, ids=NAMES)
def test_every_notebook_has_exercises_with_minutes_a_stub_and_a_hint(path):
    cells, chapter = exercise_cells(path), int(path.stem[:2])
    assert list(cells) == [f"{chapter}.{k + 1}" for k in range(len(cells))]
    assert 3 <= len(cells) <= 5
    text = [cell.source for cell in notebooks.read(path).cells if cell.cell_type == "markdown"]
    for number in cells:
        intro = next(source for source in text if re.search(rf"^### Exercise {re.escape(number)} ", source, re.M))
        assert re.search(r"\((easy|medium|hard), \d+ min\)", intro), number
        assert "<details><summary>Hint</summary>" in intro and f"solutions/{path.name}" in intro, number
        assert "raise NotImplementedError" in cells[number], number


@pytest.mark.parametrize("path", CHAPTERS, ids=NAMES)
def test_solutions_are_checked_by_the_same_lines(path):
    asked, solved = exercise_cells(path), exercise_cells(SOLUTIONS / path.name)
    assert list(asked) == list(solved)
    for number, source in asked.items():
        assert check_of(source) == check_of(solved[number]), number
        assert "NotImplementedError" not in solved[number], number
        stubs, answers = definitions(source), definitions(solved[number])
        for name, stub in stubs.items():
            assert ast.dump(stub.args) == ast.dump(answers[name].args), f"{number}: {name} takes other arguments"


@pytest.mark.parametrize("path", CHAPTERS, ids=NAMES)
def test_solutions_pass_and_stubs_fail(path, monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_OUTPUT", str(tmp_path))
    monkeypatch.setenv("COURSE_HEADLESS", "1")
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setattr("IPython.display.display", lambda *_, **__: None)  # outside of a kernel pictures are printed
    names: dict = {"__name__": "__main__"}
    asked = exercise_cells(path)
    for cell in notebooks.read(SOLUTIONS / path.name).cells:
        if cell.cell_type != "code":
            continue
        numbers = re.findall(r'^with exercise\("([\d.]+)"\):', cell.source, re.MULTILINE)
        if numbers:  # the reader's own state: nothing of the solution is defined yet
            before = dict(names)
            assert printed(asked[numbers[0]], before) == f"exercise {numbers[0]}: not solved yet\n"
            assert ": solved" not in printed(answering_none(asked[numbers[0]]), dict(names)), numbers[0]
        out = printed(cell.source, names)
        assert out == "".join(output.text for output in cell.outputs if output.output_type == "stream")
        if numbers:
            assert out.endswith(f"exercise {numbers[0]}: solved\n")

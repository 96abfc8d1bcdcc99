"""Every public name of the library says what it is for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from helpers.base.paths import ROOT

FILES = sorted((ROOT / "helpers").rglob("*.py"))


def undocumented(source: str) -> list[str]:
    """Public functions, classes and methods without a docstring, and "module" when the file itself has none."""
    tree, found = ast.parse(source), []
    if tree.body and ast.get_docstring(tree) is None:
        found.append("module")
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []
            public = [method for method in methods if not method.name.startswith("_")]
            found += [inner.name for inner in (node, *public) if ast.get_docstring(inner) is None]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT / "helpers").as_posix())
def test_every_public_name_is_documented(file: Path):
    assert undocumented(file.read_text(encoding="utf-8")) == []


def test_a_missing_docstring_is_found():
    source = '"""M."""\ndef f(): 1\nclass C:\n    """C."""\n    def m(self): 1\n    def _p(self): 1\ndef _g(): 1\n'
    assert undocumented(source) == ["f", "m"]
    assert undocumented("x = 1") == ["module"]

"""The house: rooms on floors, imports that only point down, and CONTRIBUTING.md's drawing of both.

`python tests/repo/test_house.py` prints the drawing as it should be.
"""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from helpers.base.paths import ROOT

HELPERS = ROOT / "helpers"
PAGE = ROOT / "CONTRIBUTING.md"
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
FLOORS = [re.split(r"\s*[|:]\s*", floor) for contract in CONTRACTS for floor in contract.get("layers", ())]
ROOMS = sorted(path.parent.name for path in HELPERS.glob("*/__init__.py"))


def modules(room: str) -> list[Path]:
    """The Python files of a room besides its `__init__`."""
    return sorted(path for path in (HELPERS / room).glob("*.py") if path.name != "__init__.py")


def imported_rooms(room: str) -> set[str]:
    """The other rooms that a room's files import from, anywhere in them."""
    found = set()
    for path in [*modules(room), HELPERS / room / "__init__.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "helpers":
                places = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {place.split(".")[1] for place in places}
    return (found & set(ROOMS)) - {room}


def purpose(room: str) -> str:
    """What a room is for: as many clauses of its docstring as fit into a box."""
    doc = ast.get_docstring(ast.parse((HELPERS / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    clauses = re.split(r"(?<=[,.:;])\s+", doc.splitlines()[0].replace("`", ""))
    fitting = [" ".join(clauses[:count]) for count in range(1, len(clauses) + 1)]
    return max((text for text in fitting if len(text) <= 64), key=len, default=clauses[0]).rstrip(",.:;")


def drawing() -> str:
    """The floors as a Mermaid flowchart. An arrow that others imply (a to b to c, and a to c) is left out."""
    below = {room: imported_rooms(room) for room in ROOMS}

    def reached(room: str) -> set[str]:
        return below[room].union(*(reached(other) for other in below[room]))

    lines = ["```mermaid", "flowchart TD"]
    for number, floor in enumerate(FLOORS):
        boxes = [f'        {room}["{room}<br/>{purpose(room)}"]' for room in floor]
        lines += [f'    subgraph floor{len(FLOORS) - number}[" "]', *boxes, "    end"]
    for room in (room for floor in FLOORS for room in floor):
        direct = [other for other in below[room] if not any(other in reached(via) for via in below[room] - {other})]
        lines += [f"    {room} --> {other}" for other in sorted(direct)]
    return "\n".join([*lines, "```"])


def test_the_page_shows_the_house_as_it_is():
    shown = re.search(r"```mermaid\n.*?```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert shown and shown[0] == drawing(), "paste what `python tests/repo/test_house.py` prints into CONTRIBUTING.md"


def test_every_place_that_the_page_names_is_there():
    named = set(re.findall(r"`((?:helpers|tests|notebooks|report|site|benchmarks|figures)/[\w./]*)`", PAGE.read_text()))
    assert len(named) > 20 and {place for place in named if not (ROOT / place).exists()} == set()


def test_every_heading_that_the_page_names_is_there():
    headings = re.findall(r"^#+ (.+)$", (ROOT / "site" / "using.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r'`site/using\.md`: .*under "([^"]+)"', PAGE.read_text(encoding="utf-8"))
    assert len(named) >= 2 and set(named) <= set(headings)


def test_rooms_are_few_and_small():
    entries = {path.name for path in HELPERS.iterdir()} - {"__init__.py", "__pycache__"}
    assert entries == set(ROOMS) and len(ROOMS) <= 15
    sizes = {room: len([path for path in modules(room) if path.name != "__main__.py"]) for room in ROOMS}
    assert {room: size for room, size in sizes.items() if size > 10} == {}
    assert not [path for room in ROOMS for path in (HELPERS / room).glob("*/*.py")], "rooms have no rooms inside"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_in_three_lines_what_it_is_for(room):
    doc = ast.get_docstring(ast.parse((HELPERS / room / "__init__.py").read_text(encoding="utf-8")))
    assert doc and len([line for line in doc.splitlines() if line.strip()]) <= 3


def test_tests_mirror_the_rooms():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert set(ROOMS) <= folders
    assert folders - set(ROOMS) == {"benchmarks", "browser", "parity", "repo"}, "see CONTRIBUTING.md"


# --- the contract -------------------------------------------------------------------------------------------------


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_imports_point_down_and_never_in_a_circle():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout


SMALL = """
[tool.importlinter]
root_package = "small"
[[tool.importlinter.contracts]]
name = "floors"
type = "layers"
containers = ["small"]
layers = ["top", "ground"]
[[tool.importlinter.contracts]]
name = "circles"
type = "acyclic_siblings"
ancestors = ["small", "small.*"]
"""
SOUND = {"top/a.py": "from small.ground import b", "ground/b.py": "", "ground/c.py": "from small.ground import b"}
FAULTS = {
    "none": ({}, ""),
    "an import that points up": ({"ground/b.py": "from small.top import a", "top/a.py": ""}, "floors BROKEN"),
    "a circle in a room": ({"ground/b.py": "from small.ground import c"}, "circles BROKEN"),
    "one for types alone": (
        {"ground/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from small.top import a"},
        "floors BROKEN",
    ),
    "one inside a function": ({"ground/b.py": "def f():\n    from small.ground import c"}, "circles BROKEN"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_contract_fails_on_a_wrong_import(tmp_path, fault):
    changes, complaint = FAULTS[fault]
    files = {"__init__.py": "", "top/__init__.py": "", "ground/__init__.py": ""} | SOUND | changes
    for name, source in files.items():
        (tmp_path / "small" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "small" / name).write_text(source + "\n")
    (tmp_path / "pyproject.toml").write_text(SMALL)
    done = lint_imports(tmp_path)
    assert (done.returncode != 0) is bool(complaint) and complaint in done.stdout, done.stdout


if __name__ == "__main__":
    print(drawing())

"""The glossary and the links to it: none is dead, every term is used, and every chapter links its terms."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers.base.paths import ROOT
from helpers.course import notebooks

FOLDER = ROOT / "notebooks"
GLOSSARY = FOLDER / "glossary.md"
CHAPTERS = notebooks.committed()
LINK = re.compile(r"\]\(((?!https?:|#|mailto:|data:|attachment:)[^)\s]+)\)")


def slug(heading: str) -> str:
    """The anchor that GitHub and the site give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(markdown: str) -> list[str]:
    return [slug(heading) for heading in re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)]


def terms() -> list[str]:
    return [slug(term) for term in re.findall(r"^### (.+)$", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE)]


def dead_links(text: str, folder: Path) -> list[str]:
    """Links of a Markdown text in a folder that lead to no file of the repository, or to no heading of a page."""
    dead = []
    for link in LINK.findall(text):
        target, _, anchor = link.partition("#")
        file = folder / target
        if not file.exists():
            dead.append(link)
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text(encoding="utf-8")):
            dead.append(link)
    return dead


def prose(path: Path) -> str:
    return "\n\n".join(cell.source for cell in notebooks.read(path).cells if cell.cell_type == "markdown")


def test_dead_links_are_found(tmp_path):
    (tmp_path / "page.md").write_text("# One thing\n### U-Net & more\n")
    sound = "[a](page.md#one-thing) [b](page.md#u-net--more) [c](https://example.org/x) [d](page.md)"
    assert dead_links(sound, tmp_path) == []
    assert dead_links("[a](page.md#two) [b](gone.ipynb)", tmp_path) == ["page.md#two", "gone.ipynb"]


ALL = [*CHAPTERS, *sorted((FOLDER / "solutions").glob("*.ipynb")), FOLDER / "playground.ipynb"]


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_no_notebook_has_a_dead_link(path):
    assert dead_links(prose(path), path.parent) == []


PAGES = ["README.md", "CONTRIBUTING.md", "notebooks/glossary.md", "benchmarks/README.md", "site/using.md"]
PAGES += ["site/out_of_scope.md"]


@pytest.mark.parametrize("name", PAGES)
def test_no_page_has_a_dead_link(name):
    assert dead_links((ROOT / name).read_text(encoding="utf-8"), (ROOT / name).parent) == []


def linked(path: Path) -> set[str]:
    return set(re.findall(r"\(glossary\.md#([\w-]+)\)", prose(path)))


def test_every_chapter_links_its_terms_and_every_term_has_a_place():
    """A term that no chapter links is mentioned with its notebook: the entry says where the reader meets it."""
    text = GLOSSARY.read_text(encoding="utf-8")
    assert len(terms()) == len(set(terms())) >= 70
    for path in CHAPTERS:
        assert len(linked(path)) >= 5, path.name
    entries = dict(re.findall(r"^### (.+)\n(.+)$", text, re.MULTILINE))
    unlinked = set(terms()) - set().union(*map(linked, CHAPTERS))
    placed = {slug(term) for term, entry in entries.items() if re.search(r"Notebooks? \d\d|The report's", entry)}
    assert unlinked <= placed


def test_links_inside_the_glossary_lead_to_its_terms():
    text = GLOSSARY.read_text(encoding="utf-8")
    inside = re.findall(r"\]\(#([\w-]+)\)", text)
    assert len(inside) > 20 and set(inside) <= set(anchors(text))


def test_each_symbol_has_one_row():
    table = GLOSSARY.read_text(encoding="utf-8").split("## Symbols")[1]
    symbols = [symbol for row in re.findall(r"^\| (\$.+?) \|", table, re.MULTILINE) for symbol in row.split(", ")]
    assert len(symbols) == len(set(symbols)) >= 25

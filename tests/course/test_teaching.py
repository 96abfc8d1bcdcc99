"""The shape of a lesson: an image first, short cells, few words to a line of code, core and optional parts, takeaways.

`python tests/course/test_teaching.py` prints what each notebook measures. How it is measured:

- A code cell is visible unless it is tagged `hide-input`. Its lines are those that are not blank.
- Words are those of Markdown cells: a formula is one, a link is its text; comments and fenced code are none.
- An exercise makes an image, or trains, if its cell is tagged `makes-image` or `trains`; its solution must do so.
- What an opening shows can be seen in executed notebooks alone; a notebook with a cell not executed is skipped there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from helpers.base.paths import ROOT
from helpers.course import notebooks

CHAPTERS = [path for path in notebooks.committed() if re.match(r"(0\d|10|11)_", path.name)]

WORDS_PER_LINE = (6, 12)
CORE_WORDS = 2500
CELL_LINES = 40
IMPORT_LINES = 12
OPENING_WORDS = 200  # before the first image
OPENING_LINES = 4  # that may be printed before it
PLUMBING = {  # in the first seven notebooks
    "approx": r"\bapprox\b",
    "record(": r"\brecord\(",
    "TRIAL": r"\bTRIAL\b",
    "FULL_SIZE": r"\bFULL_SIZE\b",
    "tolerance=": r"\btolerance\s*=(?!=)",
}
# Sections that need no mark: what closes a lesson.
UNMARKED = ("takeaways", "exercises", "further reading", "references", "solutions", "next", "limits")
MARK = re.compile(r"\((core|optional)\)\s*$")


@dataclass
class Section:
    """A part of a notebook under a heading of level two, or what stands before the first one (title "")."""

    title: str
    texts: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """ "core", "optional" or "" (unmarked). The opening is core."""
        mark = MARK.search(self.title)
        return mark[1] if mark else "" if self.title else "core"


@dataclass
class Lesson:
    """A notebook, its number and its solutions."""

    number: int
    cells: list[nbformat.NotebookNode]
    solutions: list[nbformat.NotebookNode] = field(default_factory=list)

    @property
    def markdown(self) -> list[str]:
        return [cell.source for cell in self.cells if cell.cell_type == "markdown"]

    @property
    def visible(self) -> list[tuple[int, str]]:
        """(number of the cell, source) of each code cell that a reader sees."""
        return [
            (number, cell.source)
            for number, cell in enumerate(self.cells, start=1)
            if cell.cell_type == "code" and "hide-input" not in tags(cell) and cell.source.strip()
        ]

    @property
    def sections(self) -> list[Section]:
        found = [Section("")]
        for source in self.markdown:
            for kind, text in pieces(source):
                if kind == 2:
                    found.append(Section(text))
                else:
                    found[-1].texts.append(text)
        return found


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def pieces(source: str) -> Iterator[tuple[int, str]]:
    """(level of the heading or 0, the heading or one line of text); fenced code is left out."""
    fenced = False
    for line in source.splitlines():
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        elif not fenced:
            heading = re.match(r"(#{1,6}) +(.*)", line)
            yield (len(heading[1]), heading[2].strip()) if heading else (0, line)


def lines(source: str) -> int:
    return sum(bool(line.strip()) for line in source.splitlines())


def words(source: str) -> int:
    """Words that a reader reads."""
    text = re.sub(r"<!--.*?-->", " ", source, flags=re.DOTALL)
    text = "\n".join(line for _, line in pieces(text))
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", " formula ", text, flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"<[^>]+>", " ", text)
    return len([word for word in text.split() if re.search(r"\w", word)])


# ----------------------------------------------------------------------------------------------------------- rules
def few_words_to_a_line_of_code(lesson: Lesson) -> Iterator[str]:
    said, code = sum(map(words, lesson.markdown)), sum(lines(source) for _, source in lesson.visible)
    least, most = WORDS_PER_LINE
    if not code or not least <= said / code <= most:
        yield f"{said} words to {code} lines of code ({said / max(code, 1):.1f}): {least} to {most} are wanted"


def short_cells(lesson: Lesson) -> Iterator[str]:
    for number, source in lesson.visible:
        if len(source.splitlines()) > CELL_LINES:
            yield f"cell {number} has {len(source.splitlines())} lines: at most {CELL_LINES}"


def few_imports(lesson: Lesson) -> Iterator[str]:
    for number, source in lesson.visible:
        imports = sum(line.startswith(("import ", "from ")) for line in source.splitlines())
        if imports and max(imports, lines(source) if imports > lines(source) / 2 else 0) > IMPORT_LINES:
            yield f"cell {number} imports in {lines(source)} lines: at most {IMPORT_LINES}"


def no_plumbing(lesson: Lesson) -> Iterator[str]:
    for number, source in lesson.visible if lesson.number <= 7 else []:
        for name, pattern in PLUMBING.items():
            if re.search(pattern, source):
                yield f"cell {number} shows {name}"


def three_takeaways(lesson: Lesson) -> Iterator[str]:
    found = [section for section in lesson.sections if section.title.lower() == "takeaways"]
    if len(found) != 1:
        yield f"{len(found)} sections are called Takeaways"
        return
    items = [line for line in found[0].texts if re.match(r"([-*+]|\d+[.)]) +\S", line)]
    if len(items) != 3:
        yield f"{len(items)} takeaways: three are wanted"
    after = lesson.sections[lesson.sections.index(found[0]) + 1 :]
    yield from (f"{section.title!r} comes after the takeaways" for section in after if section.kind)


def marked_sections(lesson: Lesson) -> Iterator[str]:
    for section in lesson.sections[1:]:
        if not section.kind and not section.title.lower().startswith(UNMARKED):
            yield f"{section.title!r} is neither (core) nor (optional)"
    if not any(section.kind == "core" for section in lesson.sections[1:]):
        yield "no section is (core)"


def short_core(lesson: Lesson) -> Iterator[str]:
    said = core_words(lesson)
    if said > CORE_WORDS:
        yield f"the core has {said} words: at most {CORE_WORDS}"


def core_words(lesson: Lesson) -> int:
    """Words of core sections, without what a heading of a lower level marks as optional."""
    counted, kind, optional = [], "core", 0
    for source in lesson.markdown:
        for level, text in pieces(source):
            if level == 2:
                kind, optional = Section(text).kind, 0
            elif level and (not optional or level <= optional):
                optional = level if text.endswith("(optional)") else 0
            if kind == "core" and not optional:
                counted.append(text)
    return words("\n".join(counted))


def image_first(lesson: Lesson) -> Iterator[str]:
    if any(cell.execution_count is None for cell in lesson.cells if cell.cell_type == "code" and cell.source.strip()):
        pytest.skip("has cells that were not executed")
    said = printed = headings = 0
    for cell in lesson.cells:
        if cell.cell_type == "markdown":
            if re.search(r"!\[[^\]]*\]\(", cell.source):
                break
            said += words(cell.source)
            headings += sum(level == 2 for level, _ in pieces(cell.source))
            continue
        if any(kind in IMAGES for output in cell.outputs for kind in output.get("data", {})):
            break
        printed += sum(lines(shown_text(output)) for output in cell.outputs)
    else:
        yield "no image is shown"
        return
    if headings > 1:
        yield "a whole section comes before the first image"
    if said > OPENING_WORDS:
        yield f"{said} words come before the first image: at most {OPENING_WORDS}"
    if printed > OPENING_LINES:
        yield f"{printed} lines are printed before the first image: at most {OPENING_LINES}"


IMAGES = ("image/jpeg", "image/png", "image/webp", "image/gif")  # an SVG is a diagram, no result


def shown_text(output: nbformat.NotebookNode) -> str:
    data = output.get("data", {})
    return output.get("text") or data.get("text/markdown") or data.get("text/plain") or ""


EXERCISE = re.compile(r'^with exercise\("([\d.]+)"\):', re.MULTILINE)
DOES = {
    "makes-image": r"\b(show\w*|display)\(",
    "trains": r"\.backward\(|\btrain\w*\(",
}


def an_exercise_that_makes_something(lesson: Lesson) -> Iterator[str]:
    asked, solved = (
        {found[1]: cell for cell in cells if cell.cell_type == "code" and (found := EXERCISE.search(cell.source))}
        for cells in (lesson.cells, lesson.solutions)
    )
    tagged = [(number, tag) for number, cell in asked.items() for tag in tags(cell) if tag in DOES]
    if not tagged:
        yield f"no exercise's cell is tagged {' or '.join(DOES)}"
    for number, tag in tagged:
        if number not in solved or not re.search(DOES[tag], solved[number].source):
            yield f"exercise {number} is tagged {tag}, which its solution does not do"


def nothing_left_to_verify(lesson: Lesson) -> Iterator[str]:
    for number, cell in enumerate(lesson.cells, start=1):
        for note in re.findall(r"<!--\s*verify.*?(?:-->|$)", cell.source, re.DOTALL):
            yield f"cell {number}: {note}"


RULES: tuple[Callable[[Lesson], Iterator[str]], ...] = (
    few_words_to_a_line_of_code,
    short_cells,
    few_imports,
    no_plumbing,
    three_takeaways,
    marked_sections,
    short_core,
    image_first,
    an_exercise_that_makes_something,
    nothing_left_to_verify,
)


# -------------------------------------------------------------------------------------------------------- notebooks
def lesson_of(path) -> Lesson:
    solutions = ROOT / "notebooks" / "solutions" / path.name
    solved = notebooks.read(solutions).cells if solutions.exists() else []
    return Lesson(int(path.name[:2]), notebooks.read(path).cells, solved)


@pytest.mark.parametrize("rule", RULES[:-1], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_lesson_has_the_shape_of_one(path, rule):
    assert list(rule(lesson_of(path))) == []


@pytest.mark.after_run
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_nothing_is_left_to_verify(path):
    """What prose says of outcomes that were not known when it was written is marked; after the run none is left."""
    assert list(nothing_left_to_verify(lesson_of(path))) == []


# --------------------------------------------------------------------------------------------------- rules can fail
def sound() -> Lesson:
    """A small lesson that keeps every rule."""
    picture = new_output("display_data", {"image/jpeg": "", "text/plain": "a cat"})
    code = new_code_cell("\n".join(f"x{number} = {number}" for number in range(10)), execution_count=5)
    exercise = new_code_cell('with exercise("1.1"):\n    draw()', metadata={"tags": ["makes-image"]}, execution_count=6)
    cells = [
        new_markdown_cell("# 01 A lesson\n" + "word " * 20),
        new_code_cell('PRESET = "mini"', metadata={"tags": ["parameters"]}, execution_count=1),
        new_code_cell("approx(record(TRIAL))\n" * 50, metadata={"tags": ["hide-input"]}, execution_count=2),
        new_code_cell("import torch\nfrom helpers.course import show", execution_count=3),
        new_code_cell("show(cat)", execution_count=4, outputs=[picture]),
        new_markdown_cell("## 1 The idea (core)\n" + "word " * 60),
        code,
        new_markdown_cell("### Aside (optional)\n" + "word " * 10),
        new_markdown_cell("## 2 More (optional)\n" + "word " * 20),
        new_markdown_cell("## Takeaways\n- One.\n- Two.\n  More of two.\n- Three.\n\n## Exercises\n### Exercise 1.1"),
        exercise,
        new_markdown_cell("## Further reading"),
    ]
    return Lesson(1, cells, [new_code_cell('def draw():\n    show(1)\nwith exercise("1.1"):\n    draw()')])


def wordy(lesson):
    lesson.cells[8].source += "word " * 300


def terse(lesson):
    for number in (0, 5, 8):
        lesson.cells[number].source = lesson.cells[number].source.splitlines()[0]


def long_cell(lesson):
    lesson.cells[3].source = "x = 1\n" * 41
    wordy(lesson)


def many_imports(lesson):
    lesson.cells[3].source = "\n".join(f"import a{number}" for number in range(13))


def imports_and_more(lesson):
    lesson.cells[3].source = "import a\n" * 7 + "x = 1\n" * 6


def shows(text: str):
    def showing(lesson):
        lesson.cells[6].source += f"\n{text}"

    showing.__name__ = f"shows_{text}"
    return showing


def no_takeaways(lesson):
    lesson.cells[9].source = "## Exercises"


def four_takeaways(lesson):
    lesson.cells[9].source = lesson.cells[9].source.replace("- Three.", "- Three.\n- Four.")


def core_after_takeaways(lesson):
    lesson.cells[11].source = "## 3 Late (core)"


def unmarked(lesson):
    lesson.cells[8].source = lesson.cells[8].source.replace(" (optional)", "")


def nothing_core(lesson):
    lesson.cells[5].source = lesson.cells[5].source.replace("(core)", "(optional)")


def long_core(lesson):
    lesson.cells[5].source += "\n" + "word " * CORE_WORDS
    lesson.cells[6].source = "x = 1\n" * 40
    lesson.cells[6:6] = [lesson.cells[6]] * 6


def no_image(lesson):
    lesson.cells[4].outputs = [new_output("display_data", {"image/svg+xml": "<svg/>", "text/plain": "a diagram"})]


def late_image(lesson):
    lesson.cells.insert(9, lesson.cells.pop(4))


def long_opening(lesson):
    lesson.cells[0].source += "word " * 200
    lesson.cells[6].source *= 3


def printing_first(lesson):
    lesson.cells[3].outputs = [new_output("stream", text="a line\n" * 5)]


def no_tag(lesson):
    lesson.cells[10].metadata = {}


def wrong_tag(lesson):
    lesson.cells[10].metadata["tags"] = ["trains"]


def no_solution(lesson):
    lesson.solutions = []


def to_verify(lesson):
    lesson.cells[8].source += "<!-- verify: whether it holds -->"


BROKEN = {
    wordy: (few_words_to_a_line_of_code, "6 to 12 are wanted"),
    terse: (few_words_to_a_line_of_code, "6 to 12 are wanted"),
    long_cell: (short_cells, "cell 4 has 41 lines"),
    many_imports: (few_imports, "cell 4 imports in 13 lines"),
    imports_and_more: (few_imports, "cell 4 imports in 13 lines"),
    shows("y = approx(1)"): (no_plumbing, "cell 7 shows approx"),
    shows("results.record(1)"): (no_plumbing, "cell 7 shows record("),
    shows("TRIAL"): (no_plumbing, "cell 7 shows TRIAL"),
    shows("n = FULL_SIZE"): (no_plumbing, "cell 7 shows FULL_SIZE"),
    shows("f(tolerance = 1)"): (no_plumbing, "cell 7 shows tolerance="),
    no_takeaways: (three_takeaways, "0 sections are called Takeaways"),
    four_takeaways: (three_takeaways, "4 takeaways"),
    core_after_takeaways: (three_takeaways, "'3 Late (core)' comes after the takeaways"),
    unmarked: (marked_sections, "'2 More' is neither (core) nor (optional)"),
    nothing_core: (marked_sections, "no section is (core)"),
    long_core: (short_core, "the core has 25"),
    no_image: (image_first, "no image is shown"),
    late_image: (image_first, "a whole section comes before the first image"),
    long_opening: (image_first, "words come before the first image"),
    printing_first: (image_first, "5 lines are printed before the first image"),
    no_tag: (an_exercise_that_makes_something, "no exercise's cell is tagged"),
    wrong_tag: (an_exercise_that_makes_something, "which its solution does not do"),
    no_solution: (an_exercise_that_makes_something, "which its solution does not do"),
    to_verify: (nothing_left_to_verify, "whether it holds"),
}


def test_a_sound_lesson_keeps_every_rule():
    assert {rule.__name__: list(rule(sound())) for rule in RULES} == {rule.__name__: [] for rule in RULES}


@pytest.mark.parametrize("breaking", BROKEN, ids=lambda breaking: breaking.__name__)
def test_every_rule_can_fail(breaking):
    lesson, (rule, complaint) = sound(), BROKEN[breaking]
    breaking(lesson)
    found = list(rule(lesson))
    assert len(found) == 1 and complaint in found[0], found
    others = {other.__name__: list(other(lesson)) for other in RULES if other is not rule}
    excused = {"few_words_to_a_line_of_code"}  # whoever adds a cell or words may change this too
    assert {name: said for name, said in others.items() if said and name not in excused} == {}


def test_every_rule_is_broken_above():
    assert {rule for rule, _ in BROKEN.values()} == set(RULES)


def test_plumbing_may_be_seen_in_later_lessons():
    lesson = sound()
    shows("approx(1)")(lesson)
    lesson.number = 8
    assert list(no_plumbing(lesson)) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("# Two words", 2),
        ("One [link of five words](https://example.org/a/b), and *more*.", 7),
        ("A formula $x = y + z$ and\n$$a\n= b$$", 5),
        ("<details><summary>Hint</summary>\n\nread | on |\n|---|---|\n</details>", 3),
        ("text <!-- verify: not\nread --> more", 2),
        ("```python\nnot counted\n```\n`code` is read", 3),
    ],
)
def test_words_are_those_that_one_reads(source, count):
    assert words(source) == count


def test_headings_in_fenced_code_are_none():
    assert [section.title for section in Lesson(1, [new_markdown_cell("```\n## x\n```\n## y")]).sections] == ["", "y"]


def measured(path) -> str:
    lesson = lesson_of(path)
    said, code = sum(map(words, lesson.markdown)), sum(lines(source) for _, source in lesson.visible)
    return f"{path.stem:24} {said:6} words  {code:5} lines  {said / code:5.1f}  core {core_words(lesson):5}"


if __name__ == "__main__":
    for chapter in CHAPTERS:
        print(measured(chapter))
        for each in RULES:
            try:
                for complaint in each(lesson_of(chapter)):
                    print(f"    {each.__name__}: {complaint}")
            except pytest.skip.Exception as skipped:
                print(f"    {each.__name__}: {skipped}")

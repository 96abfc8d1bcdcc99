"""The course as a website that needs no network: `python -m helpers.course.site` builds build/site and checks it.

The pages are the committed notebooks with the outputs they have, the glossary, sections of README.md, the model card,
and the teaching modules' docstrings. Sphinx builds them from build/site-source, where everything lies as in the
repository, so that links between the files hold. Its warnings are errors.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from helpers.base import errors
from helpers.base.paths import ROOT
from helpers.course import notebooks

SOURCE = ROOT / "site"
OUTPUT = ROOT / "build" / "site"
MODULES = (
    *("lora.layer", "lora.injection", "lora.merging", "diffusion.schedule", "diffusion.sampling"),
    *("training.steps", "training.loop", "adapters.writing", "adapters.loading"),
    *("evaluation.measures", "evaluation.distances"),
)
TRY = SOURCE / "try"  # the program of the page "Try it"
RUNTIME = ROOT / "build" / "try-runtime"  # what it takes from npm: kept, so that the next build needs no network
# For each engine the program, what it loads, and the compiled part, which it is given
_RUNTIME = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": (
        "ort.webgpu.min.mjs",
        "ort-wasm-simd-threaded.asyncify.mjs",
        "ort-wasm-simd-threaded.asyncify.wasm",
    ),
}
_RUNTIME_FILES = tuple(name for names in _RUNTIME.values() for name in names)
# What is shown beside the notebooks, where it is there: copied to the same place in the pages' sources.
_SHOWN = ("notebooks/glossary.md", "helpers/minisd/README.md", "report/report.pdf", "figures")


# ------------------------------------------------------------------------------------------------------- sources
def pages() -> dict[str, list[Path]]:
    """The notebooks by the heading they stand under: the numbered ones, the playground, the solutions."""
    return {
        "Notebooks": [*notebooks.committed(), *sorted(notebooks.FOLDER.glob("playground.ipynb"))],
        "Solutions": sorted((notebooks.FOLDER / "solutions").glob("*.ipynb")),
    }


def lay_out(folder: Path, lacking: str = "") -> None:
    """Writes everything that Sphinx reads into a new folder. Raises CourseError for a section that README.md lacks.

    lacking: why the page "Try it" cannot draw, a sentence that stands there instead.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("try", "package*.json", "node_modules"))
    for path in [*(ROOT / name for name in _SHOWN), *(path for paths in pages().values() for path in paths)]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, target)
        elif path.exists():
            shutil.copy2(path, target)
    for name in MODULES:
        (folder / "api").mkdir(exist_ok=True)
        text = f"helpers.{name}\n{'=' * 40}\n\n.. automodule:: helpers.{name}\n   :members:\n"
        (folder / "api" / f"{name}.rst").write_text(text, encoding="utf-8")
    for path in folder.glob("*.md"):
        path.write_text(fill(path.read_text(encoding="utf-8"), folder, lacking), encoding="utf-8")


def fill(text: str, folder: Path, lacking: str = "") -> str:
    """A page whose comments are replaced by what they name: a section of README.md, a table, the list of contents."""
    readme = sections((ROOT / "README.md").read_text(encoding="utf-8"))

    def section(match: re.Match[str]) -> str:
        if match[1] not in readme:
            raise errors.CourseError(f"README.md has no section {match[1]!r}, which the site shows")
        return readme[match[1]]

    text = re.sub(r"<!-- readme: (.+?) -->", section, text)
    text = text.replace("](../", "](")  # here the pages of site/ lie beside the folders that they link to
    text = text.replace("<!-- try -->", try_it(lacking))
    text = text.replace("<!-- table of notebooks -->", table(readme.get("The notebooks", "")))
    text = text.replace("<!-- modules -->", modules())
    return text.replace("<!-- contents -->", contents(folder))


def sections(markdown: str) -> dict[str, str]:
    """{heading: text below it} of the second level; "about" is what stands before, without title and first image."""
    parts = re.split(r"^## (.+)\n", markdown, flags=re.MULTILINE)
    about = re.sub(r"^!\[.*\n", "", re.sub(r"^# .*\n", "", parts[0]), count=1, flags=re.MULTILINE).strip("\n")
    return {"about": about} | dict(zip(parts[1::2], parts[2::2], strict=True))


def table(readme: str) -> str:
    """The notebooks with their titles, and what README.md says of each."""
    said = dict(re.findall(r"^\| *\[(\w+)\][^|]* *\| *([^|]+?) *\|", readme, re.MULTILINE))
    rows = ["| notebook | what you do |", "| --- | --- |"]
    for path in pages()["Notebooks"]:
        link = f"[{title(path)}]({path.relative_to(ROOT).as_posix()})"
        rows.append(f"| {link} | {said.get(path.name[:2]) or said.get(path.stem, '')} |")
    return "\n".join(rows)


def title(path: Path) -> str:
    """A notebook's first heading. Raises CourseError when it has none."""
    for cell in notebooks.read(path).cells:
        if cell.cell_type == "markdown" and (found := re.search(r"^# (.+)$", cell.source, re.MULTILINE)):
            return found[1].strip()
    raise errors.CourseError(f"{path.name} has no heading of the first level, which the site needs")


def modules() -> str:
    """The teaching modules, each with the first line of its docstring."""
    docs = {
        name: ast.parse((ROOT / "helpers" / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))
        for name in MODULES
    }
    said = {name: (ast.get_docstring(tree) or "").partition("\n")[0] for name, tree in docs.items()}
    lines = [f"- [{name}](api/{name}.rst): {words}" for name, words in said.items()]
    return "\n".join([*lines, "", toctree("", [f"api/{name}" for name in MODULES])])


def contents(folder: Path) -> str:
    """The order of all pages."""
    trees = [toctree("", ["start", "try"])]
    for heading, paths in pages().items():
        trees.append(toctree(heading, [path.relative_to(ROOT).with_suffix("").as_posix() for path in paths]))
    reference = {"notebooks/glossary": "", "using": "", "out_of_scope": ""}
    reference |= {"helpers/minisd/README": "MiniSD, the model card", "api": ""}
    there = {name: said for name, said in reference.items() if (folder / f"{name}.md").exists()}
    trees.append(toctree("Reference", [f"{said} <{name}>" if said else name for name, said in there.items()]))
    return "\n".join(trees)


def toctree(caption: str, names: list[str]) -> str:
    """The order of pages in Sphinx's words; nothing for no names."""
    options = [":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["```{toctree}", *options, "", *names, "```", ""]) if names else ""


# -------------------------------------------------------------------------------------------------------- Try it
def try_it(lacking: str) -> str:
    """What draws on the page "Try it", or the sentence that says why nothing does here."""
    if lacking:
        return f"**This copy of the site cannot draw.** {lacking}"
    return f"```{{raw}} html\n{(TRY / 'page.html').read_text(encoding='utf-8')}```"


def fetch_runtime() -> None:
    """ONNX Runtime for browsers into RUNTIME, the version and hash that site/package-lock.json names, from npm.

    Nothing is fetched when it is there already. Raises CourseError when npm is missing or cannot fetch it.
    """
    lock, kept = SOURCE / "package-lock.json", RUNTIME / "package-lock.json"
    whole = all((RUNTIME / name).exists() for name in (*_RUNTIME_FILES, "runtime.json"))
    if whole and kept.exists() and kept.read_bytes() == lock.read_bytes():
        return
    npm = shutil.which("npm")
    if npm is None:
        raise errors.CourseError("Node.js with npm is not installed, which fetches the runtime.")
    shutil.rmtree(RUNTIME, ignore_errors=True)
    RUNTIME.mkdir(parents=True)
    shutil.copy2(SOURCE / "package.json", RUNTIME)
    shutil.copy2(lock, RUNTIME)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    try:
        if subprocess.run(command, cwd=RUNTIME, check=False).returncode != 0:
            raise errors.CourseError("npm could not fetch the runtime: is there a network?")
        package = RUNTIME / "node_modules" / "onnxruntime-web"
        facts: dict[str, object] = {}
        facts["version"] = json.loads((package / "package.json").read_text(encoding="utf-8"))["version"]
        for name in _RUNTIME_FILES:
            shutil.copyfile(package / "dist" / name, RUNTIME / name)
        for engine, (module, _, binary) in _RUNTIME.items():
            facts[engine] = {"module": module, "binary": binary, "bytes": (RUNTIME / binary).stat().st_size}
        (RUNTIME / "runtime.json").write_text(json.dumps(facts), encoding="utf-8")
    except (OSError, errors.CourseError):
        kept.unlink(missing_ok=True)
        raise
    shutil.rmtree(RUNTIME / "node_modules")


def write_try(folder: Path) -> None:
    """The page's program, the model that it draws with and the runtime, into a new folder.

    Raises CourseError, with a sentence for the page, when something is missing.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(TRY, folder, ignore=shutil.ignore_patterns("page.html"))
    fetch_runtime()
    (folder / "ort").mkdir()
    for name in (*_RUNTIME_FILES, "runtime.json"):
        shutil.copyfile(RUNTIME / name, folder / "ort" / name)
    if importlib.util.find_spec("onnx") is None:
        raise errors.CourseError("The Python package onnx is not installed, which exports the model.")
    command = [sys.executable, "-m", "helpers.playground.export", "--out", str(folder / "model")]
    if subprocess.run(command, cwd=ROOT, env=os.environ | notebooks.OFFLINE, check=False).returncode != 0:
        raise errors.CourseError("The model could not be exported.")


# ------------------------------------------------------------------------------------------------------ building
def build(output: Path = OUTPUT) -> bool:
    """Builds the site into a folder; False when Sphinx had an error or a warning, which it has printed then.

    Where the page "Try it" lacks something, it says so, and the rest is built.
    Raises CourseError when Sphinx is not installed.
    """
    if importlib.util.find_spec("sphinx") is None or importlib.util.find_spec("myst_nb") is None:
        raise errors.CourseError("the site needs Sphinx: make site, or pip install -c constraints.txt -e '.[site]'")
    source, doctrees = output.with_name(f"{output.name}-source"), output.with_name(f"{output.name}-doctrees")
    for folder in (output, doctrees):
        shutil.rmtree(folder, ignore_errors=True)
    lacking, parts = "", output.with_name(f"{output.name}-try")
    try:
        write_try(parts)
    except errors.CourseError as error:
        lacking = str(error)
        print(f"site: the page “Try it” cannot draw. {lacking}", file=sys.stderr)
    lay_out(source, lacking)
    folders = [str(folder) for folder in (doctrees, source, output)]
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", *folders]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | notebooks.OFFLINE, check=False)
    for path in [path for paths in pages().values() for path in paths]:  # for those who want to run one
        target = output / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    shutil.copytree(parts, output / "try")
    return done.returncode == 0


# ------------------------------------------------------------------------------------------------------ checking
_LOADED = {"script": ("src",), "img": ("src", "srcset"), "iframe": ("src",), "source": ("src", "srcset")}
_LOADED |= {"video": ("src", "poster"), "audio": ("src",), "embed": ("src",), "object": ("data",), "link": ("href",)}
_IN_CSS = re.compile(r"""(?:url\(|@import)\s*["']?([^"')\s;]+)""")


@dataclass
class Page(HTMLParser):
    """What the checks need of a page: anchors, links, the files that it loads, pictures without alt text."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    nameless: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """One element; of `link` only those that a browser loads."""
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag in ("a", "area") and "href" in given:
            self.links.append(given["href"])
        if tag == "img" and not given.get("alt", "").strip():
            self.nameless.append(given.get("src", "?"))
        if tag == "link" and given.get("rel") in ("next", "prev", "index", "search", "author"):
            self.links.append(given["href"])
            return
        for name in _LOADED.get(tag, ()):
            addresses = given.get(name, "").split(", ") if name == "srcset" else [given.get(name, "")]
            self.loaded += [address.split()[0] for address in addresses if address.strip()]
        self.loaded += _IN_CSS.findall(given.get("style", ""))

    def handle_data(self, data: str) -> None:
        """Text; of a style sheet within the page, what it loads."""
        if self.cdata_elem == "style":
            self.loaded += _IN_CSS.findall(data)


def read_page(path: Path) -> Page:
    """The facts of one HTML file."""
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def check(folder: Path) -> tuple[int, int, list[str]]:
    """(pages, links, problems) of a site in a folder; each problem is one line that begins with the page."""
    folder = folder.resolve()
    read = {path: read_page(path) for path in sorted(folder.rglob("*.html"))}
    problems, links = [], 0
    for path, page in read.items():
        found = [f"a picture without alt text: {source}" for source in page.nameless]
        found += filter(None, (link_problem(path, link, read) for link in page.links))
        found += filter(None, (load_problem(path, address) for address in page.loaded))
        problems += [f"{path.relative_to(folder).as_posix()}: {problem}" for problem in found]
        links += len(page.links)
    for path in sorted(folder.rglob("*.css")):
        addresses = _IN_CSS.findall(path.read_text(encoding="utf-8"))
        found = [problem for address in addresses if (problem := load_problem(path, address))]
        problems += [f"{path.relative_to(folder).as_posix()}: {problem}" for problem in found]
    return len(read), links, problems


def link_problem(path: Path, link: str, pages: dict[Path, Page]) -> str | None:
    """What is wrong with a link on a page: a dead file or anchor here, or an address elsewhere that cannot be one."""
    parts = urlsplit(link)
    if parts.scheme == "mailto":
        return None if "@" in parts.path else f"no mail address: {link}"
    if parts.scheme or parts.netloc:
        good = parts.scheme in ("http", "https") and "." in (parts.hostname or "") and not re.search(r"\s", link)
        return None if good else f"no web address: {link}"
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.is_file():
        return f"a dead link: {link}"
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
        return f"a dead anchor: {link}"
    return None


def load_problem(path: Path, address: str) -> str | None:
    """What is wrong with a file that a page loads: it lies on another host, or is missing here."""
    parts = urlsplit(address)
    if parts.scheme == "data" or address.startswith("#"):
        return None
    if parts.scheme or parts.netloc:
        return f"loaded from another host: {address}"
    return None if (path.parent / unquote(parts.path)).is_file() else f"a missing file: {address}"


def main() -> int:
    """Builds and checks; 0 when there was nothing to complain of."""
    try:
        built = build()
    except errors.CourseError as error:
        print(f"site: {error}", file=sys.stderr)
        return 1
    pages, links, problems = check(OUTPUT)
    for problem in problems:
        print(problem, file=sys.stderr)
    unbuilt = "" if built else "; Sphinx gave warnings, see above"
    print(f"site: {pages} pages, {links} links, {len(problems)} problems{unbuilt}")
    return 0 if built and not problems else 1


if __name__ == "__main__":
    sys.exit(main())

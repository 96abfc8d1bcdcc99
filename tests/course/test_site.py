"""The website: its checks can fail, and every notebook has a page.

Sphinx builds all of it in `make site`, and here a page with sliders.
"""

import json
import re
import shutil
import subprocess
import sys
from html import unescape

import pytest
from PIL import Image

from helpers.base import errors
from helpers.base.paths import ROOT
from helpers.course import notebooks, site

GOOD = """<!doctype html><html><head><link rel="stylesheet" href="look.css"><script src="code.js"></script></head>
<body id="top"><h1 id="here">A page</h1><a href="#here">here</a><a href="other.html?q=1#there">there</a>
<a href="https://example.org/a">elsewhere</a><img src="picture.png" alt="A picture">
<img src="data:image/png;base64,AA" srcset="picture.png 1x, picture.png 2x" alt="Another"></body></html>"""


@pytest.fixture
def built(tmp_path):
    """A site of two pages without a problem."""
    (tmp_path / "index.html").write_text(GOOD)
    (tmp_path / "other.html").write_text('<p id="there">There</p>')
    (tmp_path / "look.css").write_text('p { background: url("picture.png") } i { background: url(data:image/png,) }')
    for name in ("code.js", "picture.png"):
        (tmp_path / name).touch()
    return tmp_path


def test_a_good_site_has_no_problems(built):
    assert site.check(built) == (2, 3, [])


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("#here", "#gone", "a dead anchor: #gone"),
        ("#there", "#gone", "a dead anchor: other.html?q=1#gone"),
        ("other.html", "gone.html", "a dead link: gone.html?q=1#there"),
        ("https://example.org/a", "https://example/a b", "no web address: https://example/a b"),
        ("https://example.org/a", "javascript:x()", "no web address: javascript:x()"),
        (' alt="A picture"', "", "a picture without alt text: picture.png"),
        ('alt="A picture"', 'alt=" "', "a picture without alt text: picture.png"),
        ("code.js", "https://cdn.example.org/code.js", "loaded from another host: https://cdn.example.org/code.js"),
        ("code.js", "//cdn.example.org/code.js", "loaded from another host: //cdn.example.org/code.js"),
        ('"picture.png"', '"https://example.org/p.png"', "loaded from another host: https://example.org/p.png"),
        ("look.css", "gone.css", "a missing file: gone.css"),
        ("picture.png 2x", "gone.png 2x", "a missing file: gone.png"),
        ("<h1 id", '<h1 style="background: url(https://example.org/p.png)" id', "loaded from another host"),
        ("</head>", '<style>@import "https://example.org/a.css";</style></head>', "loaded from another host"),
    ],
)
def test_one_mistake_is_one_problem(built, old, new, problem):
    assert old in GOOD
    (built / "index.html").write_text(GOOD.replace(old, new, 1))
    [found] = site.check(built)[2]
    assert found.startswith(f"index.html: {problem}")


@pytest.mark.parametrize("rule", ['@import "https://example.org/a.css";', "a { src: url(//example.org/font.woff) }"])
def test_a_style_sheet_may_not_load_from_another_host(built, rule):
    (built / "look.css").write_text(rule)
    [found] = site.check(built)[2]
    assert found.startswith("look.css: loaded from another host")


def test_every_committed_notebook_has_its_page(tmp_path):
    site.lay_out(tmp_path / "source")
    index = (tmp_path / "source" / "index.md").read_text(encoding="utf-8")
    for path in notebooks.committed():
        name = path.relative_to(ROOT).with_suffix("").as_posix()
        assert (tmp_path / "source" / f"{name}.ipynb").read_bytes() == path.read_bytes()
        assert f"\n{name}\n" in index and f"]({name}.ipynb)" in index
    assert "<!--" not in index


def test_solutions_and_playground_are_shown_where_they_are(tmp_path, monkeypatch):
    cells = [{"cell_type": "markdown", "metadata": {}, "source": "# A title", "id": "a"}]
    text = json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    assert site.pages() == {"Notebooks": [], "Solutions": []}
    (tmp_path / "solutions").mkdir()
    paths = [tmp_path / name for name in ("01_a.ipynb", "playground.ipynb", "solutions/01_a.ipynb")]
    for path in paths:
        path.write_text(text)
    assert site.pages() == {"Notebooks": paths[:2], "Solutions": paths[2:]}
    assert site.title(paths[0]) == "A title"


def test_a_notebook_needs_a_title(tmp_path):
    (tmp_path / "01_a.ipynb").write_text(json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    with pytest.raises(errors.CourseError, match="01_a.ipynb has no heading"):
        site.title(tmp_path / "01_a.ipynb")


def test_a_section_that_readme_lacks_is_named(tmp_path):
    with pytest.raises(errors.CourseError, match="no section 'Nothing of the kind'"):
        site.fill("<!-- readme: Nothing of the kind -->", tmp_path)


def test_sections_of_markdown():
    assert site.sections("# T\n![p](p.png)\nfirst\n## A\na\n### B\nb\n## C\n") == {
        "about": "first",
        "A": "a\n### B\nb\n",
        "C": "",
    }
    about = site.sections("# T\n\n![p](p.png)\n\nfirst\n\n![q](q.webp)\n\n*words*\n\n## A\n")["about"]
    assert about == "first\n\n![q](q.webp)\n\n*words*", "the page has an image of its own in the place of the first"


def test_the_documented_modules_exist():
    for name in site.MODULES:
        assert (ROOT / "helpers" / f"{name.replace('.', '/')}.py").exists()


# ----------------------------------------------------------------------------------------------------------- sliders
SLIDER = {
    "notebook": "01_a",
    "description": "scale of “A & B”",
    "alt": "Pictures by scale, from 0 to 1: one; <other>",
    "values": ["0", "0.5", "1"],
    "size": [8, 6],
    "columns": 2,
    "rows": [{"title": "one", "places": [0, 1, 2]}, {"title": "<other>", "places": [3, 3, 3]}],
}


@pytest.fixture(scope="module")
def pages_with_sliders(tmp_path_factory):
    """{name: HTML} of three notebooks with the same cells, of which the course has executed the first, and the site."""
    for module in ("sphinx", "myst_nb", "furo", "latex2mathml"):
        pytest.importorskip(module, reason="Sphinx is not installed")
    folder = tmp_path_factory.mktemp("sliders")
    source, output = folder / "source", folder / "site"
    shutil.copytree(site.SOURCE / "_static", source / "_static")
    shutil.copy(site.SOURCE / "conf.py", source)
    (source / "index.md").write_text("# Index\n\n```{toctree}\n:glob:\nnotebooks/**\n```\n")
    described = f'show_slider(rows, values, "{SLIDER["description"]}")'
    code = [
        "%pip list",
        "# show_slider",
        described,
        'show_slider(rows, values, description="another")',
        "show_slider()",
    ]
    cells = [{"cell_type": "markdown", "metadata": {}, "source": "# A title", "id": "a"}]
    for number, text in enumerate(code):
        cell = {"cell_type": "code", "metadata": {"tags": ["hide-input"]}, "source": text, "id": f"c{number}"}
        cells.append(cell | {"outputs": [], "execution_count": None})
    language = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    text = json.dumps({"cells": cells, "metadata": language, "nbformat": 4, "nbformat_minor": 5})
    names = ("01_a", "02_b", "solutions/01_a")
    for name in names:
        (source / "notebooks" / name).parent.mkdir(parents=True, exist_ok=True)
        (source / "notebooks" / f"{name}.ipynb").write_text(text)
    kept = source / "figures" / "sliders"
    kept.mkdir(parents=True)
    Image.new("RGB", (16, 12), "red").save(kept / "01_scale.webp")
    (kept / "01_scale.json").write_text(json.dumps(SLIDER))
    (kept / "01_another.json").write_text(json.dumps(SLIDER | {"description": "another"}))  # without its pictures
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", str(folder / "trees")]
    done = subprocess.run([*command, str(source), str(output)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: (output / "notebooks" / f"{name}.html").read_text(encoding="utf-8") for name in names}, output


def test_a_slider_stands_on_the_page_below_the_cell_that_shows_it(pages_with_sliders):
    pages, output = pages_with_sliders
    page = pages["01_a"]
    [start] = [found.start() for found in re.finditer('<div class="picture-slider" ', page)]
    asked = [found.start() for found in re.finditer(r"<div class=\"cell .*?docutils container", page)]
    assert len(asked) == 5 and asked[2] < start < asked[3], "of five cells, the third shows it"
    [data] = re.findall('data-slider="(.*?)"', page)
    wanted = {key: SLIDER[key] for key in ("description", "values", "columns", "rows")}
    assert json.loads(unescape(data)) == wanted
    assert f'aria-label="{SLIDER["alt"].replace("<", "&lt;").replace(">", "&gt;")}"' in page
    [control] = re.findall('<input type="range".*?>', page)
    assert 'min="0" max="2" value="1" aria-valuetext="0.5"' in control and control.endswith(" hidden>")
    [name] = re.findall('id="(.*?)"', control)
    assert f'<label for="{name}">scale of “A &amp; B”</label>: <span>0.5</span>' in page
    assert re.findall("--column: (.); --line: (.)", page) == [("1", "0"), ("1", "1")], "the middle ones"
    assert "aspect-ratio: 8 / 6; --columns: 2" in page and "<figcaption>&lt;other&gt;</figcaption>" in page
    assert len(re.findall(r'<img alt="[^"]+ \(scale of “A &amp; B”: 0\.5\)"', page)) == 2
    assert 'src="../_static/sliders.js' in page and (output / "_images" / "01_scale.webp").exists()
    assert [problem for problem in site.check(output)[2] if "picture" in problem or "missing" in problem] == []


@pytest.mark.parametrize("name", ["02_b", "solutions/01_a"])
def test_without_its_files_a_page_has_no_slider(pages_with_sliders, name):
    page = pages_with_sliders[0][name]
    assert page.count("show_slider") == 4 and "picture-slider" not in page and '<input type="range"' not in page


# ------------------------------------------------------------------------------------------------------------ Try it
def test_the_page_try_it_draws_or_says_why_it_cannot(tmp_path):
    site.lay_out(tmp_path / "source")
    page = (tmp_path / "source" / "try.md").read_text(encoding="utf-8")
    assert 'src="try/page.js"' in page and "cannot draw" not in page and "<!--" not in page
    site.lay_out(tmp_path / "source", "Node.js is not installed.")
    page = (tmp_path / "source" / "try.md").read_text(encoding="utf-8")
    assert "cannot draw.** Node.js is not installed." in page and "page.js" not in page
    assert not (tmp_path / "source" / "package.json").exists() and not (tmp_path / "source" / "try").exists()


def test_what_comes_from_npm_is_pinned_by_its_hash():
    wanted = json.loads((site.SOURCE / "package.json").read_text(encoding="utf-8"))["dependencies"]
    packages = json.loads((site.SOURCE / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    assert packages.pop("")["dependencies"] == wanted == {"onnxruntime-web": wanted["onnxruntime-web"]}
    assert packages["node_modules/onnxruntime-web"]["version"] == wanted["onnxruntime-web"]
    assert all(package["integrity"].startswith("sha512-") for package in packages.values())
    assert not any("resolved" in package for package in packages.values()), "names a registry"


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    """A folder of this test's own for what comes from npm, and a log of the commands that were run."""
    asked = []

    def run(command, cwd, **options):
        asked.append(command)
        package = cwd / "node_modules" / "onnxruntime-web"
        for name in site._RUNTIME_FILES:
            (package / "dist" / name).parent.mkdir(parents=True, exist_ok=True)
            (package / "dist" / name).write_text("12345")
        (package / "package.json").write_text('{"version": "1.2.3"}')
        return subprocess.CompletedProcess(command, len(list(tmp_path.glob("offline"))))

    monkeypatch.setattr(site, "RUNTIME", tmp_path / "runtime")
    monkeypatch.setattr(site.subprocess, "run", run)
    monkeypatch.setattr(site.shutil, "which", lambda name: f"/bin/{name}")
    return asked


def test_the_runtime_is_fetched_once(runtime, tmp_path):
    (tmp_path / "offline").touch()
    with pytest.raises(errors.CourseError, match="is there a network"):
        site.fetch_runtime()
    (tmp_path / "offline").unlink()
    for _ in range(2):
        site.fetch_runtime()
    assert len(runtime) == 2 and runtime[1][:2] == ["/bin/npm", "ci"], "the second call fetches nothing"
    facts = json.loads((site.RUNTIME / "runtime.json").read_text())
    assert facts.pop("version") == "1.2.3" and set(facts) == {"wasm", "webgpu"}
    assert all(f["bytes"] == 5 and (site.RUNTIME / f["module"]).exists() for f in facts.values())
    (site.RUNTIME / "package-lock.json").write_text("of another version")
    site.fetch_runtime()
    assert len(runtime) == 3
    (site.RUNTIME / "ort.webgpu.min.mjs").unlink()  # an older version of the course fetched fewer files
    site.fetch_runtime()
    assert len(runtime) == 4 and (site.RUNTIME / "ort.webgpu.min.mjs").exists()


def test_without_node_or_onnx_it_is_said(runtime, tmp_path, monkeypatch):
    monkeypatch.setattr(site.shutil, "which", lambda name: None)
    with pytest.raises(errors.CourseError, match="Node.js"):
        site.write_try(tmp_path / "try")
    monkeypatch.setattr(site.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(site.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.CourseError, match="onnx is not installed"):
        site.write_try(tmp_path / "try")
    assert (tmp_path / "try" / "sampler.js").exists() and (tmp_path / "try" / "ort" / "runtime.json").exists()

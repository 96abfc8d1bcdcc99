"""Sphinx's settings. `python -m helpers.course.site` lays out the pages beside a copy of this file, and builds them.

Nothing is fetched when a page is opened: formulas are MathML, fonts are the reader's or lie in _static, and the
notebooks show their committed outputs.
"""

import ast
import hashlib
import json
import re
from base64 import b64decode
from html import escape
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

project = "LoRA by hand"
language = "en"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]

nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # by default from another host
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = project
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js", ("sliders.js", {"defer": "defer"})]
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_show_sphinx = False

log = logging.getLogger(__name__)


# ------------------------------------------------------------------------------------------------------- formulas
def mathml(tex: str, display: str, where: nodes.Node) -> str:
    """A formula as MathML. What latex2mathml cannot read or does not know becomes a warning, and so stops the build."""
    try:
        markup = convert(tex, display=display)
    except Exception as error:  # of many kinds, none of which names the formula
        log.warning("the formula %r is not readable: %s", tex, type(error).__name__, location=where)
        return ""
    if "\\" in markup:
        log.warning("the formula %r has a command that latex2mathml does not know", tex, location=where)
    bare = tex.replace("\\{", "").replace("\\}", "")
    if bare.count("{") != bare.count("}"):  # latex2mathml forgives it, other readers of the notebooks do not
        log.warning("the formula %r has braces without a partner", tex, location=where)
    return markup


def visit_math(translator, node) -> None:
    """In a line of text; a long formula may scroll in a box of its own on a phone."""
    kind = "math long" if len(node.astext()) > 40 else "math"
    translator.body.append(f'<span class="{kind}">{mathml(node.astext(), "inline", node)}</span>')
    raise nodes.SkipNode


def visit_displaymath(translator, node) -> None:
    """On lines of its own."""
    translator.body.append(f'<div class="math">{mathml(node.astext(), "block", node)}</div>')
    raise nodes.SkipNode


# ----------------------------------------------------------------------------------------------------- docstrings
def plain_docstring(app, what, name, obj, options, lines) -> None:
    """Docstrings are plain text with `code` in it: say the same in reStructuredText, indented lines as they are."""
    new, before = [], ""
    for line in lines:
        if line.startswith("    ") and not before.strip():
            new += ["::", ""]
        indented = line.startswith("    ")
        new.append(line if indented else _escaped(line))
        before = line
    lines[:] = new


def _escaped(line: str) -> str:
    parts = re.split(r"(`[^`]+`)", line)
    return "".join(f"`{p}`" if p.startswith("`") and len(p) > 1 else re.sub(r"([\\*|_`])", r"\\\1", p) for p in parts)


# ------------------------------------------------------------------------------------------------------ notebooks
def add_alt(app, doctree) -> None:
    """Pictures in outputs get the alt text that the notebook has for them; myst-nb names their files by their hash."""
    path = Path(app.env.doc2path(app.env.docname))
    if path.suffix != ".ipynb":
        return
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = dict(alt for cell in cells for output in cell.get("outputs", []) for alt in _alts(output))
    for image in doctree.findall(nodes.image):
        image.setdefault("alt", texts.get(Path(image["uri"]).stem, ""))


def _alts(output: dict):
    """(hash of the picture, alt text) of each picture in an output."""
    for kind, data in output.get("data", {}).items():
        if kind in ("image/jpeg", "image/png", "image/svg+xml"):
            said = output["metadata"].get(kind, {}).get("alt") or "".join(output["data"].get("text/plain", ""))
            text = "".join(data)
            picture = text.encode() if kind == "image/svg+xml" else b64decode(text)
            yield hashlib.sha256(picture).hexdigest(), said


def add_sliders(app, doctree) -> None:
    """Below a cell that calls `show_slider`, the pictures that the course kept of it (helpers/course/sliders.py)."""
    own = {}
    for file in sorted((Path(app.srcdir) / "figures" / "sliders").glob("*.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        if app.env.docname == f"notebooks/{facts['notebook']}" and file.with_suffix(".webp").exists():
            own[facts["description"]] = _slider(facts, file.stem)
    if own:
        cells = json.loads(Path(app.env.doc2path(app.env.docname)).read_text(encoding="utf-8"))["cells"]
        for box in list(doctree.findall(nodes.container)):
            if box.get("nb_element") == "cell_code":
                for description in _described("".join(cells[box["cell_index"]]["source"])):
                    box += own.get(description, [])


def _described(source: str) -> list[str]:
    """The descriptions of the sliders that a cell shows, where they are literals."""
    try:
        calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    except SyntaxError:  # a command of IPython's
        return []
    calls = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "show_slider"]
    given = [[*call.args[2:3], *(word.value for word in call.keywords if word.arg == "description")] for call in calls]
    return [text.value for texts in given for text in texts if isinstance(text, ast.Constant)]


def _slider(facts: dict, name: str) -> list[nodes.Node]:
    """Windows onto one file of pictures, at first the middle ones, and a range, which _static/sliders.js shows.

    Pieces of HTML around Sphinx's own nodes for pictures, so that it copies the file and knows its address.
    """
    middle = len(facts["values"]) // 2
    value, description, alt = (escape(text) for text in (facts["values"][middle], facts["description"], facts["alt"]))
    data = escape(json.dumps({key: facts[key] for key in ("description", "values", "columns", "rows")}))
    width, height = facts["size"]
    found: list[nodes.Node] = []

    def html(text: str) -> None:
        found.append(nodes.raw("", text, format="html"))

    html(f'<div class="picture-slider" role="group" aria-label="{alt}" data-slider="{data}">')
    html(f'<div class="picture-slider-rows" style="--rows: {len(facts["rows"])}">')
    for row in facts["rows"]:
        line, column = divmod(row["places"][middle], facts["columns"])
        place = f"--columns: {facts['columns']}; --column: {column}; --line: {line}"
        html(f'<figure><div class="picture-slider-window" style="aspect-ratio: {width} / {height}; {place}">')
        alt = f"{row['title']} ({facts['description']}: {facts['values'][middle]})"
        found.append(nodes.image(uri=f"/figures/sliders/{name}.webp", alt=alt))
        html(f"</div><figcaption>{escape(row['title'])}</figcaption></figure>")
    html(f'</div><p><label for="slider-{name}">{description}</label>: <span>{value}</span></p>')
    html(
        f'<input type="range" id="slider-{name}" min="0" max="{len(facts["values"]) - 1}" value="{middle}"'
        f' aria-valuetext="{value}" autocomplete="off" hidden></div>'
    )
    return found


def add_download(app, page, template, context, doctree) -> None:
    """A link to the notebook itself, which lies beside its page."""
    if doctree is not None and str(app.env.doc2path(page)).endswith(".ipynb"):
        name = f"{Path(page).name}.ipynb"
        link = f'<p class="notebook-file"><a href="{name}" download>Download this notebook</a></p>'
        context["body"] = re.sub(r"(</h1>)", rf"\1\n{link}", context["body"], count=1)


def setup(app) -> dict:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    app.connect("autodoc-process-docstring", plain_docstring)
    app.connect("doctree-read", add_sliders, priority=400)  # before Sphinx takes note of the pictures
    app.connect("doctree-read", add_alt)
    app.connect("html-page-context", add_download)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

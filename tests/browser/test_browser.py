"""The playground and the chapters' sliders in JupyterLab, as a reader meets them."""

import re
import time
from contextlib import contextmanager

import nbformat
import pytest
from helpers.conftest import PATIENCE
from nbformat.v4 import new_code_cell, new_notebook

from helpers.base.paths import ROOT
from helpers.course import notebooks

# What JupyterLab itself complains about, and why it is not ours.
HARMLESS = {}
WINDOW = {"width": 1500, "height": 1250}
MENU = re.compile("^Run All Cells$")


@contextmanager
def opened(lab, browser, artefacts, name):
    """A page with the notebook of that name; fails at the end for errors in the console or failed requests."""
    page = browser.new_context(viewport=WINDOW, locale="en-GB").new_page()
    page.set_default_timeout(PATIENCE)
    said = []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(f"{request.url} failed: {request.failure}"))
    page.on("response", lambda r: said.append(f"{r.url} answered {r.status}") if r.status >= 400 else None)
    page.goto(f"{lab.url}/lab/tree/{name}?reset&token={lab.token}")
    page.locator(".jp-Notebook").wait_for()
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    try:
        yield page
        page.wait_for_timeout(500)
    finally:
        shoot(page, artefacts, f"last_{name.removesuffix('.ipynb')}")
    problems = [text for text in said if not any(re.search(pattern, text) for pattern in HARMLESS)]
    page.context.close()
    assert problems == []


def run_all(page):
    """Run all cells, through the menu, once a kernel is there (JupyterLab forgets what it is told before)."""
    page.locator("#jp-main-statusbar").get_by_text("| Idle").first.wait_for()
    first = page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt").first
    for _ in range(10):
        page.get_by_role("menuitem", name="Run", exact=True).first.click()
        page.get_by_role("menuitem", name=MENU).click()
        page.wait_for_timeout(3000)
        if first.inner_text().strip() != "[ ]:":
            return
    raise AssertionError("JupyterLab does not run the cells")


def button(page, name):
    return page.locator("button.jupyter-button", has_text=re.compile(f"^\\s*{name}\\s*$"))


def message(page):
    """The sentence below the progress bar."""
    return page.locator(".course-message")


def says(page, text):
    """Wait until the message has this in it."""
    message(page).filter(has_text=text).wait_for()


def generate(page):
    """Press Generate, and wait until the picture is done."""
    button(page, "Generate").click()
    button(page, "Generate").and_(page.locator(":disabled")).wait_for()
    button(page, "Generate").and_(page.locator(":enabled")).wait_for()
    says(page, "Drawn in")


def source(page, number=0):
    """The `src` of a picture shown by a widget."""
    return page.locator("img.widget-image").nth(number).get_attribute("src")


def moved(page, before, number=0):
    """Wait until a picture's `src` is another one than before."""
    deadline = time.monotonic() + PATIENCE / 1000
    while source(page, number) == before:
        assert time.monotonic() < deadline, "the picture does not change"
        page.wait_for_timeout(50)


def clipped(page):
    """The labels of widgets that are wider than their place."""
    return page.locator(".widget-label").evaluate_all(
        "labels => labels.filter(e => e.scrollWidth > e.clientWidth).map(e => e.textContent)"
    )


def push(page, slider, key, times=1):
    """Press a key on a slider's handle."""
    handle = slider.locator("[role=slider], .noUi-handle").first
    handle.focus()
    for _ in range(times):
        page.keyboard.press(key)


def slider(page, label):
    return page.locator(".widget-slider", has=page.get_by_text(label, exact=True))


@pytest.fixture(scope="module")
def page(lab, browser, artefacts):
    """The playground, opened and run, with its first picture; the tests of this file share it, in order."""
    with opened(lab, browser, artefacts, "playground.ipynb") as page:
        run_all(page)
        says(page, "Drawn in")
        yield page


def shoot(page, artefacts, name):
    page.screenshot(path=artefacts / f"{name}.png")


def test_it_opens_and_makes_a_picture(page, artefacts):
    shoot(page, artefacts, "playground_opened")
    assert clipped(page) == []
    before = source(page)
    button(page, "New seed").click()
    generate(page)
    moved(page, before)
    assert button(page, "Cancel").is_disabled()
    assert page.locator(".course-history button").count() == 2
    assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    button(page, "Generate").scroll_into_view_if_needed()
    shoot(page, artefacts, "playground_drawn")


def test_the_menus_write_the_prompt(page):
    text = page.locator(".widget-textarea textarea")
    page.locator(".widget-dropdown", has_text="subject").locator("select").select_option("robot")
    page.wait_for_function("() => document.querySelector('.widget-textarea textarea').value.includes('robot')")
    text.fill("a drawing of a bear with a crown")
    assert text.input_value() == "a drawing of a bear with a crown"


def test_the_boundary_moves_between_before_and_after(page, artefacts):
    compare = page.locator(".course-compare .widget-slider")
    for key in ("ArrowLeft", "PageUp", "End"):
        before = source(page)
        push(page, compare, key)
        moved(page, before)
    push(page, compare, "Home")


def test_the_preview_sharpens_and_cancel_stops(page, artefacts):
    push(page, slider(page, "steps"), "End")
    seen = {source(page)}
    button(page, "Generate").click()
    for _ in range(3):
        moved(page, source(page))
        seen.add(source(page))
    shoot(page, artefacts, "playground_drawing")
    button(page, "Cancel").click()
    says(page, "Cancelled")
    assert len(seen) > 2
    push(page, slider(page, "steps"), "Home", 1)
    push(page, slider(page, "steps"), "ArrowRight", 3)
    generate(page)


@pytest.mark.parametrize("text, said", [("", "Without words"), ("word " * 1000, "Shorten it"), ("🦄 zxqv", "🦄, zxqv")])
def test_a_bad_prompt_gets_a_sentence(page, artefacts, text, said):
    page.locator(".widget-textarea textarea").fill(text)
    page.wait_for_timeout(300)
    button(page, "Generate").click()
    says(page, said)
    assert "Traceback" not in page.locator(".jp-Notebook").inner_text()
    shoot(page, artefacts, f"playground_{said.split()[0].strip('🦄,').lower() or 'emoji'}")


def load(page, path):
    """Choose a file in the dialogue that Load settings opens."""
    with page.expect_file_chooser() as chooser:
        page.locator("button.widget-upload, button.jupyter-widget-upload").click()
    chooser.value.set_files(path)


def test_save_and_load(page, lab, artefacts):
    text = page.locator(".widget-textarea textarea")
    wanted = "a drawing of a dog with a blue scarf"
    text.fill(wanted)
    page.wait_for_timeout(300)
    generate(page)
    button(page, "Save with settings").click()
    says(page, "Saved as")
    saved = max((lab.runs / "mini" / "playground").glob("*.png"))
    text.fill("something else")
    page.wait_for_timeout(300)
    load(page, saved)
    says(page, "loaded")
    page.wait_for_function(f"() => document.querySelector('.widget-textarea textarea').value == {wanted!r}")
    load(page, ROOT / "README.md")
    says(page, "not a PNG picture")
    shoot(page, artefacts, "playground_loaded")


def test_the_history_brings_a_picture_back(page, artefacts):
    before = source(page)
    page.locator(".course-history button").last.click()
    says(page, "Brought back")
    moved(page, before)
    page.locator(".course-history").scroll_into_view_if_needed()
    shoot(page, artefacts, "playground_history")


def test_two_adapters_are_mixed(page, artefacts):
    page.locator(".widget-toggle-button", has_text="mix").click()
    push(page, slider(page, "vintage ×"), "PageUp")
    before = source(page)
    generate(page)
    moved(page, before)
    page.locator("img.widget-image").scroll_into_view_if_needed()
    shoot(page, artefacts, "playground_mix")


def test_a_narrow_window_has_everything_below_each_other(page, artefacts):
    page.set_viewport_size({"width": 800, "height": 1500})
    page.wait_for_timeout(500)
    picture, prompt = page.locator("img.widget-image"), page.locator(".widget-textarea")
    assert picture.bounding_box()["y"] > prompt.bounding_box()["y"]
    edge = page.locator(".jp-OutputArea-output").filter(has=picture).bounding_box()
    for part in (prompt, slider(page, "steps"), picture):
        box = part.bounding_box()
        assert box["x"] + box["width"] <= edge["x"] + edge["width"]
    shoot(page, artefacts, "playground_narrow")
    page.set_viewport_size(WINDOW)


# ------------------------------------------------------------------------------------------------------- chapters
STUB = """
from PIL import Image

from helpers.course import show_slider

colours = ("red", "orange", "gold", "green", "teal", "blue", "purple", "black")


def shades(n, size=64):
    return [Image.new("RGB", (size, size), colours[i % 8]) for i in range(n)]


labels = [f"t = {t}" for t in (0, 100, 250, 400, 600, 800, 999)]
words = [(word, [i]) for i, word in enumerate("a drawing of a man with a red scarf".split())]
picture, components, so_far, guesses, final = shades(1)[0], None, shades(6), shades(6)[::-1], shades(1)
cells = [("MiniSD", picture), *((word, heat) for (word, _), heat in zip(words, shades(9)))]
asked = [
    "a drawing of a man with a red scarf",
    "a drawing of a white rabbit with a blue beanie, on a yellow background",
]
to_pictures, to_pil = lambda _components, latents: latents, lambda pictures: pictures
rows, columns = {"trained adapter": shades(7), "random adapter, same norm": shades(7)[::-1]}, labels
"""
CELLS = {
    "attention": ("01_stable_diffusion", "c036-slider", ""),
    "noise": ("01_stable_diffusion", "c043-slider", "noisy = shades(7)"),
    "step": ("01_stable_diffusion", "c055-slider", ""),
    "guidance": ("01_stable_diffusion", "c057-slider", "rows = [shades(7), shades(7)]"),
    "scale": ("02_lora_by_hand", "lora-44c", ""),
}


def source_of(name, cell_id):
    """The code of one cell of a chapter."""
    cells = notebooks.read(ROOT / "notebooks" / f"{name}.ipynb").cells
    return next(cell.source for cell in cells if cell.id == cell_id)


@pytest.mark.parametrize("kind", CELLS)
def test_a_chapters_slider_moves_its_pictures(lab, browser, artefacts, kind):
    name, cell_id, before = CELLS[kind]
    code = [STUB, before, source_of(name, cell_id)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = new_notebook(cells=[new_code_cell(source) for source in code], metadata={"kernelspec": kernel})
    nbformat.write(notebook, lab.folder / f"{kind}.ipynb")
    with opened(lab, browser, artefacts, f"{kind}.ipynb") as page:
        run_all(page)
        page.locator("img.widget-image").first.wait_for()
        assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").count() == 0
        first = source(page)
        moves = page.locator("img.widget-image").count() - 1 if kind == "attention" else 0
        before = source(page, moves)
        push(page, page.locator(".widget-slider"), "ArrowRight")
        moved(page, before, moves)
        assert moves == 0 or source(page) == first
        assert clipped(page) == []
        shoot(page, artefacts, f"slider_{kind}")

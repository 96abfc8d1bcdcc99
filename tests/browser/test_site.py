"""The built site in a browser, as on a desk and on a phone, light and dark: `make site` first, or these are skipped.

COURSE_ARTEFACTS names a folder for the screenshots.
"""

import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helpers.course import site

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
    pytest.mark.skipif(not (site.OUTPUT / "index.html").exists(), reason="the site is not built: make site"),
]
SIZES = {"desk": (1280, 900), "phone": (390, 844)}
WIDE = "document.documentElement.scrollWidth > window.innerWidth"
# What sticks out at the right of the window, and of no box that scrolls.
STICKS_OUT = """() => [...document.querySelectorAll("article *")].filter(element => {
    if (element.getBoundingClientRect().right <= window.innerWidth + 1) return false;
    for (let box = element; box && box.tagName !== "ARTICLE"; box = box.parentElement)
        if (["auto", "scroll", "hidden"].includes(getComputedStyle(box).overflowX)) return false;
    return true;
}).map(element => element.outerHTML.slice(0, 80))"""


class Quiet(SimpleHTTPRequestHandler):
    """Files, without a line for each."""

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address():
    """The site on this machine, on any free port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site.OUTPUT))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    folder = Path(os.environ.get("COURSE_ARTEFACTS") or tmp_path_factory.mktemp("artefacts"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(params=[(size, scheme) for size in SIZES for scheme in ("light", "dark")], ids="-".join)
def view(request, browser, address):
    """(page, name of the view); at the end, nothing may have failed or been asked of another host."""
    size, scheme = request.param
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, base_url=address)
    page = context.new_page()
    wrong = watch(page, address)
    yield page, f"{size}-{scheme}"
    context.close()
    assert wrong == []


def watch(page, address: str) -> list[str]:
    """What goes wrong on a page from now on: errors, failed requests, requests of anything but the site."""
    wrong = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda sent: wrong.append(f"failed: {sent.url}"))
    page.on("response", lambda answer: wrong.append(f"{answer.status}: {answer.url}") if answer.status > 399 else None)
    own = (address, "data:")
    page.on("request", lambda sent: None if sent.url.startswith(own) else wrong.append(f"foreign: {sent.url}"))
    return wrong


def test_the_landing_page(view, artefacts):
    page, name = view
    page.goto("/index.html")
    page.screenshot(path=artefacts / f"index-{name}.png", full_page=True)
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.locator("article table a").count() >= 10
    _fits(page)


def test_a_chapter_with_formulas(view, artefacts):
    page, name = view
    page.goto("/notebooks/02_lora_by_hand.html")
    page.wait_for_function("document.fonts.status === 'loaded'")
    page.locator("div.math").first.scroll_into_view_if_needed()
    page.screenshot(path=artefacts / f"formulas-{name}.png")
    page.locator("div.cell_output img").first.scroll_into_view_if_needed()
    page.screenshot(path=artefacts / f"picture-{name}.png")
    assert page.locator("math").count() > 20
    height = "element => element.getBoundingClientRect().height"
    assert all(page.locator("div.math math").nth(k).evaluate(height) > 10 for k in range(3))
    assert page.evaluate("document.fonts.check('16px \"Course Math\"')")
    assert page.locator(".next-page").count() == 1 and page.locator(".prev-page").count() == 1
    dark = "getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] < 128"
    assert page.evaluate(dark) is name.endswith("dark")
    _fits(page)


def test_a_slider_moves_by_keyboard(view, artefacts):
    page, name = view
    page.goto(f"/{_with_slider()}")
    slider = page.locator(".picture-slider").first
    control, window = slider.locator("input"), slider.locator(".picture-slider-window").last
    slider.scroll_into_view_if_needed()
    control.focus()
    values = [_state(control, window)]
    for key in ("ArrowRight", "Home", "End"):
        page.keyboard.press(key)
        values.append(_state(control, window))
    page.keyboard.press("ArrowLeft")
    slider.screenshot(path=artefacts / f"slider-{name}.png")
    said, alts, places, pictures = zip(*values, strict=True)
    for kind in (said, alts, places, pictures):
        assert kind[0] != kind[1] != kind[2] != kind[3], kind
    assert slider.locator("label + span").text_content() == control.get_attribute("aria-valuetext")
    assert control.evaluate("range => range.labels.length") == 1
    _fits(page)


def test_without_programs_a_slider_is_a_still_picture(browser, address, artefacts):
    context = browser.new_context(java_script_enabled=False, base_url=address)
    page = context.new_page()
    page.goto(f"/{_with_slider()}")
    slider = page.locator(".picture-slider").first
    assert not slider.locator("input").is_visible() and slider.locator("img").first.is_visible()
    assert slider.locator("label + span").text_content() == slider.locator("input").get_attribute("aria-valuetext")
    slider.screenshot(path=artefacts / "slider-still.png")
    context.close()


def _with_slider() -> str:
    """The first page with a slider whose files the course has kept."""
    for path in sorted(site.OUTPUT.rglob("*.html")):
        if 'class="picture-slider"' in path.read_text(encoding="utf-8"):
            return path.relative_to(site.OUTPUT).as_posix()
    pytest.skip("no page of the site has a slider: make course, then make site")


def _state(control, window) -> tuple:
    """What is said of a slider's value and shown for it: value, alt text, place in the file of pictures, pixels."""
    place = "box => [box.offsetLeft, box.offsetTop]"
    picture = window.locator("img")
    alt, value = picture.get_attribute("alt"), control.get_attribute("aria-valuetext")
    return value, alt, picture.evaluate(place), window.screenshot()


def test_every_page_fits_a_phone(browser, address):
    context = browser.new_context(viewport={"width": 390, "height": 844}, base_url=address)
    page = context.new_page()
    for path in sorted(site.OUTPUT.rglob("*.html")):
        page.goto(f"/{path.relative_to(site.OUTPUT).as_posix()}", wait_until="domcontentloaded")
        _fits(page)
    context.close()


def test_the_search(view, artefacts):
    page, name = view
    page.goto("/search.html")
    page.locator("article input[name=q], .sidebar-search").locator("visible=true").first.fill("guidance")
    page.keyboard.press("Enter")
    page.locator("#search-results li").first.wait_for()
    page.wait_for_load_state("networkidle")
    page.screenshot(path=artefacts / f"search-{name}.png")
    found = page.locator("#search-results li a").all_text_contents()
    assert any("The parts of Stable Diffusion" in text for text in found), found
    _fits(page)


def test_the_site_works_from_a_folder_without_a_server(browser):
    page = browser.new_page()
    wrong = watch(page, site.OUTPUT.as_uri())
    for name in ("index.html", "notebooks/01_stable_diffusion.html", "search.html?q=guidance"):
        page.goto(f"{site.OUTPUT.as_uri()}/{name}")
    page.locator("#search-results li").first.wait_for()
    page.wait_for_load_state("networkidle")
    page.close()
    assert wrong == []


def test_the_watch_sees_what_goes_wrong(browser, address):
    page = browser.new_page()
    wrong = watch(page, address)
    page.goto(f"{address}/index.html")
    assert wrong == []
    page.route("https://cdn.example.org/**", lambda route: route.abort())  # nothing leaves this machine
    page.evaluate("""() => { const picture = new Image(); picture.src = "https://cdn.example.org/a.png";
        document.body.append(picture); console.error("an error"); fetch("gone.html"); }""")
    page.wait_for_load_state("networkidle")
    page.close()
    for expected in ("foreign: https://cdn.example.org/a.png", "an error", f"404: {address}/gone.html"):
        assert expected in wrong


def _fits(page) -> None:
    assert not page.evaluate(WIDE), f"{page.url} scrolls sideways"
    assert page.evaluate(STICKS_OUT) == [], f"{page.url} is wider than the window"

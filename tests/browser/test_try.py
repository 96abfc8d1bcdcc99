"""The page "Try it" of the built site in a browser: `make site` first, or these are skipped.

Prints how long the first picture takes, from the click. COURSE_ARTEFACTS names a folder for the screenshots.
"""

import io
import json
import time

import pytest
from PIL import Image

from helpers.course import site
from helpers.playground.engine import CHUNK

from .test_site import SIZES, _fits, address, artefacts, browser, pytestmark, watch  # noqa: F401  (fixtures)

TRY = site.OUTPUT / "try"
pytestmark = [
    *pytestmark,
    pytest.mark.skipif(not (TRY / "model" / "manifest.json").exists(), reason="the site was built without the model"),
]
PATIENCE = 300_000  # milliseconds: the machine may be busy
STEPS = 3


@pytest.fixture(params=[("desk", "light"), ("phone", "dark")], ids="-".join)
def page(request, browser, address):  # noqa: F811
    """The page, opened; at the end nothing may have failed, or been asked of another host."""
    size, scheme = request.param
    width, height = SIZES[size]
    options = {"viewport": {"width": width, "height": height}, "color_scheme": scheme, "base_url": address}
    context = browser.new_context(**options, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    wrong = watch(page, address)
    page.goto("/try.html")
    page.wait_for_function("document.querySelectorAll('#try-adapter input').length > 1")
    yield page
    context.close()
    assert wrong == []


def said(page) -> str:
    return page.locator("#try-status").text_content()


def wait_for(page, words: str) -> None:
    page.wait_for_function("w => document.getElementById('try-status').textContent.includes(w)", arg=words)


def pixels(page, name: str) -> str:
    """A canvas as text: equal for equal pictures."""
    return page.evaluate("name => document.getElementById(`try-${name}`).toDataURL()", name)


def draw(page) -> None:
    page.locator("#try-draw").click()
    wait_for(page, "Drawn in")


def test_before_anything_is_loaded(page, artefacts, request):  # noqa: F811
    shown = page.locator("#try figure img:visible")
    assert shown.count() == 2 and page.evaluate("[...document.images].every((image) => image.naturalWidth > 0)")
    asked = page.evaluate("performance.getEntriesByType('resource').map((entry) => entry.name).join()")
    assert ".onnx" not in asked and ".wasm" not in asked and ".safetensors" not in asked
    assert "Nothing is loaded yet" in page.locator("#try-loaded").text_content() and "beforehand" in said(page)
    page.screenshot(path=artefacts / f"try-{request.node.callspec.id}.png", full_page=True)
    _fits(page)


def test_a_picture_from_a_prompt(page, artefacts, request, capsys):  # noqa: F811
    page.locator("#try-prompt").fill("a drawing of a cat with a zeppelin")
    assert "zeppelin" in page.locator("#try-remark").text_content()
    page.locator("#try-steps").fill(str(STEPS))
    page.locator("#try-adapter input[value=doodles]").check()
    began = time.perf_counter()
    draw(page)
    with capsys.disabled():
        print(f"\nfrom the click to both pictures, {STEPS} steps each: {time.perf_counter() - began:.1f} s")
    assert page.locator("#try figure img:visible").count() == 0
    before, after = pixels(page, "before"), pixels(page, "after")
    assert before != after, "the adapter changes the picture"
    page.screenshot(path=artefacts / f"try-drawn-{request.node.callspec.id}.png", full_page=True)

    # The slider draws again, what the adapter does and nothing else; at 0 it does nothing.
    page.locator("#try-scale").focus()
    page.keyboard.press("Home")
    page.wait_for_function("() => location.hash.includes('scale=-0.5')")
    wait_for(page, "Drawn in")
    assert pixels(page, "after") not in (before, after) and pixels(page, "before") == before
    page.locator("#try-scale").fill("0")
    page.wait_for_function("() => location.hash.includes('scale=0&') || location.hash.endsWith('scale=0')")
    wait_for(page, "Drawn in")
    assert pixels(page, "after") == before

    # What is saved has the settings in it.
    page.locator("#try-scale").fill("1")
    page.wait_for_function("() => location.hash.endsWith('scale=1')")
    wait_for(page, "Drawn in")
    assert pixels(page, "after") == after
    with page.expect_download() as download:
        page.locator("#try-save").click()
    with Image.open(io.BytesIO(download.value.path().read_bytes())) as picture:
        facts = json.loads(picture.info[CHUNK])
    assert facts["prompt"] == "a drawing of a cat with a zeppelin" and facts["steps"] == STEPS

    # The link brings the same picture.
    link = page.url
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_function("document.getElementById('try-prompt').value.includes('zeppelin')")
    assert "of the link" in said(page)
    draw(page)
    assert pixels(page, "after") == after
    _fits(page)


def test_cancelling(page):
    page.locator("#try-steps").fill("50")
    page.locator("#try-draw").click()
    wait_for(page, "Step 1 of")
    page.locator("#try-cancel").click()
    wait_for(page, "Cancelled")
    assert page.locator("#try-cancel").is_disabled()
    page.locator("#try-steps").fill("1")
    page.locator("#try-adapter input[value=none]").check()
    draw(page)
    assert page.locator("#try-after").is_hidden()


def test_the_builder_and_the_keyboard(page):
    page.locator("#try details summary").press("Enter")
    page.locator("#try-builder select").nth(1).select_option("man")
    page.locator("#try-builder select").nth(2).select_option("red")
    assert "a man with red hair" in page.locator("#try-prompt").input_value()
    assert page.locator("#try-remark").text_content() == ""
    page.locator("#try-adapter input:checked").press("ArrowRight")
    page.locator("#try-adapter input:checked").press("ArrowRight")
    assert page.locator("#try-adapter input:checked").input_value() == "mix" and page.locator("#try-mix").is_visible()
    page.locator("#try-seed").fill("-3")
    page.locator("#try-draw").click()
    assert "The seed should be a whole number" in said(page)
    _fits(page)


def opened(browser, address, prepare):  # noqa: F811
    """The page in a browser to which something happened."""
    page = browser.new_page(base_url=address)
    page.set_default_timeout(PATIENCE)
    prepare(page)
    page.goto("/try.html")
    return page


def test_what_does_not_arrive_is_named(browser, address):  # noqa: F811
    page = opened(browser, address, lambda page: page.route("**/decoder.onnx*", lambda route: route.abort()))
    page.locator("#try-adapter input").first.wait_for()
    page.locator("#try-draw").click()
    wait_for(page, "decoder.onnx did not arrive")
    page.unroute("**/decoder.onnx*")
    page.locator("#try-steps").fill("1")
    draw(page)
    page.close()
    page = opened(browser, address, lambda page: page.route("**/manifest.json", lambda route: route.abort()))
    wait_for(page, "The description of the model did not arrive")
    page.close()


def test_without_webassembly_the_page_says_so(browser, address):  # noqa: F811
    page = opened(browser, address, lambda page: page.add_init_script("delete globalThis.WebAssembly"))
    wait_for(page, "This browser has no WebAssembly")
    page.close()


def test_a_link_that_asks_for_too_much(browser, address):  # noqa: F811
    page = opened(browser, address, lambda page: None)
    page.goto("about:blank")
    page.goto("/try.html#steps=1000&prompt=a+cat")
    wait_for(page, "The steps should be a whole number from 1 to 50")
    page.close()

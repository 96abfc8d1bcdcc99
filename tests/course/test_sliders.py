"""The interactive pieces: what moves when a slider moves, and silence where nobody is there to move it."""

import io

import pytest
from PIL import Image

from helpers.course import sliders as widgets

COLOURS = ["red", "lime", "blue"]


def pictures(colours=COLOURS):
    return [Image.new("RGB", (4, 4), colour) for colour in colours]


def colour_of(image):
    with Image.open(io.BytesIO(image.value)) as picture:
        assert picture.width == 256
        return picture.convert("RGB").getpixel((0, 0))


@pytest.fixture
def nobody(monkeypatch):
    for name in ("COURSE_HEADLESS", "JPY_SESSION_NAME", "VSCODE_PID"):
        monkeypatch.delenv(name, raising=False)


def test_every_row_follows_the_slider():
    box = widgets.picture_slider({"one": pictures(), "other": pictures(COLOURS[::-1])}, ["0", "0.5", "1"], "scale")
    slider, columns = box.children
    one, other = (column.children[1] for column in columns.children)
    assert slider.value == "0.5" and colour_of(one) == colour_of(other) == (0, 255, 0)
    slider.value = "1"
    assert colour_of(one) == (0, 0, 255) and colour_of(other) == (255, 0, 0)
    assert [column.children[0].value for column in columns.children] == ["one", "other"]


def test_a_row_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="'one' has 2 pictures for 3 values"):
        widgets.picture_slider({"one": pictures(COLOURS[:2])}, ["0", "0.5", "1"], "scale")


@pytest.mark.parametrize("name", ["JPY_SESSION_NAME", "VSCODE_PID"])
def test_it_is_shown_to_somebody_and_not_headlessly(nobody, monkeypatch, name):
    shown = []
    monkeypatch.setattr(widgets, "display", shown.append)
    widgets.show_slider({"one": pictures()}, ["0", "0.5", "1"], "scale")
    assert shown == []
    monkeypatch.setenv(name, "notebooks/x.ipynb")
    widgets.show_slider({"one": pictures()}, ["0", "0.5", "1"], "scale")
    assert len(shown) == 1
    monkeypatch.setenv("COURSE_HEADLESS", "1")
    widgets.show_slider({"one": pictures()}, ["0", "0.5", "1"], "scale")
    assert len(shown) == 1

"""The interactive pieces: what moves when a slider moves, and silence where nobody is there to move it."""

import ast
import io
import json

import numpy as np
import pytest
from PIL import Image

from helpers.cli import run
from helpers.course import notebooks, results
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
    for name in ("COURSE_HEADLESS", "COURSE_NOTEBOOK", "JPY_SESSION_NAME", "VSCODE_PID"):
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
    with pytest.raises(ValueError, match="'one' has 2 pictures for 3 values"):
        widgets.show_slider({"one": pictures(COLOURS[:2])}, ["0", "0.5", "1"], "scale")
    with pytest.raises(ValueError, match="at least one picture"):
        widgets.show_slider({}, ["0"], "scale")


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


# ----------------------------------------------------------------------------------------------- kept for the site
@pytest.fixture
def executed(nobody, tmp_path, monkeypatch):
    """As in a kernel of the course; the folder where it writes."""
    monkeypatch.setattr(results, "_weights_hash", lambda preset: "weights")
    monkeypatch.setattr(results, "_data_hashes", lambda preset: {})
    given = {"HEADLESS": "1", "NOTEBOOK": "02_lora", "PRESET": "mini", "OUTPUT": str(tmp_path)}
    for name, value in given.items():
        monkeypatch.setenv(f"COURSE_{name}", value)
    return tmp_path


def picture_at(folder, facts, title, index):
    """The picture of one row and value, cut out of the sprite."""
    place = next(row["places"] for row in facts["rows"] if row["title"] == title)[index]
    width, height = facts["size"]
    left, top = place % facts["columns"] * width, place // facts["columns"] * height
    with Image.open(folder / "figures" / "sliders" / "02_adapter_scale.webp") as sprite:
        return sprite.convert("RGB").crop((left, top, left + width, top + height))


def test_executed_by_the_course_its_pictures_are_kept(executed, monkeypatch):
    shown = []
    monkeypatch.setattr(widgets, "display", shown.append)
    three = [Image.new("RGB", (32, 32), colour) for colour in COLOURS]
    rows = {"one": three, "other": [three[0], three[0], Image.new("RGB", (64, 64), "yellow")]}
    widgets.show_slider(rows, ["0", "0.5", "scale\n1"], "adapter scale")
    folder = executed / "figures" / "sliders"
    assert shown == [] and {path.name for path in folder.iterdir()} == {
        "02_adapter_scale.json",
        "02_adapter_scale.webp",
    }
    facts = json.loads((folder / "02_adapter_scale.json").read_text())
    assert (facts["notebook"], facts["description"]) == ("02_lora", "adapter scale")
    assert facts["alt"] == "Pictures by adapter scale, from 0 to scale 1: one; other"
    assert facts["values"] == ["0", "0.5", "scale 1"] and facts["size"] == [64, 64] and facts["columns"] == 2
    assert facts["rows"] == [{"title": "one", "places": [0, 1, 2]}, {"title": "other", "places": [0, 0, 3]}]
    for title, colours in (("one", COLOURS), ("other", ["red", "red", "yellow"])):
        for index, colour in enumerate(colours):
            wanted = Image.new("RGB", (64, 64), colour)
            found = picture_at(executed, facts, title, index)
            assert np.abs(np.subtract(found, wanted, dtype=float)).mean() < 3, (title, index)


def test_the_files_are_noted_as_figures_are_and_published(executed, tmp_path, monkeypatch):
    widgets.show_slider({"one": pictures()}, ["0", "0.5", "1"], "adapter scale")
    noted = results.Results("mini")
    entry = noted.figures["slider_02_adapter_scale"]
    assert entry["file"] == "figures/sliders/02_adapter_scale.webp" and entry["notebook"] == "02_lora"
    assert noted.data["provenance"][entry["provenance"]]["weights"] == "weights"
    monkeypatch.setattr(run, "ROOT", tmp_path / "repository")
    run.publish(noted, [])
    for name in ("02_adapter_scale.webp", "02_adapter_scale.json"):
        published = tmp_path / "repository" / "figures" / "sliders" / name
        assert published.read_bytes() == (executed / "figures" / "sliders" / name).read_bytes()
    noted.forget("02_lora")
    assert noted.figures == {}


def test_the_same_pictures_are_the_same_bytes(executed):
    def written():
        path = widgets.keep_slider({"one": pictures()}, ["0", "0.5", "1"], "scale", "mini", "02_lora")
        return path.read_bytes(), path.with_suffix(".webp").read_bytes()

    assert written() == written()


@pytest.mark.parametrize(("count", "size"), [(3, 128), (30, 128), (4, 512)])
def test_a_sprite_is_small_whatever_is_on_it(count, size):
    """Noise is what compresses worst."""
    draws = np.random.default_rng(0)
    noise = [Image.fromarray(draws.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]
    data, (width, height), columns = widgets.sprite(noise)
    assert len(data) <= widgets.MOST_BYTES and width == height <= 256
    with Image.open(io.BytesIO(data)) as sheet:
        assert sheet.format == "WEBP" and sheet.size == (columns * width, -(-count // columns) * height)
    assert widgets.sprite([Image.new("RGB", (128, 96))] * count)[1] == (128, 96), "plain ones keep their size"


def test_the_site_can_tell_the_sliders_of_a_notebook_apart():
    found = 0
    for path in notebooks.committed():
        cells = [cell.source for cell in notebooks.read(path).cells if "show_slider(" in cell.get("source", "")]
        nodes = [node for cell in cells for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Call)]
        calls = [node for node in nodes if getattr(node.func, "id", "") == "show_slider"]
        names = [ast.literal_eval(call.args[2]) for call in calls]
        assert len(set(map(results.slug, names))) == len(names), f"{path.name} has two sliders of one description"
        found += len(names)
    assert found >= 5

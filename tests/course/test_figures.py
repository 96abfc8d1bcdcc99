"""Figures: nothing clipped, nothing overlapping, readable when printed, the same bytes every time, alt text kept."""

import io
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from helpers.course import figures, results
from helpers.course.figures import (
    PAGE_WIDTH,
    curves,
    grid,
    new_figure,
    picture_difference,
    save_figure,
    show,
    smooth,
    strip,
)

LONG = "a drawing of an orange cat with glasses and a black bow tie, on a blue background"


def picture(colour="red", size=16):
    return Image.new("RGB", (size, size), colour)


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_OUTPUT", str(tmp_path))
    monkeypatch.setattr(results, "_weights_hash", lambda preset: "weights")
    monkeypatch.setattr(results, "_data_hashes", lambda preset: {})
    return tmp_path


def boxes(fig: Figure) -> tuple[list, list]:
    """Extents of all texts and all pictures, in pixels."""
    renderer = fig.canvas.get_renderer()
    texts = [text.get_window_extent(renderer) for text in fig.texts]
    return texts, [axes.get_window_extent(renderer) for axes in fig.axes]


def overlap(a, b) -> bool:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return width > 1 and height > 1


GRIDS = {
    "one": {"rows": 1, "columns": 1},
    "labels": {"rows": 3, "columns": 4, "row_labels": [LONG, "b", "c"], "column_labels": [LONG, "2", "3", "4"]},
    "captions": {"rows": 2, "columns": 3, "captions": [[LONG] * 3, ["short", None, "≈0.93"]], "title": LONG},
    "evolution": {"rows": 2, "columns": 7, "row_labels": [LONG, LONG], "column_labels": ["epoch 10\nstep 1000"] * 7},
    "many": {"rows": 1, "columns": 12, "column_labels": ["epoch 10"] * 12, "row_labels": ["doodles"], "title": "all"},
    "long word": {"rows": 1, "columns": 3, "column_labels": ["Donaudampfschifffahrtsgesellschaft"] * 3},
}


TOO_MANY = {"rows": 1, "columns": 20, "column_labels": ["epoch 10"] * 20, "row_labels": [LONG]}


@pytest.mark.parametrize("name", [*GRIDS, "too many"])
def test_nothing_is_clipped_and_nothing_overlaps(name):
    spec = dict(GRIDS.get(name, TOO_MANY))
    rows, columns = spec.pop("rows"), spec.pop("columns")
    fig = grid([[picture()] * columns] * rows, **spec)
    texts, pictures = boxes(fig)
    width, height = fig.get_size_inches() * fig.dpi
    assert len(pictures) == rows * columns
    for box in texts + pictures:
        assert box.x0 >= -0.5 and box.y0 >= -0.5 and box.x1 <= width + 0.5 and box.y1 <= height + 0.5
    every = texts + pictures
    for i, first in enumerate(every):
        for second in every[i + 1 :]:
            assert not overlap(first, second)


@pytest.mark.parametrize("name", GRIDS)
def test_text_is_readable_on_paper(name):
    spec = dict(GRIDS[name])
    rows, columns = spec.pop("rows"), spec.pop("columns")
    fig = grid([[picture()] * columns] * rows, **spec)
    shrunk = min(1.0, PAGE_WIDTH / fig.get_size_inches()[0])
    for text in fig.texts:
        assert text.get_fontsize() * shrunk >= 6.95


def test_pictures_are_square_and_interpolated():
    fig = grid([[picture()], [picture("blue")]])
    for axes in fig.axes:
        box = axes.get_window_extent()
        assert box.width == pytest.approx(box.height)
        assert axes.images[0].get_interpolation() == "lanczos"


def test_none_leaves_a_cell_empty_and_rows_may_differ():
    assert len(grid([[picture(), None, picture()], [picture()]]).axes) == 3


def test_dollar_signs_are_text():
    grid([[picture()]], column_labels=["$x and $$"], title="costs $5").canvas.draw()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pictures": []}, "at least one"),
        ({"pictures": [[None]]}, "at least one"),
        ({"pictures": [[picture()]], "row_labels": ["a", "b"]}, "row labels"),
        ({"pictures": [[picture()]], "column_labels": []}, "column labels"),
        ({"pictures": [[picture()]], "captions": [["a", "b"]]}, "captions"),
    ],
)
def test_grids_that_do_not_add_up(kwargs, message):
    with pytest.raises(ValueError, match=message):
        grid(**kwargs)


def test_saved_figures_are_the_same_bytes(output):
    def make():
        return strip([picture("red"), picture("blue")], ["red", "blue"])

    first = save_figure(make(), "fig01_test", "mini", "a red and a blue square", "MiniSD").read_bytes()
    second = save_figure(make(), "fig01_test", "mini", "a red and a blue square", "MiniSD").read_bytes()
    assert first == second
    info = Image.open(io.BytesIO(first)).info
    assert info["Source"] == "MiniSD" and info["Description"] == "a red and a blue square"
    assert "Software" not in info
    assert info["dpi"][0] == pytest.approx(200, abs=0.1)


def test_plots_are_saved_as_vectors_too_and_pictures_are_not(output):
    def plot():
        fig, ax = new_figure()
        ax.plot([0, 1], [1, 0])
        return fig

    path = save_figure(plot(), "fig04_plot", "mini", "one line that falls", "MiniSD").with_suffix(".svg")
    first = path.read_bytes()
    assert b"<image" not in first and b"<text" not in first, "letters are outlines: no font is needed to print them"
    save_figure(plot(), "fig04_plot", "mini", "one line that falls", "MiniSD")
    assert path.read_bytes() == first and b"Matplotlib v" not in first
    save_figure(strip([picture()]), "fig05_strip", "mini", "one plain red square", "MiniSD")
    figures_noted = results.Results("mini").figures
    assert figures_noted["fig04_plot"]["vector"] == "figures/fig04_plot.svg" and path.exists()
    assert "vector" not in figures_noted["fig05_strip"] and not path.with_name("fig05_strip.svg").exists()


def test_saved_figures_are_registered(output):
    fig = strip([picture()])
    path = save_figure(fig, "fig02_x", "mini", "one plain red square", "MiniSD", run="abc", seed=7, notebook="03_y")
    assert path == output / "figures" / "fig02_x.png"
    entry = results.Results("mini").figures["fig02_x"]
    wanted = {"file": "figures/fig02_x.png", "model": "MiniSD", "run": "abc", "seed": 7, "notebook": "03_y"}
    assert wanted.items() <= entry.items()
    assert entry["width"] == Image.open(path).width


@pytest.mark.parametrize(("name", "alt"), [("fig", ""), ("fig", "grid"), ("../fig", "four words of text")])
def test_figures_need_an_alt_text_and_a_plain_name(output, name, alt):
    with pytest.raises(ValueError, match="alt text|file name"):
        save_figure(strip([picture()]), name, "mini", alt, "MiniSD")
    assert not list(output.rglob("*.png"))


def test_say_displays_markdown_that_plain_text_holds_too(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, **options: shown.append((data, options)))
    figures.say("**Half** of them.")
    assert shown == [({"text/markdown": "**Half** of them.", "text/plain": "**Half** of them."}, {"raw": True})]


def test_show_displays_jpeg_with_its_alt_text(output, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, **kwargs: shown.append((data, kwargs)))
    fig = strip([picture()])
    with pytest.raises(ValueError, match="alt text"):
        show(fig)
    save_figure(fig, "fig03_x", "mini", "one plain red square", "MiniSD")
    show(fig)
    [(data, kwargs)] = shown
    assert set(data) == {"image/jpeg", "text/plain"} and data["text/plain"] == "one plain red square"
    assert kwargs["metadata"] == {"image/jpeg": {"alt": "one plain red square"}}


@pytest.mark.parametrize(("sharp", "pixels"), [(True, 1), (False, 2)])
def test_jpeg_keeps_colour_at_every_pixel_when_asked(sharp, pixels):
    data = figures.jpeg(picture(), quality=95, sharp_colours=sharp)
    luma, *chroma = Image.open(io.BytesIO(data)).layer
    assert luma[1:3] == (pixels, pixels) and all(layer[1:3] == (1, 1) for layer in chroma)


def test_new_figures_do_not_belong_to_pyplot():
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    fig, axes = new_figure(1, 2)
    assert pyplot.get_fignums() == before and len(axes) == 2 and fig.get_facecolor()[:3] == (1, 1, 1)


def test_smoothing_has_no_bias():
    assert smooth([3.0] * 5, 0.9) == pytest.approx([3.0] * 5)
    assert smooth([1.0, 2.0], 0.5)[1] == pytest.approx((0.5 * 1 + 1 * 2) / 1.5)
    assert smooth([1.0, 5.0], 0.0) == pytest.approx([1.0, 5.0])
    with pytest.raises(ValueError, match="below 1"):
        smooth([1.0], 1.0)


@pytest.mark.parametrize("missing", [None, math.inf, math.nan])
def test_a_value_that_is_missing_leaves_a_gap_and_no_more(missing):
    """fp16 skips a step whose gradient overflows: the rest of the curve must stay."""
    smoothed = smooth([1.0, missing, 2.0], 0.5)
    assert np.isnan(smoothed[1]) and smoothed[[0, 2]] == pytest.approx(smooth([1.0, 2.0], 0.5))
    curves({"norm": (range(3), [1.0, missing, 2.0])}, log=True)


def test_curves_draw_raw_and_smoothed_lines_that_differ_in_dashes():
    x = np.arange(10)
    fig = curves({"a": (x, x * 1.0), "b": (x, x * 2.0)}, title="t", log=False)
    raw_a, line_a, raw_b, line_b = fig.axes[0].lines
    assert raw_a.get_alpha() < 1 and line_a.get_alpha() is None
    assert line_a.get_linestyle() != line_b.get_linestyle() and line_a.get_color() != line_b.get_color()
    assert list(raw_b.get_ydata()) == list(x * 2.0)
    with pytest.raises(ValueError, match="'a'"):
        curves({"a": ([1, 2], [1])})


def test_picture_difference(tmp_path):
    for name, colour, size in (("a", (10, 10, 10), 8), ("b", (13, 10, 10), 8), ("c", (10, 10, 10), 9)):
        picture(colour, size).save(tmp_path / f"{name}.png")
    assert picture_difference(tmp_path / "a.png", tmp_path / "a.png") == 0
    assert picture_difference(tmp_path / "a.png", tmp_path / "b.png") == pytest.approx(1.0)
    assert picture_difference(tmp_path / "a.png", tmp_path / "c.png") is None


class FakeRun:
    """A finished run whose picture of each validated step has one colour."""

    def __init__(self, **colours):
        self.colours = {int(step[1:]): colour for step, colour in colours.items()}

    def validations(self):
        return [(step, 0) for step in self.colours]

    def validation_pictures(self, step):
        return [picture(self.colours[step], 32)] * 3


def test_the_style_comes_in_step_by_step_for_all_runs_together():
    runs = [FakeRun(s0="red", s10="green", s30="blue"), FakeRun(s0="black", s20="yellow", s30="white")]
    frames = figures.animation_frames(runs, per_run=2, size=64)
    assert len(frames) == 4, "steps 0, 10, 20, 30"
    assert {frame.size for frame in frames} == {(4 * 66 - 2, 64 + 12)}
    colours = [[frame.getpixel((x, 32)) for x in (32, 98, 164, 230)] for frame in frames]
    assert colours[2] == [(0, 128, 0)] * 2 + [(255, 255, 0)] * 2, "a run shows its latest validation"
    bars = [sum(frame.getpixel((x, 66)) != (255, 255, 255) for x in range(frame.width)) for frame in frames]
    assert bars == sorted(bars) and bars[0] <= 1 and bars[-1] == frames[0].width
    with pytest.raises(ValueError, match="at least one finished run"):
        figures.animation_frames([])


def test_an_animation_is_small_repeats_and_has_the_same_bytes_again(tmp_path):
    rng = np.random.default_rng(0)
    noisy = FakeRun(s0="red", s10="green", s30="blue")
    noise = [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(3)]
    noisy.validation_pictures = lambda step: noise
    path = figures.save_animation([noisy], tmp_path / "x" / "strip.webp", size=64)
    with Image.open(path) as strip:
        assert (strip.format, strip.n_frames, strip.info["loop"]) == ("WEBP", 3, 0)
    large = path.read_bytes()
    assert figures.save_animation([noisy], path, size=64).read_bytes() == large
    assert len(figures.save_animation([noisy], path, most_bytes=len(large) - 1, size=64).read_bytes()) < len(large)
    with pytest.raises(ValueError, match="do not fit 100 bytes"):
        figures.save_animation([noisy], tmp_path / "y.webp", most_bytes=100, size=64)
    assert not (tmp_path / "y.webp").exists()

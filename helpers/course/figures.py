"""Figures that can be read when printed: grids of pictures, curves, and saving them with where they come from.

Sizes are in inches, text in points. A figure is laid out for a page's text width (`PAGE_WIDTH`): a wider one is
shrunk by whoever prints it, so its text is made larger in proportion and ends at no less than 7 points on paper (a
grid of more than a dozen columns excepted).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from PIL import Image, ImageDraw, ImageFont

from helpers.base.files import atomic_path
from helpers.course.results import Results, output_folder
from helpers.presets.configuration import Preset
from helpers.presets.variants import get_preset

# Okabe and Ito's palette (Color Universal Design, 2008), which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")

PAGE_WIDTH = 6.3  # inches: A4 with margins of 25 mm
DPI = 200
POINTS = 72  # a point is 1/72 inch
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "figure.titlesize": 10,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLOURS),
    "lines.linewidth": 1.5,
    "figure.dpi": 110,
}
_LABEL_SIZE, _CAPTION_SIZE, _TITLE_SIZE = 8.0, 7.0, 10.0
_LINE_HEIGHT = 1.25  # times the font size


def style() -> Any:
    """The house style, for a `with` block around one's own matplotlib code."""
    return matplotlib.rc_context(STYLE)


def new_figure(rows: int = 1, columns: int = 1, width: float = PAGE_WIDTH, height: float = 2.6, **kwargs: Any):
    """A figure in the house style and its axes (one, or an array of them): (Figure, axes).

    It does not belong to pyplot, so a notebook shows it when `show` is called and not a second time.
    kwargs go to `Figure.subplots`.
    """
    with style():
        fig = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(fig)
        return fig, fig.subplots(rows, columns, **kwargs)


# -------------------------------------------------------------------------------------------------------- grids
def grid(
    pictures: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    title: str | None = None,
    cell: float = 1.1,
    captions: Sequence[Sequence[str | None]] | None = None,
) -> Figure:
    """Rows of pictures with labels on the left and on top, and a caption under each.

    pictures: rows of PIL pictures of any size, drawn `cell` inches wide with Lanczos interpolation (narrower when the
    row would not fit the page, down to half an inch); None leaves a cell empty, and rows may differ in length.
    Labels and captions are broken into lines to fit. Nothing is clipped and nothing overlaps: every text is measured.
    Raises ValueError when there are no pictures or the labels do not match them.
    """
    pictures = [list(row) for row in pictures]
    columns = max((len(row) for row in pictures), default=0)
    if not columns or all(picture is None for row in pictures for picture in row):
        raise ValueError("a grid needs at least one picture")
    for what, labels, wanted in (("row", row_labels, len(pictures)), ("column", column_labels, columns)):
        if labels is not None and len(labels) != wanted:
            raise ValueError(f"{wanted} {what}s of pictures need {wanted} {what} labels, not {len(labels)}")
    if captions is not None and [len(row) for row in captions] != [len(row) for row in pictures]:
        raise ValueError("captions must have the same rows and columns as the pictures")
    with style():
        return _Grid(pictures, columns, row_labels, column_labels, title, cell, captions).draw()


def strip(pictures: Sequence[Image.Image | None], labels: Sequence[str] | None = None, **kwargs: Any) -> Figure:
    """One row of pictures, each with a label on top; kwargs as for `grid`."""
    return grid([pictures], column_labels=labels, **kwargs)


class _Grid:
    """The layout of one grid, in inches, from measured text."""

    gap = 0.05

    def __init__(self, pictures, columns, row_labels, column_labels, title, cell, captions):
        self.pictures, self.columns, self.title = pictures, columns, title
        self.row_labels, self.column_labels, self.captions = row_labels, column_labels, captions
        self.fig = Figure(figsize=(1, 1))
        self.renderer = FigureCanvasAgg(self.fig).get_renderer()
        self.scale, largest = 1.0, 2.0
        self._measure(cell)
        while self.scale < largest and self.width > PAGE_WIDTH * self.scale * 1.001:
            # Larger text takes more width, which calls for still larger text: a few rounds settle it. Where they do
            # not (too many columns for one page), the text stays at twice its size.
            self.scale = min(largest, max(self.width / PAGE_WIDTH, self.scale * 1.01))
            self._measure(cell)

    def _measure(self, cell: float) -> None:
        gap, scale = self.gap, self.scale
        self.label_width, self.row_lines = 0.0, [""] * len(self.pictures)
        if self.row_labels is not None:
            limit = 1.25 * scale
            self.row_lines = [self._wrap(label, limit, _LABEL_SIZE) for label in self.row_labels]
            self.label_width = max(self._width(text, _LABEL_SIZE) for text in self.row_lines) + 2 * gap
        room = (PAGE_WIDTH * scale - self.label_width - gap) / self.columns - gap
        self.cell = max(0.5, min(cell, room))
        # A label taller than its picture would run into its neighbours: the pictures grow instead.
        self.cell = max([self.cell, *(self._height(text, _LABEL_SIZE) for text in self.row_lines)])

        self.column_lines, self.header = [""] * self.columns, 0.0
        if self.column_labels is not None:
            self.column_lines = [self._wrap(label, self.cell, _LABEL_SIZE) for label in self.column_labels]
            self.header = max(self._height(text, _LABEL_SIZE) for text in self.column_lines) + gap
        self.caption_lines = [
            [self._wrap(text or "", self.cell, _CAPTION_SIZE) for text in row] for row in self.captions or []
        ]
        heights = [[self._height(text, _CAPTION_SIZE) for text in row] for row in self.caption_lines]
        self.footers = [max(row, default=0.0) + gap for row in heights] or [0.0] * len(self.pictures)

        # One word that is wider than its cell widens the cells' spacing rather than running into its neighbour.
        widest = [self._width(text, _LABEL_SIZE) for text in self.column_lines]
        widest += [self._width(text, _CAPTION_SIZE) for row in self.caption_lines for text in row]
        self.pitch = max([self.cell, *widest]) + gap
        self.width = self.label_width + self.columns * self.pitch + gap
        self.title_lines, self.title_height = "", 0.0
        if self.title:
            self.title_lines = self._wrap(self.title, self.width - 2 * gap, _TITLE_SIZE)
            self.width = max(self.width, self._width(self.title_lines, _TITLE_SIZE) + 2 * gap)
            self.title_height = self._height(self.title_lines, _TITLE_SIZE) + gap

    def _width(self, text: str, size: float) -> float:
        """Inches that the widest line takes."""
        font = matplotlib.font_manager.FontProperties(size=size * self.scale)
        lines = text.split("\n")
        widths = [self.renderer.get_text_width_height_descent(line, font, ismath=False)[0] for line in lines if line]
        return max(widths, default=0.0) / self.fig.dpi

    def _height(self, text: str, size: float) -> float:
        return (text.count("\n") + 1) * size * self.scale * _LINE_HEIGHT / POINTS if text else 0.0

    def _wrap(self, text: str, limit: float, size: float) -> str:
        """The text broken between words so that each line is at most `limit` inches wide (a long word stays whole)."""
        lines = []
        for paragraph in text.split("\n"):
            line = ""
            for word in paragraph.split():
                longer = f"{line} {word}".strip()
                if line and self._width(longer, size) > limit:
                    lines.append(line)
                    longer = word
                line = longer
            lines.append(line)
        return "\n".join(lines)

    def draw(self) -> Figure:
        gap, scale = self.gap, self.scale
        height = gap + self.title_height + self.header + gap
        height += sum(self.cell + footer + gap for footer in self.footers)
        self.fig.set_size_inches(self.width, height)
        text = {"linespacing": _LINE_HEIGHT * 0.96, "parse_math": False}

        def put(x: float, y: float, words: str, size: float, **kwargs: Any) -> None:
            if words:
                self.fig.text(x / self.width, y / height, words, fontsize=size * scale, **text, **kwargs)

        top = height - gap
        put(self.width / 2, top, self.title_lines, _TITLE_SIZE, ha="center", va="top")
        top -= self.title_height
        for column, words in enumerate(self.column_lines):
            put(self._middle(column), top - self.header + gap, words, _LABEL_SIZE, ha="center", va="bottom")
        top -= self.header
        for row, pictures in enumerate(self.pictures):
            bottom = top - self.cell
            put(self.label_width - gap, top - self.cell / 2, self.row_lines[row], _LABEL_SIZE, ha="right", va="center")
            for column, picture in enumerate(pictures):
                left = self._middle(column) - self.cell / 2
                box = (left / self.width, bottom / height, self.cell / self.width, self.cell / height)
                self._picture(box, picture)
                if self.captions:
                    words = self.caption_lines[row][column]
                    put(self._middle(column), bottom - gap / 2, words, _CAPTION_SIZE, ha="center", va="top")
            top = bottom - self.footers[row] - gap
        return self.fig

    def _middle(self, column: int) -> float:
        return self.label_width + self.gap + (self.pitch - self.gap) / 2 + column * self.pitch

    def _picture(self, box: tuple[float, float, float, float], picture: Image.Image | None) -> None:
        if picture is None:
            return
        axes = self.fig.add_axes(box)
        axes.imshow(np.asarray(picture.convert("RGB")), interpolation="lanczos", aspect="equal")
        axes.set_axis_off()


# ------------------------------------------------------------------------------------------------------- curves
def smooth(values: Sequence[float | None], weight: float = 0.95) -> np.ndarray:
    """Exponential moving average without the bias towards zero of the first values (Kingma and Ba 2015, section 3).

    m_k = w m_{k-1} + (1 - w) x_k,  smoothed_k = m_k / (1 - w^k).  weight w: from 0 (no smoothing) to below 1.
    A value that is None or not finite, as the gradient of a step that fp16 skipped, leaves a gap and does not count.
    """
    if not 0 <= weight < 1:
        raise ValueError(f"the smoothing weight must be at least 0 and below 1, not {weight}")
    numbers = np.array([np.nan if value is None else float(value) for value in values])
    average, k, smoothed = 0.0, 0, np.full(len(numbers), np.nan)
    for i in np.flatnonzero(np.isfinite(numbers)):
        k += 1
        average = weight * average + (1 - weight) * float(numbers[i])
        smoothed[i] = average / (1 - weight**k)
    return smoothed


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float | None]]],
    xlabel: str = "step",
    ylabel: str = "loss",
    title: str | None = None,
    smoothing: float = 0.95,
    log: bool = False,
    ax: Any = None,
) -> Figure:
    """Noisy curves that can be read: each series faintly as measured, and its moving average as a line.

    series: {label: (x, y)}, x and y of equal length; smoothing: weight of `smooth`, 0 draws the values alone;
    log: logarithmic y; ax: draw into these axes instead of a new figure.
    Lines differ in colour and in dashes, so that they can be told apart in a black-and-white print.
    """
    if not series:
        raise ValueError("curves need at least one series")
    fig, axes = (ax.figure, ax) if ax is not None else new_figure()
    with style():
        for number, (label, (x, y)) in enumerate(series.items()):
            if len(x) != len(y) or not len(x):
                raise ValueError(f"the series {label!r} needs as many x as y, not {len(x)} and {len(y)}")
            colour, dashes = COLOURS[number % len(COLOURS)], LINE_STYLES[number % len(LINE_STYLES)]
            if smoothing:
                axes.plot(x, np.array(y, dtype=float), color=colour, alpha=0.2, linewidth=0.7)  # None becomes a gap
            axes.plot(x, smooth(y, smoothing), color=colour, linestyle=dashes, label=label)
        axes.set(xlabel=xlabel, ylabel=ylabel, **({"yscale": "log"} if log else {}))
        if title:
            axes.set_title(title)
        axes.legend(frameon=False)
    return fig


# ------------------------------------------------------------------------------------------- saving and showing
def save_figure(
    fig: Figure,
    name: str,
    preset: str | Preset,
    alt: str,
    model: str,
    run: Any = None,
    seed: int | None = None,
    **provenance: Any,
) -> Path:
    """Writes `figures/<name>.png` in the preset's output folder, notes it in results.json, and returns the file.

    One without pictures in it is also written as `<name>.svg`, which the report prints: lines and letters at any size.

    name: such as "fig06_evolution_doodles"; alt: the sentence that a reader hears who cannot see the figure;
    model: the title of the base model that drew the pictures ("MiniSD" is never labelled Stable Diffusion);
    run: the training run or its key; seed: of the initial latents; provenance: more facts, such as notebook="06_…".
    The bytes depend on the figure alone (no date, no software version). Raises ValueError without an alt text.
    """
    if not alt or len(alt.split()) < 4:
        raise ValueError(f"the figure {name!r} needs an alt text: a sentence that says what can be seen")
    if Path(name).name != name or not name:
        raise ValueError(f"the name of a figure is a file name without folders, not {name!r}")
    preset = get_preset(preset) if isinstance(preset, str) else preset
    path = output_folder(preset) / "figures" / f"{name}.png"
    metadata = {"Software": None, "Title": name, "Description": alt, "Source": model}
    with atomic_path(path) as temporary:
        _save(fig, temporary, format="png", dpi=DPI, metadata=metadata)
    vector = path.with_suffix(".svg") if not any(ax.images for ax in fig.axes) else None
    if vector:
        with atomic_path(vector) as temporary, matplotlib.rc_context({"svg.hashsalt": name}):
            _save(fig, temporary, format="svg", metadata={"Date": None, "Creator": None, "Title": name})
    key = getattr(run, "key", run)
    files = {"file": f"figures/{path.name}", "vector": vector and f"figures/{vector.name}"}
    facts = {**files, "alt": alt, "model": model, "run": key, "seed": seed, **provenance}
    with Image.open(path) as picture:
        Results(preset).record_figure(name, **facts, width=picture.width, height=picture.height)
    fig._course_alt = alt  # type: ignore[attr-defined]  # for `show`
    return path


def _save(fig: Figure, target: Any, **kwargs: Any) -> None:
    with style():
        fig.savefig(target, facecolor="white", **kwargs)


def to_picture(fig: Figure, dpi: int = DPI) -> Image.Image:
    """The figure as a PIL picture (RGB)."""
    buffer = io.BytesIO()
    _save(fig, buffer, format="png", dpi=dpi)
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


def jpeg(picture: Image.Image, quality: int = 88, sharp_colours: bool = False) -> bytes:
    """The picture as JPEG bytes, transparent parts on white.

    quality: 1 to 95. sharp_colours: keep colour at every pixel (4:4:4), which coloured lines and lettering need to stay
    sharp when printed; by default it is kept for every second one in either direction (4:2:0), in fewer bytes.
    """
    if picture.mode in ("RGBA", "LA", "P"):
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    buffer = io.BytesIO()
    picture.convert("RGB").save(
        buffer, format="JPEG", quality=quality, optimize=True, subsampling="4:4:4" if sharp_colours else "4:2:0"
    )
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------- animation
_FRAME_MS, _FIRST_MS, _LAST_MS = 900, 1500, 3500


def animation_frames(runs: Sequence[Any], per_run: int = 2, size: int = 256) -> list[Image.Image]:
    """The style coming in: one frame per validated step of any of the runs, with the pictures of all of them in a row.

    runs: finished runs (`helpers.training.runs.Run`), of each the first `per_run` validation pictures, `size` pixels
    wide. A run without a validation at a frame's step shows its latest one before. Below stand the step and a bar.
    Raises ValueError without a run.
    """
    if not runs:
        raise ValueError("an animation needs at least one finished run")
    validated = [[step for step, _ in run.validations()] for run in runs]
    steps = sorted({step for own in validated for step in own})
    gap, foot, words = size // 32, size // 5, _font(size // 10)
    frames = []
    for step in steps:
        latest = [max([s for s in own if s <= step], default=own[0]) for own in validated]
        shown = [run.validation_pictures(at)[:per_run] for run, at in zip(runs, latest, strict=True)]
        pictures = [picture for row in shown for picture in row]
        frame = Image.new("RGB", (len(pictures) * (size + gap) - gap, size + foot), "white")
        for number, picture in enumerate(pictures):
            picture = picture.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
            frame.paste(picture, (number * (size + gap), 0))
        pen = ImageDraw.Draw(frame)
        pen.rectangle((0, size + gap, frame.width * step // steps[-1], size + gap + size // 40), fill=COLOURS[1])
        text = "before training" if step == 0 else f"step {step}"
        pen.text((0, frame.height), text, "black", font=words, anchor="ld")
        frames.append(frame)
    return frames


def save_animation(runs: Sequence[Any], path: Path, most_bytes: int = 1_000_000, **kwargs: Any) -> Path:
    """Writes `animation_frames` as an animated WebP that repeats for ever, of at most so many bytes; returns the file.

    The quality is lowered until it fits. Raises ValueError when even the lowest does not.
    """
    first, *others = frames = animation_frames(runs, **kwargs)
    times = [_FIRST_MS, *[_FRAME_MS] * (len(frames) - 2), _LAST_MS] if len(frames) > 1 else [_LAST_MS]
    for quality in (90, 80, 65, 50, 30):
        buffer = io.BytesIO()
        first.save(
            buffer, "WEBP", save_all=True, append_images=others, duration=times, loop=0, quality=quality, method=6
        )
        if buffer.tell() <= most_bytes:
            with atomic_path(path) as temporary:
                temporary.write_bytes(buffer.getvalue())
            return path
    raise ValueError(f"{len(frames)} frames of {first.width} x {first.height} pixels do not fit {most_bytes} bytes")


def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's own letters, the same on every machine."""
    return ImageFont.truetype(matplotlib.font_manager.findfont(str(STYLE["font.family"])), size)


def say(sentence: str) -> None:
    """Displays a sentence of Markdown whose numbers a cell has computed: the result, stated beside its picture."""
    from IPython.display import display

    display({"text/markdown": sentence, "text/plain": sentence}, raw=True)


def show(fig: Figure | Image.Image, alt: str | None = None, dpi: int = 110) -> None:
    """Displays a figure, or a picture, in the notebook as JPEG with its alt text.

    alt: not needed after `save_figure`, which has been told. JPEG keeps a committed notebook below 1 MB.
    Raises ValueError without an alt text.
    """
    from IPython.display import display

    alt = alt or getattr(fig, "_course_alt", None)
    if not alt:
        raise ValueError("show(fig, alt=…) needs an alt text: a sentence that says what can be seen")
    picture = fig if isinstance(fig, Image.Image) else to_picture(fig, dpi)
    _close(fig)
    data = base64.b64encode(jpeg(picture)).decode()
    display({"image/jpeg": data, "text/plain": alt}, metadata={"image/jpeg": {"alt": alt}}, raw=True)


def _close(fig: Any) -> None:
    """Takes a pyplot figure out of pyplot's hands, which would show it a second time."""
    import sys

    if "matplotlib.pyplot" in sys.modules and isinstance(fig, Figure):
        sys.modules["matplotlib.pyplot"].close(fig)


# ---------------------------------------------------------------------------------------------------- comparing
def picture_difference(first: Path | str, second: Path | str) -> float | None:
    """Mean absolute difference of two picture files in grey levels of 255, or None when their sizes differ."""
    with Image.open(first) as a, Image.open(second) as b:
        if a.size != b.size:
            return None
        x, y = (np.asarray(p.convert("RGB"), dtype=np.float64) for p in (a, b))
    return float(np.abs(x - y).mean())


def contact_sheet(pictures: Iterable[Image.Image], columns: int = 8, size: int | None = None) -> Image.Image:
    """Pictures side by side without labels, for a quick look: a PIL picture `columns` wide."""
    pictures = list(pictures)
    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    size = size or pictures[0].width
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * size, rows * size), "white")
    for number, picture in enumerate(pictures):
        place = (number % columns * size, number // columns * size)
        sheet.paste(picture.convert("RGB").resize((size, size), Image.Resampling.LANCZOS), place)
    return sheet

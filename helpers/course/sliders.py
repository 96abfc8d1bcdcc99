"""Interactive pieces of the notebooks, for whoever sits in front of one.

Executed headlessly they show nothing, and the static figure beside them says the same. Every picture is drawn
beforehand, so moving a slider costs nothing and shows what the figure shows.

What the course executes also keeps its sliders as files beside the figures, `figures/sliders/<name>.webp` and `.json`,
with which the site has sliders that move (`site/conf.py`, `site/_static/sliders.js`).
"""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from IPython.display import display
from PIL import Image, ImageOps

from helpers.base.files import atomic_path, write_json_atomic
from helpers.course.results import Results, output_folder, slug

Rows = Mapping[str, Sequence[Image.Image]]
MOST_BYTES = 100_000  # of one sprite
_LARGEST = 256  # pixels of a picture's side on a sprite
_QUALITIES = (90, 80, 70, 60, 50)


def is_live() -> bool:
    """Whether somebody can move a slider: a notebook open in Jupyter, VS Code or Colab, not a headless execution.

    COURSE_HEADLESS=1 in the environment means no, whatever else there is.
    """
    if os.environ.get("COURSE_HEADLESS"):
        return False
    # Jupyter's server names the notebook to the kernels that it starts for one; the others leave traces of their own
    return any(name in os.environ for name in ("JPY_SESSION_NAME", "VSCODE_PID")) or "google.colab" in sys.modules


def show_slider(rows: Rows, values: Sequence[str], description: str) -> None:
    """Display `picture_slider` where somebody can move it; executed by the course, `keep_slider`; else nothing.

    Arguments and errors as there. On the site the slider stands below the cell whose source calls this with the
    description as a literal, so that no two of one notebook may have the same.
    """
    _check(rows, values)
    if is_live():
        display(picture_slider(rows, values, description))
    elif os.environ.get("COURSE_NOTEBOOK"):
        keep_slider(rows, values, description, os.environ.get("COURSE_PRESET", "mini"), os.environ["COURSE_NOTEBOOK"])


def picture_slider(rows: Rows, values: Sequence[str], description: str) -> Any:
    """A slider over the values, and for each row the picture that belongs to the value chosen; starts in the middle.

    rows: {title: one picture for each value}. Raises ValueError when their number is not that of the values.
    """
    import ipywidgets

    _check(rows, values)
    look = {"style": {"description_width": "initial"}, "layout": {"width": "420px"}}  # else long names are cut off
    start = values[len(values) // 2]
    slider = ipywidgets.SelectionSlider(options=list(values), value=start, description=description, **look)
    images = {title: ipywidgets.Image(format="png", width=256) for title in rows}

    def turn(_change: object = None) -> None:
        for title, image in images.items():
            image.value = png(rows[title][slider.index])

    slider.observe(turn, names="value")
    turn()
    columns = [ipywidgets.VBox([ipywidgets.Label(title), image]) for title, image in images.items()]
    return ipywidgets.VBox([slider, ipywidgets.HBox(columns)])


def _check(rows: Rows, values: Sequence[str]) -> None:
    for title, pictures in rows.items():
        if len(pictures) != len(values):
            raise ValueError(f"{title!r} has {len(pictures)} pictures for {len(values)} values")
    if not rows or not values:
        raise ValueError("a slider needs at least one picture")


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file's bytes, enlarged without smoothing where it is small."""
    buffer = io.BytesIO()
    factor = max(1, 256 // picture.width)
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


# ----------------------------------------------------------------------------------------------- kept for the site
def keep_slider(rows: Rows, values: Sequence[str], description: str, preset: str, notebook: str) -> Path:
    """Writes a slider's pictures as one file and notes it in results.json as the figures are; returns the JSON beside.

    `figures/sliders/<number of the notebook>_<description>.webp` in the preset's output folder holds every picture
    once, in lines of `columns`; the JSON says for each row which of them belongs to which value. The bytes depend on
    the arguments alone.
    """
    folder, name = output_folder(preset) / "figures" / "sliders", f"{notebook.split('_')[0]}_{slug(description)}"
    pictures, places = _different(rows)
    data, size, columns = sprite(pictures)
    labels = [" ".join(value.split()) for value in values]  # a figure's label may have lines
    alt = f"Pictures by {description}, from {labels[0]} to {labels[-1]}: {'; '.join(rows)}"
    facts = {
        "notebook": notebook,
        "description": description,
        "alt": alt,
        "values": labels,
        "size": list(size),
        "columns": columns,
        "rows": [{"title": title, "places": places[title]} for title in rows],
    }
    with atomic_path(folder / f"{name}.webp") as temporary:
        temporary.write_bytes(data)
    write_json_atomic(folder / f"{name}.json", facts)
    files = {key: f"figures/sliders/{name}.{suffix}" for key, suffix in (("file", "webp"), ("data", "json"))}
    Results(preset).record_figure(f"slider_{name}", **files, alt=alt, notebook=notebook)
    return folder / f"{name}.json"


def _different(rows: Rows) -> tuple[list[Image.Image], dict[str, list[int]]]:
    """The pictures that differ, all of one size, and {title: for each value the number of its picture}."""
    given = [picture for pictures in rows.values() for picture in pictures]
    largest = (max(picture.width for picture in given), max(picture.height for picture in given))
    pictures: dict[bytes, Image.Image] = {}
    places: dict[str, list[int]] = {title: [] for title in rows}
    for title, row in rows.items():
        for picture in row:
            same_size = ImageOps.pad(picture.convert("RGB"), largest, color="white")
            pictures.setdefault(same_size.tobytes(), same_size)
            places[title].append(list(pictures).index(same_size.tobytes()))
    return list(pictures.values()), places


def sprite(pictures: Sequence[Image.Image]) -> tuple[bytes, tuple[int, int], int]:
    """Pictures of one size as one WebP: (its bytes, the size of a picture on it, how many stand in a line).

    At most `MOST_BYTES`: at less quality where it must be, and then smaller.
    """
    width, height = pictures[0].size
    shrunk = min(1.0, _LARGEST / max(width, height))
    columns = math.ceil(math.sqrt(len(pictures)))
    while True:
        size = (max(1, round(width * shrunk)), max(1, round(height * shrunk)))
        sheet = Image.new("RGB", (columns * size[0], math.ceil(len(pictures) / columns) * size[1]), "white")
        for number, picture in enumerate(pictures):
            placed = picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
            sheet.paste(placed, (number % columns * size[0], number // columns * size[1]))
        for quality in _QUALITIES:
            buffer = io.BytesIO()
            sheet.save(buffer, "WEBP", quality=quality, method=6)
            if buffer.tell() <= MOST_BYTES:
                return buffer.getvalue(), size, columns
        shrunk *= 0.75

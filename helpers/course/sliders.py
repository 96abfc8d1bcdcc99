"""Interactive pieces of the notebooks, for whoever sits in front of one.

Executed headlessly they show nothing, and the static figure beside them says the same. Every picture is drawn
beforehand, so moving a slider costs nothing and shows what the figure shows.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from IPython.display import display
from PIL import Image


def is_live() -> bool:
    """Whether somebody can move a slider: a notebook open in Jupyter, VS Code or Colab, not a headless execution.

    COURSE_HEADLESS=1 in the environment means no, whatever else there is.
    """
    if os.environ.get("COURSE_HEADLESS"):
        return False
    # Jupyter's server names the notebook to the kernels that it starts for one; the others leave traces of their own
    return any(name in os.environ for name in ("JPY_SESSION_NAME", "VSCODE_PID")) or "google.colab" in sys.modules


def show_slider(rows: Mapping[str, Sequence[Image.Image]], values: Sequence[str], description: str) -> None:
    """Display `picture_slider` where somebody can move it, else nothing. Arguments and errors as there."""
    slider = picture_slider(rows, values, description)
    if is_live():
        display(slider)


def picture_slider(rows: Mapping[str, Sequence[Image.Image]], values: Sequence[str], description: str) -> Any:
    """A slider over the values, and for each row the picture that belongs to the value chosen; starts in the middle.

    rows: {title: one picture for each value}. Raises ValueError when their number is not that of the values.
    """
    import ipywidgets

    for title, pictures in rows.items():
        if len(pictures) != len(values):
            raise ValueError(f"{title!r} has {len(pictures)} pictures for {len(values)} values")
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


def png(picture: Image.Image) -> bytes:
    """The picture as a PNG file's bytes, enlarged without smoothing where it is small."""
    buffer = io.BytesIO()
    factor = max(1, 256 // picture.width)
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()

"""The course around the notebooks: executing and checking them, results, figures, exercises, the report and the site.

Notebooks import from here what draws and records; nothing that is taught.
"""

from helpers.course.exercises import claim, exercise
from helpers.course.figures import (
    COLOURS,
    LINE_STYLES,
    curves,
    grid,
    jpeg,
    new_figure,
    save_figure,
    say,
    show,
    strip,
    style,
    to_picture,
)
from helpers.course.results import Results, approx, output_folder, shown, slug
from helpers.course.sliders import is_live, show_slider

__all__ = [
    "COLOURS",
    "LINE_STYLES",
    "Results",
    "approx",
    "claim",
    "curves",
    "exercise",
    "grid",
    "is_live",
    "jpeg",
    "new_figure",
    "output_folder",
    "save_figure",
    "say",
    "show",
    "show_slider",
    "shown",
    "slug",
    "strip",
    "style",
    "to_picture",
]

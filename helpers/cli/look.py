"""`course look`: what is in a folder of one's own pictures, before it is trained on."""

from __future__ import annotations

import argparse
from pathlib import Path

from helpers.base.paths import runs_folder

PICTURES = 48  # on the contact sheet


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    text = "your own pictures: a folder, a .parquet file, or a dataset of the Hugging Face hub as OWNER/NAME"
    parser.add_argument("--data", metavar="WHERE", required=True, help=text)
    parser.add_argument("--image-column", metavar="NAME", help="the column of pictures (default: image)")
    parser.add_argument("--text-column", "--caption-column", metavar="NAME", help="the column of captions (text)")
    parser.add_argument("--caption", metavar="TEXT", help="the caption of every picture without one")
    parser.set_defaults(dataset=None, revision=None)
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="the contact sheet (default: runs/look/…)")


def look_at_pictures(given: argparse.Namespace) -> int:
    """`course look`: counts, sizes, captions, what cannot be read, and a contact sheet. Status 1 if any cannot."""
    from helpers.base.errors import CourseError
    from helpers.base.files import atomic_path
    from helpers.base.paths import short
    from helpers.cli.train import source_of
    from helpers.course.figures import contact_sheet
    from helpers.data.look import look_at

    spec = source_of(given)
    output = given.output or runs_folder() / "look" / f"{spec.name}.png"
    if output.suffix.lower() != ".png":
        raise CourseError(f"--output must end in .png, not {output.name!r}")
    found = look_at(spec, pictures=PICTURES)
    print(found)
    if found.shown:
        with atomic_path(output) as temporary:
            contact_sheet(found.shown).save(temporary)
        print(f"contact sheet: {short(output.resolve())}")
    return 1 if found.unreadable else 0

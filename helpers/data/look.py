"""A look at one's own pictures before training: what is there, what is odd, and what will not be read.

Nothing here stops at the first fault, as loading does: the point is to see them all.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from helpers.base.errors import DataError, unreadable
from helpers.data.folders import (
    CAPTION_SUFFIXES,
    METADATA,
    caption_files,
    delimiter_of,
    find_path,
    folder_repeats,
    metadata_file,
    no_size_warning,
    pairs_of,
    parquet_files,
    repeats_of,
    visible_paths,
)
from helpers.data.loading import load_pictures, read_picture
from helpers.diffusion.pictures import to_rgb
from helpers.presets.configuration import DatasetSpec

SHOWN = 5  # names or captions of each kind that are printed
THUMBNAIL = 96  # pixels on a side


@dataclass
class Look:
    """What was found. sizes: (width, height) of each picture that opens; captions: None where a picture has none.

    unreadable: a sentence for each picture that does not open. notes: what else one should know, a sentence each.
    shown: some of the pictures as training sees them, small squares.
    """

    name: str
    captions: list[str | None] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shown: list[Image.Image] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.name}: {counted(len(self.captions), 'picture')}"]
        lines += [f"  sizes      {text}" for text in size_lines(self.sizes)]
        lines += [f"  captions   {text}" for text in caption_lines(self.captions)]
        if self.unreadable:
            lines.append(f"  unreadable {counted(len(self.unreadable), 'picture')}:")
            lines += [f"             {text}" for text in shortened(self.unreadable)]
        return "\n".join(lines + [f"  note       {note}" for note in self.notes])


def look_at(spec: DatasetSpec, whole: bool = True, pictures: int = 0) -> Look:
    """A look at all rows of a folder, a parquet file or a hub dataset, each picture once.

    whole: decode every picture to its last pixel; else only what its header says is read. pictures: so many are kept
    in `shown`, spread evenly. Raises DataError where there are no rows to look at.
    """
    kind, _, place = spec.source.partition(":")
    folder = find_path(place) if kind == "folder" else None
    if folder is None or (not metadata_file(folder) and parquet_files(folder)):
        return look_at_rows(spec, pictures)
    pairs = pairs_of(folder, spec)
    found = Look(spec.name, captions=[text for _, text in pairs], notes=notes_on(folder, [path for path, _ in pairs]))
    wanted = spread(len(pairs), pictures)
    for number, (path, _) in enumerate(pairs):
        try:
            with no_size_warning(), Image.open(path) as picture:
                size = upright_size(picture)
                if whole:
                    picture.load()
                if number in wanted:
                    found.shown.append(thumbnail(picture))
            found.sizes.append(size)
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more for damaged files
            found.unreadable.append(str(unreadable(str(path.relative_to(folder)), error)))
    return found


def look_at_rows(spec: DatasetSpec, pictures: int) -> Look:
    """The same of a table, whose pictures are in its rows."""
    rows = load_pictures(spec)
    found = Look(spec.name, captions=[text or None for text in rows["text"]])
    wanted = spread(len(rows), pictures)
    for row in range(len(rows)):
        try:
            picture = read_picture(rows, row)
        except DataError as error:
            found.unreadable.append(str(error))
            continue
        found.sizes.append(upright_size(picture))
        if row in wanted:
            found.shown.append(thumbnail(picture))
    return found


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height once the picture is turned as its camera says (EXIF)."""
    width, height = picture.size
    return (height, width) if picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8) else (width, height)


def thumbnail(picture: Image.Image) -> Image.Image:
    """The middle square, small, as `helpers.diffusion.pictures.to_tensor` takes it."""
    return ImageOps.fit(to_rgb(ImageOps.exif_transpose(picture)), (THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)


def spread(total: int, count: int) -> set[int]:
    """`count` of 0 … total - 1, evenly spread; all of them where there are fewer."""
    return {i * total // count for i in range(min(count, total))} if count < total else set(range(total))


def notes_on(folder: Path, pictures: list[Path]) -> list[str]:
    """What one should know of a folder, a sentence each."""
    table = metadata_file(folder)
    if table:
        return list(table_notes(table, pictures))
    return [*caption_notes(folder, pictures), *repetition_notes(folder, pictures)]


def table_notes(table: Path, pictures: list[Path]) -> Iterator[str]:
    """Of a metadata file: what separates its cells, another one beside it, and pictures that it lists twice."""
    if table.suffix == ".csv" and (mark := header_mark(table)) != ",":
        yield f"{table.name} is separated by {'semicolons' if mark == ';' else 'tabs'}, and read so"
    for name in METADATA:
        if name != table.name and (table.parent / name).is_file():
            yield f"{name} is not read, as there is a {table.name}"
    if again := len(pictures) - len(set(pictures)):
        yield f"{table.name} lists {counted(again, 'picture')} a second time"


def caption_notes(folder: Path, pictures: list[Path]) -> Iterator[str]:
    """Of caption files: pictures that share one, that have two, and that take their folder's name."""
    found = visible_paths(folder)
    stems = Counter(path.with_suffix("") for path in pictures)
    if twice := [stem.relative_to(folder) for stem, count in stems.items() if count > 1]:
        yield f"several pictures share one name and so one caption: {', '.join(map(str, shortened(twice)))}"
    files = {path.with_suffix(path.suffix.lower()) for path in found}
    if both := [stem.name for stem in stems if all(stem.with_suffix(s) in files for s in CAPTION_SUFFIXES)]:
        yield f"{counted(len(both), 'picture')} with a .txt and a .caption: the .txt counts ({both[0]})"
    texts = caption_files(found)
    bare = [path for path in pictures if not (texts.get(path.with_suffix("")) or texts.get(path))]
    if named := [path.parent.name for path in bare if folder_repeats(path.parent.relative_to(folder))]:
        yield f"{counted(len(named), 'picture')} without a caption file, called by their folder's name: {named[0]}"


def repetition_notes(folder: Path, pictures: list[Path]) -> Iterator[str]:
    """Of folders such as 10_cat: how often the pictures of each folder come."""
    if any(folder_repeats(path.parent.relative_to(folder)) for path in pictures):
        times = set(zip([path.parent.name for path in pictures], repeats_of(pictures, folder), strict=True))
        said = ", ".join(f"{name} {repeat}×" for name, repeat in sorted(times))
        yield f"folders with repetitions, of which only the ratio counts: {said}"


def header_mark(table: Path) -> str:
    """What separates the cells of a metadata.csv."""
    return delimiter_of(table.read_text(encoding="utf-8-sig", errors="replace"))


# --- what it says ------------------------------------------------------------------------------------------------
def counted(count: int, noun: str) -> str:
    """ "1 picture", "2 pictures"."""
    return f"{count} {noun}{'s' * (count != 1)}"


def shortened(items: list) -> list:
    """The first few, and how many more there are."""
    return items[:SHOWN] + [f"… and {len(items) - SHOWN} more"] * (len(items) > SHOWN)


def size_lines(sizes: list[tuple[int, int]]) -> list[str]:
    """The smallest and largest size, the common one, and how much of the pictures a square cuts away."""
    if not sizes:
        return []
    small, large = min(sizes, key=lambda s: s[0] * s[1]), max(sizes, key=lambda s: s[0] * s[1])
    common, count = Counter(sizes).most_common(1)[0]
    text = f"all {common[0]}×{common[1]} pixels"
    if len(set(sizes)) > 1:
        text = f"{small[0]}×{small[1]} to {large[0]}×{large[1]} pixels, most often {common[0]}×{common[1]} ({count})"
    shapes = {"square": 0, "wide": 0, "tall": 0}
    for width, height in sizes:
        shapes["square" if width == height else "wide" if width > height else "tall"] += 1
    lines = [text, ", ".join(f"{count} {shape}" for shape, count in shapes.items() if count)]
    cut = max(max(size) / min(size) for size in sizes)
    if cut > 1:
        lines[-1] += f"; the longest is {cut:.1f} times its width or height, and training takes the middle square"
    return lines


def caption_lines(captions: list[str | None]) -> list[str]:
    """How many captions there are, how long they are, and which repeat."""
    texts = [text for text in captions if text]
    if not texts:
        return ["none: put a .txt file beside each picture, or give all of them one (course train --caption)"]
    words = [len(text.split()) for text in texts]
    lines = [
        f"{len(texts)}, {len(set(texts))} different; {min(words)} to {max(words)} words, "
        f"half of them up to {statistics.median_high(words)}"
    ]
    if missing := sum(not text for text in captions):
        lines.append(f"{counted(missing, 'picture')} without one")
    repeated = [f"{count}× {text[:60]!r}" for text, count in Counter(texts).most_common(SHOWN) if count > 1]
    return lines + repeated

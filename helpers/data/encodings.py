"""Which encoding a text is in that is not UTF-8: old editors and other systems have their own."""

from __future__ import annotations

import codecs
import re
import unicodedata
from pathlib import Path

from helpers.base.errors import DataError

MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# An encoding, and a script that a text in it has: it fits where all letters beyond ASCII belong to that script.
SCRIPTS = {
    "cp1252": ("LATIN",),
    "shift_jis": ("HIRAGANA", "KATAKANA", "CJK", "FULLWIDTH", "KATAKANA-HIRAGANA"),
    "euc_kr": ("HANGUL",),
    "cp1251": ("CYRILLIC",),
    "gb18030": ("CJK", "FULLWIDTH"),
}


def decode(path: Path) -> str:
    """The text of a file in UTF-8, with a byte-order mark or without.

    Raises DataError for another encoding; the message names the one that fits, if there is one.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fits = encoding_of(data)
        if fits is None:
            said = "it is not text in UTF-8, and in no encoding that is known here"
            raise DataError(f"cannot read {path}: {said} ({error})") from error
        begin = " ".join(data.decode(fits).split())[:40]
        said = f"it is not text in UTF-8; {fits} fits ({begin!r}). Save it as UTF-8: iconv -f {fits} -t utf-8"
        raise DataError(f"cannot read {path}: {said}") from error


def encoding_of(data: bytes) -> str | None:
    """The encoding in which these bytes read as text of one script; None where none does.

    Single accents among plain letters are western European; else the order above decides, and a text too short to tell
    may be read as another script.
    """
    for mark, name in MARKS.items():
        if data.startswith(mark):
            return name
    for name, scripts in SCRIPTS.items():
        try:
            text = data.decode(name)
        except UnicodeDecodeError:
            continue
        beyond = [letter for letter in text if letter.isalpha() and not letter.isascii()]
        if any(unicodedata.category(c) == "Cc" and not c.isspace() for c in text):
            continue
        if name == "cp1252" and re.search(r"[^\x00-\x7f]{3}", text) or name == "cp1251" and mostly_capitals(beyond):
            continue
        # (in western Europe's, quotation marks may be all there is)
        if (beyond or name == "cp1252") and all(unicodedata.name(c, "?").split()[0] in scripts for c in beyond):
            return name
    return None


def mostly_capitals(letters: list[str]) -> bool:
    """Whether most letters are capitals, as those of another Cyrillic encoding would seem."""
    return sum(letter.isupper() for letter in letters) > len(letters) / 2

"""README.md: the image first, short, a small animation, and a size of the clone that is true."""

import re
import subprocess
import zlib

import pytest
from PIL import Image

from helpers.base.paths import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_image_comes_first_and_all_fits_two_screens():
    lines = [line for line in TEXT.splitlines() if line]
    assert lines[0].startswith("# ") and re.match(r"!\[.{20,}\]\(figures/\w+\.png\)$", lines[1])
    assert len(TEXT.split()) < 1100


def test_the_strip_is_small_and_moves():
    [name] = re.findall(r"!\[.{20,}\]\((figures/\w+\.webp)\)", TEXT)
    path = ROOT / name
    assert path.stat().st_size < 1_000_000
    with Image.open(path) as strip:
        assert strip.n_frames > 2 and strip.width >= 800


def test_the_size_of_a_shallow_clone_is_the_one_said():
    """git packs every file by zlib, and without history there are few deltas: within a fifth it is the files' size."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a clone")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    packed = sum(len(zlib.compress(path.read_bytes(), 1)) for path in files if path.is_file())
    said = float(re.search(r"about (\d+) MB", TEXT)[1])
    assert said == pytest.approx(packed / 1e6, rel=0.2)

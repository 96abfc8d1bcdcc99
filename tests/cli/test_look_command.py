"""`course look`: what it prints, the contact sheet it leaves, and its status."""

import pytest
from PIL import Image

from helpers import cli


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    folder = tmp_path / "my_pictures"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (8 + number, 8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a cat")
    return folder


def test_a_look_prints_and_leaves_a_sheet(pictures, tmp_path, capsys):
    assert cli.main(["look", "--data", str(pictures)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("my_pictures: 3 pictures\n") and "3× 'a cat'" in said
    with Image.open(tmp_path / "runs" / "look" / "my_pictures.png") as sheet:
        assert sheet.size == (3 * 96, 96)


def test_the_sheet_goes_where_one_asks(pictures, tmp_path, capsys):
    assert cli.main(["look", "--data", str(pictures), "--output", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").exists() and "contact sheet: " in capsys.readouterr().out
    assert cli.main(["look", "--data", str(pictures), "--output", str(tmp_path / "x.jpg")]) == 1
    assert ".png" in capsys.readouterr().err


def test_what_cannot_be_read_is_a_status(pictures, capsys):
    (pictures / "1.png").write_text("<html>")
    assert cli.main(["look", "--data", str(pictures)]) == 1
    captured = capsys.readouterr()
    assert "unreadable 1 picture:" in captured.out and "1.png" in captured.out and not captured.err


def test_a_fault_of_the_whole_folder_is_a_sentence(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(["look", "--data", str(tmp_path / "empty")]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("course: there are no pictures in")


def test_training_shows_every_fault_before_it_stops(pictures, capsys):
    for name in ("0.png", "2.png"):
        (pictures / name).write_text("<html>")
    assert cli.main(["train", "--data", str(pictures)]) == 1
    captured = capsys.readouterr()
    assert "0.png" in captured.out and "2.png" in captured.out
    assert captured.err.startswith("course: cannot read the picture")

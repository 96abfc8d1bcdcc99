"""Google Colab without Colab: badges, the set-up cell, and an installation that leaves torch alone."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.base.paths import ROOT, runs_folder
from helpers.cli import parser as cli
from helpers.cli.doctor import recommended
from helpers.course import colab, hygiene, notebooks

ADDRESS = "https://github.com/some-one/a.course"


@pytest.fixture
def stamped(tmp_path, monkeypatch):
    """Copies of the notebooks, with badges."""
    monkeypatch.setattr(notebooks, "FOLDER", tmp_path)
    for path in sorted((ROOT / "notebooks").glob("0[13]_*.ipynb")):
        shutil.copy(path, tmp_path)
    assert cli.main(["colab", ADDRESS]) == 0
    return tmp_path


def test_each_notebook_gets_a_badge_below_its_title(stamped):
    for path in notebooks.committed():
        lines = notebooks.read(path).cells[0].source.splitlines()
        before = notebooks.read(ROOT / "notebooks" / path.name).cells[0].source.splitlines()
        assert lines[0] == before[0] and lines[1] == ""
        link = f"https://colab.research.google.com/github/some-one/a.course/blob/main/notebooks/{path.name}"
        assert lines[2] == f"[![Open in Colab]({colab.BADGE})]({link})"
        assert [line for line in lines[3:] if line] == [line for line in before[1:] if line]


def test_the_set_up_cell_comes_behind_the_parameters_and_the_notebook_stays_clean(stamped):
    """It may choose the preset, and nothing is imported before it."""
    for path in notebooks.committed():
        before, after = notebooks.read(ROOT / "notebooks" / path.name), notebooks.read(path)
        assert after.cells[1].metadata.tags == ["parameters"] and after.cells[2].metadata.tags == ["colab"]
        assert ADDRESS in after.cells[2].source and "    PRESET = " in after.cells[2].source
        rest = after.cells[1:2] + after.cells[3:]
        assert [c.source for c in rest] == [c.source for c in before.cells[1:]]
        assert [c.get("outputs") and len(c.outputs) for c in rest] == [
            c.get("outputs") and len(c.outputs) for c in before.cells[1:]
        ]
        assert hygiene.problems(path) == []


def test_another_address_replaces_the_first(stamped):
    assert cli.main(["colab", "https://github.com/other/fork.git"]) == 0
    for path in notebooks.committed():
        text = path.read_text(encoding="utf-8")
        assert "some-one" not in text and text.count("other/fork/blob/main") == 1
        assert sum("colab" in cell.metadata.get("tags", []) for cell in notebooks.read(path).cells) == 1
        assert hygiene.problems(path) == []


@pytest.mark.parametrize("address", ["git@github.com:a/b.git", "https://gitlab.com/a/b", "https://github.com/a", ""])
def test_only_github_will_do(stamped, capsys, address):
    assert cli.main(["colab", address]) == 1
    assert "Colab opens notebooks from GitHub" in capsys.readouterr().err


def run_cell(folder, address, in_colab, times=1):
    """Run the set-up cell in a new Python; where it ends, and its preset."""
    pretend = "import sys, types\nsys.modules['google.colab'] = types.ModuleType('google.colab')\n" if in_colab else ""
    cell = colab.SETUP.format(address=address, folder=folder / "course")
    code = "PRESET = 'mini'\n" + pretend + times * cell + "\nprint(os.getcwd())\nprint(PRESET)\n"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-2:]


@pytest.fixture
def repository(tmp_path):
    """A repository whose helpers/course/colab.py writes a line instead of setting anything up."""
    folder = tmp_path / "repository"
    (folder / "helpers" / "course").mkdir(parents=True)
    (folder / "notebooks").mkdir()
    (folder / "helpers" / "course" / "colab.py").write_text(
        "def set_up(preset='suited'):\n"
        "    with open(__file__.replace('course/helpers/course/colab.py', 'set up'), 'a') as file:\n"
        "        file.write('once ')\n"
        "    return preset\n"
    )
    (folder / "notebooks" / "01.ipynb").write_text("{}")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def test_in_colab_the_cell_fetches_the_course_sets_it_up_and_chooses_the_preset(repository, tmp_path):
    work = tmp_path / "content"
    work.mkdir()
    assert run_cell(work, repository.as_uri(), in_colab=True) == [str(work / "course" / "notebooks"), "suited"]
    assert (work / "set up").read_text() == "once "


def test_the_cell_may_run_again(repository, tmp_path):
    work = tmp_path / "content"
    work.mkdir()
    ends = [str(work / "course" / "notebooks"), "suited"]
    assert run_cell(work, repository.as_uri(), in_colab=True, times=3) == ends
    assert (work / "set up").read_text() == "once once once "
    assert not (work / "course" / "notebooks" / "course").exists()
    assert run_cell(work, repository.as_uri(), in_colab=True) == ends


def test_elsewhere_the_cell_does_nothing(repository, tmp_path):
    work = tmp_path / "elsewhere"
    work.mkdir()
    assert run_cell(work, repository.as_uri(), in_colab=False) == [str(work), "mini"]
    assert list(work.iterdir()) == []


# --- what the cell calls -----------------------------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A Colab machine with a Drive and a T4; its `installs` are done by a function that a test may replace."""
    drive, here = types.ModuleType("google.colab.drive"), SimpleNamespace(installs=0, drive=tmp_path / "drive")
    drive.mount = lambda place: Path(place, "MyDrive").mkdir(parents=True, exist_ok=True)
    package = types.ModuleType("google.colab")
    package.drive = drive
    monkeypatch.setitem(sys.modules, "google.colab", package)
    monkeypatch.setattr(colab.keep_on_drive, "__defaults__", (str(here.drive),))
    for name in ("COURSE_RUNS", "HF_HOME"):
        monkeypatch.setenv(name, "of another machine")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(ROOT)])
    monkeypatch.setattr("helpers.presets.machine.gpu_memory", lambda: 14.6)

    def install(root):
        here.installs += 1

    monkeypatch.setattr(colab, "install", install)
    here.mount = lambda function: setattr(drive, "mount", function)
    return here


def test_runs_and_downloads_survive_on_the_drive(machine, capsys):
    colab.set_up()
    kept = machine.drive / "MyDrive" / "lora-by-hand"
    assert runs_folder() == kept / "runs" and os.environ["HF_HOME"] == str(kept / "huggingface")
    assert (kept / "runs").is_dir() and "kept on your Drive" in capsys.readouterr().out


def test_without_a_drive_the_notebook_goes_on_and_says_what_is_lost(machine, capsys):
    def refuse(place):
        raise ValueError("mount failed")

    machine.mount(refuse)
    assert colab.set_up()
    assert os.environ["COURSE_RUNS"] == "of another machine"
    assert "No Drive (mount failed)" in capsys.readouterr().out


def test_the_course_is_installed_once_a_session(machine):
    colab.set_up()
    colab.set_up()
    assert machine.installs == 1 and sys.path[0] == str(ROOT)


@pytest.mark.parametrize(("gpu", "preset"), [(14.6, "sd21-base@16gb"), (0.0, "mini")])
def test_the_preset_is_the_one_that_doctor_recommends(machine, monkeypatch, gpu, preset):
    monkeypatch.setattr("helpers.presets.machine.gpu_memory", lambda: gpu)
    assert colab.set_up() == recommended(gpu) == preset
    assert colab.set_up("smoke") == "smoke", "the reader's choice comes first"


@pytest.mark.parametrize(("imported", "version"), [(True, "2.0"), (True, "1.0"), (False, "2.0")])
def test_a_restart_is_asked_for_when_a_package_in_use_is_replaced(machine, monkeypatch, tmp_path, imported, version):
    def write(version):
        info = tmp_path / "packages" / "shapely_thing.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: shapely-thing\nVersion: {version}\n")
        (info / "top_level.txt").write_text("shapely_thing\n")

    write("1.0")
    sys.path.append(str(tmp_path / "packages"))
    monkeypatch.setattr(colab, "install", lambda root: write(version))
    if imported:
        monkeypatch.setitem(sys.modules, "shapely_thing", types.ModuleType("shapely_thing"))
    if imported and version == "2.0":
        with pytest.raises(SystemExit, match=r"\(shapely-thing\): choose Runtime > Restart session"):
            colab.set_up()
        assert str(ROOT) not in sys.path, "the installing is done again after the restart"
    else:
        assert colab.set_up()


def test_the_installation_keeps_the_torch_that_is_there(monkeypatch, tmp_path):
    asked = []

    def run(command, check):
        constraints = command[command.index("-c") + 1]
        asked.append((command, open(constraints).read().strip(), check))

    monkeypatch.setattr(subprocess, "run", run)
    colab.install(tmp_path)
    (command, constraints, check), *_ = asked
    version = importlib.metadata.version("torch").split("+")[0]
    assert constraints == f"torch=={version}" and check
    assert command[:4] == [sys.executable, "-m", "pip", "install"] and command[-2:] == ["-e", str(tmp_path)]
    assert "--upgrade" not in command


def test_the_file_that_colab_runs_needs_nothing_but_python():
    """Nothing is installed yet when it runs: no import of it, outside of functions, may be of another package."""
    code = "import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; import runpy; "
    code += "runpy.run_path('helpers/course/colab.py', run_name='colab')"
    assert subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, check=False).returncode == 0

"""Google Colab without Colab: badges, the set-up cell, and an installation that leaves torch alone."""

import importlib.metadata
import shutil
import subprocess
import sys

import pytest

from helpers.base.paths import ROOT
from helpers.cli import parser as cli
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


def test_the_set_up_cell_comes_before_all_code_and_the_notebook_stays_clean(stamped):
    for path in notebooks.committed():
        before, after = notebooks.read(ROOT / "notebooks" / path.name), notebooks.read(path)
        assert after.cells[1].metadata.tags == ["colab"] and ADDRESS in after.cells[1].source
        assert [c.source for c in after.cells[2:]] == [c.source for c in before.cells[1:]]
        assert [c.get("outputs") and len(c.outputs) for c in after.cells[2:]] == [
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
    """Run the set-up cell in a new Python; where it ends, and the first place it imports from."""
    pretend = "import sys, types\nsys.modules['google.colab'] = types.ModuleType('google.colab')\n" if in_colab else ""
    cell = colab.SETUP.format(address=address, folder=folder / "course")
    code = pretend + times * cell + "\nprint(os.getcwd())\nprint(sys.path[0])\n"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-2:]


@pytest.fixture
def repository(tmp_path):
    """A repository whose helpers/course/colab.py writes a line instead of installing anything."""
    folder = tmp_path / "repository"
    (folder / "helpers" / "course").mkdir(parents=True)
    (folder / "notebooks").mkdir()
    (folder / "helpers" / "course" / "colab.py").write_text(
        "with open('installed', 'a') as file:\n    file.write('once ')\n"
    )
    (folder / "notebooks" / "01.ipynb").write_text("{}")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def test_in_colab_the_cell_fetches_the_course_and_installs_it(repository, tmp_path):
    work = tmp_path / "content"
    work.mkdir()
    where, first = run_cell(work, repository.as_uri(), in_colab=True)
    assert where == str(work / "course" / "notebooks") and first == str(work / "course")
    assert (work / "installed").read_text() == "once "


def test_the_cell_may_run_again(repository, tmp_path):
    """In one session nothing happens twice. After a restart, or a failed installation, the installing is done again."""
    work = tmp_path / "content"
    work.mkdir()
    where, first = run_cell(work, repository.as_uri(), in_colab=True, times=3)
    assert where == str(work / "course" / "notebooks") and first == str(work / "course")
    assert (work / "installed").read_text() == "once " and not (work / "course" / "notebooks" / "course").exists()
    assert run_cell(work, repository.as_uri(), in_colab=True) == [where, first]
    assert (work / "installed").read_text() == "once once "


def test_elsewhere_the_cell_does_nothing(repository, tmp_path):
    work = tmp_path / "elsewhere"
    work.mkdir()
    assert run_cell(work, repository.as_uri(), in_colab=False)[0] == str(work)
    assert list(work.iterdir()) == []


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

"""What is installed: three lists of dependencies that agree, data files that travel along, commands that exist."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from helpers.base.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements() -> dict[str, Requirement]:
    """{name: requirement} of pyproject.toml, the test extra included."""
    project = PROJECT["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["test"]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def constraints() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    parsed = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    found = {canonicalize_name(r.name): r for r in parsed}
    assert len(found) == len(parsed), "a package is pinned twice"
    return found


def test_the_conda_environment_is_pyproject():
    import yaml

    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    [pip] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    listed = {canonicalize_name(r.name): r for r in map(Requirement, pip)}
    assert listed == requirements()
    plain = [Requirement(entry) for entry in environment["dependencies"] if isinstance(entry, str)]
    [python] = [r for r in plain if r.name == "python"]
    assert str(python.specifier) == PROJECT["project"]["requires-python"]
    assert {r.name for r in plain} == {"python", "pip"}


def site_requirements() -> dict[str, Requirement]:
    """{name: requirement} of what only the site needs."""
    lines = PROJECT["project"]["optional-dependencies"]["site"]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def test_every_direct_dependency_is_pinned_within_its_bounds():
    pins = constraints()
    for requirement in [*requirements().values(), *site_requirements().values()]:
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not in constraints.txt"
        [pin] = pins[name].specifier
        assert pin.operator == "==" and Version(pin.version) in requirement.specifier


def test_pins_are_exact_and_public():
    for requirement in constraints().values():
        [pin] = requirement.specifier
        assert pin.operator == "==" and Version(pin.version).local is None and requirement.url is None


def test_torch_2_6_is_accepted():
    assert Version("2.6.0") in requirements()["torch"].specifier


def test_the_lowest_versions_are_the_bounds():
    done = subprocess.run([sys.executable, ROOT / ".ci" / "lowest.py"], capture_output=True, text=True, check=True)
    pins = {canonicalize_name(r.name): r for r in map(Requirement, done.stdout.splitlines())}
    assert pins.keys() == requirements().keys()
    for name, requirement in requirements().items():
        [bound], [pin] = requirement.specifier, pins[name].specifier
        assert (bound.operator, pin.operator) == (">=", "==") and pin.version.removesuffix(".*") == bound.version
        assert Version(bound.version) in pins[name].specifier


def test_hooks_run_what_there_is():
    import yaml

    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    modules = [re.search(r"-m ([\w.]+)", hook["entry"])[1] for hook in hooks]
    assert modules == ["ruff", "helpers.course.hygiene"]


def third_party_imports() -> set[str]:
    """Top-level packages that helpers and tests import."""
    import ast

    found = set()
    for file in [*(ROOT / "helpers").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.split(".")[0])
    own = {"helpers", "tests", "tiny", "training_tools", "hub_cache", "parity_tools"}
    own |= {"apple", "diagram_checks", "kept_bytes"}
    return {name for name in found if name not in sys.stdlib_module_names | own}


# Imports of packages that a direct dependency is built on: torch, jupyterlab, papermill, datasets, accelerate, pytest;
# and Colab's own, which is nowhere else.
BROUGHT_ALONG = {
    *("IPython", "google", "huggingface_hub", "nbclient", "nbformat", "packaging", "psutil", "pyarrow", "yaml")
}
NAMES = {"PIL": "pillow", "dicebear": "dicebear-core"}


def test_everything_imported_is_declared():
    imported = {canonicalize_name(NAMES.get(name, name)) for name in third_party_imports() - BROUGHT_ALONG}
    assert imported - set(requirements()) == {"onnx"}, "the export for the site alone"
    assert "onnx" in site_requirements()


def test_the_environment_check_can_fail():
    assert Requirement("torch>=2.6") != Requirement("torch>=2.5")


def test_data_files_are_installed():
    """Every file below helpers that is not code is covered by a package-data pattern, or a model would be missing."""
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["helpers"]
    kept = {p.removeprefix("**/") for p in patterns}
    ignored = {"__pycache__", ".ipynb_checkpoints"}
    files = [f for f in (ROOT / "helpers").rglob("*") if f.is_file() and not ignored & set(f.parts)]
    missing = [f.name for f in files if f.suffix != ".py" and not any(fnmatch(f.name, p) for p in kept)]
    assert missing == []


def test_every_code_folder_is_a_package():
    for file in (ROOT / "helpers").rglob("*.py"):
        assert (file.parent / "__init__.py").exists(), f"{file.parent.name} would not be installed"


def test_the_course_command_exists():
    module, function = PROJECT["project"]["scripts"]["course"].split(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_ci_runs_make_test_and_fails_with_it(tmp_path):
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    copy = tmp_path / ".ci" / "run"
    copy.parent.mkdir()
    shutil.copy(script, copy)
    for status in (0, 3):
        (tmp_path / "Makefile").write_text(f"test:\n\t@echo 'total: 1 passed'; exit {status}\n")
        done = subprocess.run(["bash", str(copy)], capture_output=True, text=True, check=False)
        assert (done.returncode == 0) is (status == 0) and "total: 1 passed" in done.stdout


def test_the_hosted_ci_runs_commands_that_there_are():
    """Files and folders, Makefile targets; and the Mac's tests get no network."""
    import yaml

    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    jobs = {
        name: job for file in files for name, job in yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"].items()
    }
    commands = "\n".join(step["run"] for job in jobs.values() for step in job["steps"] if "run" in step)
    named = set(re.findall(r"\b(?:tests|helpers|benchmarks|\.ci)/[\w./]+", commands))
    assert named and {place for place in named if not (ROOT / place).exists()} == set()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^\s*make ([a-z]+)", commands, re.MULTILINE)) <= targets
    assert jobs["macos"]["runs-on"].startswith("macos") and jobs["macos"]["env"]["HF_HUB_OFFLINE"] == "1"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["course"], "run --preset mini"),
        (["course", "PRESET=smoke"], "run --preset smoke"),
        (["course", "PRESET=smoke", "FORCE=1"], "run --preset smoke --force"),
        (["course", "FORCE=0"], "run --preset mini"),
        (["test"], "check"),
        (["notebooks"], "notebooks"),
    ],
)
def test_make_calls_the_course_command(tmp_path, arguments, command):
    """In a folder of its own, with a Python that only writes down what it is asked: nothing is installed."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@" >> log\n')
    python.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    for _ in range(2):
        subprocess.run(["make", *arguments], cwd=tmp_path, env=environment, check=True, capture_output=True)
    log = (tmp_path / "log").read_text().splitlines()
    installs = [line for line in log if "pip install" in line]
    assert len(installs) == 2, "the second call installs nothing"
    assert installs[0].endswith("-c constraints.txt torch") and installs[1].endswith("-c constraints.txt -e .[test]")
    assert [line for line in log if line not in installs] == [f"-m helpers.cli {command}"] * 2


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_refuses_an_old_python(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    old = tmp_path / "python3.8"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(["make", "test", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_licence_is_there():
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert PROJECT["project"]["license"] == "MIT"


def printed_commands() -> list[str]:
    """Every command on a line of its own, or in the first cell of a table, of README.md and site/using.md."""
    pages = ROOT / "README.md", ROOT / "site" / "using.md"
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    return re.findall(r"^(?:    |\| `)course ([^\n`]+?)(?:\s+#.*|`.*)?$", text, re.MULTILINE)


def test_the_commands_printed_are_understood():
    """What they do is tested where they are: here, that nobody who copies one is told of a wrong option."""
    from helpers.cli.parser import _parser

    commands = printed_commands()
    assert len(commands) >= 20 and any(command.startswith("look ") for command in commands)
    for command in commands:
        given = _parser().parse_args(shlex.split(command))
        assert callable(given.command), command


def test_readme_names_commands_that_exist():
    from helpers.cli.parser import _parser

    pages = ROOT / "README.md", ROOT / "site" / "using.md"
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    [commands] = [a.choices for a in _parser()._actions if a.choices]
    named = set(re.findall(r"(?:`|^    )course ([a-z]+)", text, re.MULTILINE))
    assert named == set(commands)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", text)) <= targets

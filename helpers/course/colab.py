"""Google Colab: installing the course beside the torch that Colab comes with, and badges that open its notebooks there.

A notebook opened in Colab is alone, on a machine that is soon forgotten. Its set-up cell, which `course colab ADDRESS`
writes, clones the repository from that address and calls `set_up` of this file. That keeps runs and downloads on the
reader's Drive, where the next notebook finds them, installs what is missing and leaves Colab's own torch as it is, and
says which preset suits the GPU.
The first half is read before anything is installed: outside of functions it needs nothing but Python.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent.parent
FOLDER = "/content/course"  # in Colab
DRIVE = "/content/drive"
KEPT = "MyDrive/lora-by-hand"  # in the reader's Drive
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
SETUP = """
import os
import runpy
import subprocess
import sys

course = "{folder}"
if "google.colab" in sys.modules:
    if not os.path.exists(course):
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", "{address}", course], check=True)
    colab = runpy.run_path(course + "/helpers/course/colab.py")
    PRESET = colab["set_up"]()  # what suits the GPU here; set_up("mini") stays with MiniSD
    os.chdir(course + "/notebooks")
"""
COMMENT = "# On Google Colab: fetch and install the course, keep its runs on your Drive. Elsewhere this does nothing.\n"


# --- in Colab ----------------------------------------------------------------------------------------------------
def set_up(preset: str = "", root: Path = HERE) -> str:
    """Make this Colab machine ready for a notebook; returns the preset: the one given, else the one that suits its GPU.

    Ends the cell with SystemExit, asking for a restart, when the installation replaced a package that is in use.
    """
    keep_on_drive()
    if str(root) not in sys.path:  # not installed yet, or Colab was started anew
        before = versions_in_use()
        install(root)
        ask_for_restart(before)
        sys.path.insert(0, str(root))
    preset = preset or suited()
    print(f'PRESET is "{preset}" here.')
    return preset


def keep_on_drive(mount: str = DRIVE) -> None:
    """Let runs and downloads lie on the reader's Drive, so that a run trained in one notebook is found by the next."""
    from google.colab import drive

    try:
        drive.mount(mount)
    except Exception as error:  # refused, or no Drive: Colab raises several kinds
        print(f"No Drive ({error}): what is trained and downloaded here is lost with this machine.")
        return
    folder = Path(mount) / KEPT
    for name, place in (("COURSE_RUNS", "runs"), ("HF_HOME", "huggingface")):
        os.environ[name] = str(folder / place)
        (folder / place).mkdir(parents=True, exist_ok=True)
    print(f"Runs and downloads are kept on your Drive, in {KEPT}: all notebooks share them.")


def versions_in_use() -> dict[str, str]:
    """{package that this Python has imported: its installed version}."""
    known = importlib.metadata.packages_distributions()
    modules = {module.split(".")[0] for module in list(sys.modules)}
    names = {name for module in modules for name in known.get(module, ())}
    return {name: importlib.metadata.version(name) for name in names}


def ask_for_restart(before: dict[str, str]) -> None:
    """Raises SystemExit, saying what to do, when one of the packages has another version now."""
    now = versions_in_use()
    replaced = sorted(name for name, version in before.items() if now.get(name) != version)
    if replaced:
        raise SystemExit(
            f"The course brought other versions of what is in use here ({', '.join(replaced)}): choose "
            "Runtime > Restart session, then run this notebook from the top. That is needed once a machine."
        )


def suited() -> str:
    """The preset for this machine's GPU, which is the one that `course doctor` recommends; MiniSD without one."""
    from helpers.presets.machine import gpu_memory, rung_for

    return rung_for("sd21-base", gpu_memory()) or "mini"


def constraint() -> str:
    """A line for pip that keeps the installed torch: "torch==2.9.0"; "" when there is none."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return f"torch=={version.split('+')[0]}"  # pip takes 2.9.0+cu126 for it


def install(root: Path = HERE) -> None:
    """Install the course and what it lacks. Raises CalledProcessError when pip fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "constraints.txt"
        file.write_text(constraint() + "\n")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "-c", str(file), "-e", str(root)]
        subprocess.run(command, check=True)


# --- in the repository -------------------------------------------------------------------------------------------
def owner_and_name(address: str) -> str:
    """OWNER/NAME of a repository's address on GitHub. Raises ValueError for another address."""
    found = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", address)
    if not found:
        raise ValueError(f"Colab opens notebooks from GitHub: https://github.com/OWNER/NAME, not {address!r}")
    return found[1]


def badge(address: str, notebook: str, branch: str = "main") -> str:
    """Markdown of the badge that opens a notebook of the repository in Colab."""
    link = f"https://colab.research.google.com/github/{owner_and_name(address)}/blob/{branch}/notebooks/{notebook}"
    return f"[![Open in Colab]({BADGE})]({link})"


def stamp(path: Path, address: str) -> None:
    """Write the badge below a notebook's title, in place of those of another address, and the set-up cell.

    It stands behind the cell of the parameters, so that it may choose the preset, and before all other code.
    """
    from nbformat.v4 import new_code_cell

    from helpers.course import hygiene, notebooks

    notebook = notebooks.read(path)
    first = notebook.cells[0]
    title, _, rest = re.sub(r"\n*\[!\[Open in Colab\][^\n]*\n*", "\n\n", first.source).partition("\n")
    first.source = f"{title}\n\n{badge(address, path.name)}\n\n{rest.strip()}"
    notebook.cells = [cell for cell in notebook.cells if "colab" not in cell.metadata.get("tags", [])]
    setup = new_code_cell(COMMENT + SETUP.format(address=address, folder=FOLDER).strip(), id="colab")
    setup.metadata["tags"] = ["colab"]
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    notebook.cells.insert(next(number for number, some in enumerate(tags) if "parameters" in some) + 1, setup)
    notebooks.write(hygiene.clean(notebook), path)

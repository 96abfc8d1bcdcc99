"""Google Colab: installing the course beside the torch that Colab comes with, and badges that open its notebooks there.

A notebook opened in Colab is alone. Its second cell, which `course colab ADDRESS` writes, clones the repository from
that address and runs this file, which installs what is missing and leaves Colab's own torch as it is.
The first half needs nothing but Python, since nothing else is installed yet.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent.parent
FOLDER = "/content/course"  # in Colab
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
SETUP = """
import os
import subprocess
import sys

course = "{folder}"
if "google.colab" in sys.modules:
    if not os.path.exists(course):
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", "{address}", course], check=True)
    if course not in sys.path:  # not installed yet, or Colab was started anew
        subprocess.run([sys.executable, course + "/helpers/course/colab.py"], check=True)
        sys.path.insert(0, course)
    os.chdir(course + "/notebooks")
"""
COMMENT = "# On Google Colab: fetch the course and install what it needs. Elsewhere this cell does nothing.\n"


# --- in Colab ----------------------------------------------------------------------------------------------------
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
    """Write the badge below a notebook's title, and the set-up cell behind it, in place of those of another address."""
    from nbformat.v4 import new_code_cell

    from helpers.course import hygiene, notebooks

    notebook = notebooks.read(path)
    first = notebook.cells[0]
    title, _, rest = re.sub(r"\n*\[!\[Open in Colab\][^\n]*\n*", "\n\n", first.source).partition("\n")
    first.source = f"{title}\n\n{badge(address, path.name)}\n\n{rest.strip()}"
    notebook.cells = [cell for cell in notebook.cells if "colab" not in cell.metadata.get("tags", [])]
    setup = new_code_cell(COMMENT + SETUP.format(address=address, folder=FOLDER).strip(), id="colab")
    setup.metadata["tags"] = ["colab"]
    notebook.cells.insert(1, setup)
    notebooks.write(hygiene.clean(notebook), path)


if __name__ == "__main__":
    install()
    subprocess.run([sys.executable, "-m", "helpers.cli", "doctor"], cwd=HERE, check=False)

"""The `course` command, one file for each thing that it does; `course --help` lists them."""

import os

# PyTorch's threads wait for each other asleep: where they spin, one busy neighbour makes a step ten times as long
# (benchmarks/README.md). The runtime reads this when PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from helpers.cli.parser import main  # noqa: E402

__all__ = ["main"]

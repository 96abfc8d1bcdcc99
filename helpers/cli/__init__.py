"""The `course` command, one file for each thing that it does; `course --help` lists them."""

from helpers.cli.parser import main

__all__ = ["main"]

"""The `course` command. `course --help` lists what it can do; `make course` and `make test` call it.

Whatever the reader can mend ends in one clear sentence on stderr and exit status 1 (2 for a mistyped command line);
with COURSE_DEBUG=1 it ends in a traceback instead.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers.cli.adapter import add_commands
from helpers.cli.doctor import tell_findings
from helpers.cli.figure import redraw_figure
from helpers.cli.look import add_options as add_look_options
from helpers.cli.look import look_at_pictures
from helpers.cli.messages import DEFAULT, is_readers, sentence_of
from helpers.cli.run import compile_report, run_course
from helpers.cli.sample import sample_pictures
from helpers.cli.train import add_options, train_adapter
from helpers.cli.upkeep import check_course, refresh_notebooks, run_sweep, write_badges
from helpers.presets.catalogue import PRESETS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    given = _parser().parse_args(arguments)
    for name in ("COURSE_LOCAL", "COURSE_RUNS", "COURSE_OUTPUT"):  # notebooks run in a folder of their own
        if os.environ.get(name):
            os.environ[name] = str(Path(os.environ[name]).expanduser().resolve())
    try:
        return given.command(given)
    except KeyboardInterrupt:
        print("course: stopped; what was finished is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("COURSE_DEBUG") or not is_readers(error):
            raise
        print(f"course: {sentence_of(error, getattr(given, 'preset', None) or DEFAULT)}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="course", description="LoRA by hand: the course's commands.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, function: Any, text: str, preset: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        if preset:
            command.add_argument("--preset", default=DEFAULT, help=f"one of {', '.join(PRESETS)} (default: {DEFAULT})")
        return command

    run = add(
        "run", run_course, "execute the notebooks, train both adapters, draw the figures and the report: into runs/"
    )
    run.add_argument("--force", action="store_true", help="execute and train again although nothing has changed")
    text = "then replace the committed figures, results, report and times too (without it, all goes under runs/)"
    run.add_argument("--refresh", action="store_true", help=text)
    run.add_argument("--only", metavar="01,02", help="only these notebooks")
    run.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a notebook's parameter")

    add("check", check_course, "lint, types, unit tests, strict notebook tests and measured numbers", preset=False)

    add_options(add("train", train_adapter, "train one adapter, or find the finished run"))

    add_look_options(add("look", look_at_pictures, "what is in a folder of your own pictures", preset=False))

    sweep = add("sweep", run_sweep, "train and measure every point of a study, with every seed", preset=False)
    sweep.add_argument("--study", required=True, metavar="NAME", help="a name that none has lists them")
    sweep.add_argument("--workers", type=int, default=1, help="processes on this machine, which share its cores (1)")
    text = "where trials are kept, as SQLAlchemy writes it: one for all machines (default: a file in the runs folder)"
    sweep.add_argument("--storage", metavar="URL", help=text)

    sample = add("sample", sample_pictures, "draw pictures from prompts")
    sample.add_argument("--prompt", action="append", required=True, help="may be repeated")
    sample.add_argument("--adapter", metavar="FILE", help="an adapter's file or folder, or a dataset whose run to use")
    sample.add_argument("--other-base", action="store_true", help="the adapter was made for another base model: try it")
    sample.add_argument("--scale", type=float, default=1.0, help="how much the adapter counts (default: 1)")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument("--count", type=int, default=1, help="pictures a prompt, with consecutive seeds")
    sample.add_argument("--steps", type=int, help="denoising steps (default: the preset's)")
    sample.add_argument("--guidance", type=float, help="classifier-free guidance scale (default: the preset's)")
    sample.add_argument("--output", type=Path, metavar="FILE.png", help="default: runs/<preset>/samples/…")
    sample.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")

    text = "look into adapter files, convert them, merge them into a model, cut them out of one"
    add_commands(commands.add_parser("adapter", help=text, description=text), DEFAULT)

    figure = add("figure", redraw_figure, "redraw one figure and compare it with the committed one", preset=False)
    figure.add_argument("number", type=int, help="such as 6")

    report = add("report", compile_report, "compile the report from the last results")
    report.set_defaults(preset=None)
    add("doctor", tell_findings, "what the course finds on this machine, and the preset that suits it", preset=False)

    again = add("notebooks", refresh_notebooks, "execute the committed notebooks in place and clean them", preset=False)
    again.add_argument("--only", metavar="01,02", help="only these notebooks")

    colab = add("colab", write_badges, "badges and set-up cells that open the notebooks in Google Colab", preset=False)
    colab.add_argument("address", help="of the repository: https://github.com/OWNER/NAME")
    return parser

"""The `course` command. `course --help` lists what it can do; `make course` and `make test` call it.

Whatever the reader can mend ends in one clear sentence on stderr and exit status 1 (2 for a mistyped command line);
with COURSE_DEBUG=1 it ends in a traceback instead.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .adapter_commands import add_commands, find_adapter, origin_of
from .presets import PRESETS, ROOT, Preset, get_preset, runs_folder
from .train_command import add_options, parse_settings, train_adapter

DEFAULT = "mini"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    given = _parser().parse_args(arguments)
    for name in ("COURSE_LOCAL", "COURSE_RUNS", "COURSE_OUTPUT"):  # notebooks run in a folder of their own
        if os.environ.get(name):
            os.environ[name] = str(Path(os.environ[name]).expanduser().resolve())
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or importing it talks about packages we do not need
    try:
        return given.command(given)
    except KeyboardInterrupt:
        print("course: stopped; what was finished is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("COURSE_DEBUG") or not _is_readers(error):
            raise
        sentence = memory_advice(given.preset) if _is_out_of_memory(error) else _sentence(error)
        print(f"course: {sentence}", file=sys.stderr)
        return 1


def _is_readers(error: Exception) -> bool:
    """Whether the reader can mend it. ComponentsError, DataError and AdapterError are ValueErrors."""
    from .notebooks import CourseError

    expected = (CourseError, ValueError, OSError)
    # A module that a command has not imported cannot have raised its error.
    own = {"helpers.runs": "TrainingError", "helpers.report": "ReportError", "helpers.sweep": "SweepError"}
    own_errors = tuple(getattr(sys.modules.get(module), name, CourseError) for module, name in own.items())
    return isinstance(error, expected + own_errors) or _is_out_of_memory(error)


def _is_out_of_memory(error: Exception) -> bool:
    return type(error).__name__ == "OutOfMemoryError"  # torch's, which may not have been imported


def memory_advice(preset: str) -> str:
    """The sentence for a GPU without memory left: which settings of the preset take less."""
    from .machine import out_of_memory

    return out_of_memory(preset)


def warn_without_gpu(preset: Preset) -> None:
    """Stable Diffusion on a CPU works, and takes a patience that one should know of before."""
    if preset.revision is not None:
        from .machine import notes_without_gpu

        for note in notes_without_gpu(preset):
            print(f"note: {note}")


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="course", description="LoRA by hand: the course's commands.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, function: Any, text: str, preset: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=function)
        if preset:
            command.add_argument("--preset", default=DEFAULT, help=f"one of {', '.join(PRESETS)} (default: {DEFAULT})")
        return command

    run = add("run", run_course, "execute the notebooks in order, train both adapters, write figures and report")
    run.add_argument("--force", action="store_true", help="execute and train again although nothing has changed")
    run.add_argument("--only", metavar="01,02", help="only these notebooks")
    run.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a notebook's parameter")

    add("check", check_course, "lint, types, unit tests, strict notebook tests and measured numbers", preset=False)

    add_options(add("train", train_adapter, "train one adapter, or find the finished run"))

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
    add("doctor", examine, "what the course finds on this machine, and the preset that suits it", preset=False)

    again = add("notebooks", refresh_notebooks, "execute the committed notebooks in place and clean them", preset=False)
    again.add_argument("--only", metavar="01,02", help="only these notebooks")

    colab = add("colab", write_badges, "badges and set-up cells that open the notebooks in Google Colab", preset=False)
    colab.add_argument("address", help="of the repository: https://github.com/OWNER/NAME")
    return parser


# ------------------------------------------------------------------------------------------------------- course
def run_course(given: argparse.Namespace) -> int:
    """`course run`: notebooks → results, figures, report. Only the default preset's full run publishes."""
    from . import notebooks

    preset = get_preset(given.preset)
    settings = parse_settings(given.set)
    warn_without_gpu(preset)
    paths = notebooks.select(given.only)
    print(f"{preset.title}: {len(paths)} notebooks")
    done = notebooks.run_all(given.preset, paths, settings, given.force)
    full = given.only is None and not settings
    if full and given.preset in PRESETS and preset.revision is None:
        notebooks.write_costs(given.preset, done)
    summary(given.preset, done, publish=full and given.preset == DEFAULT)
    return 0


def summary(preset: str, done: Sequence[Any], publish: bool) -> None:
    """Publishes figures and results if asked to, compiles the report, and says what was written where."""
    from . import notebooks
    from .results import Results, output_folder

    results, folder, short = Results(preset), output_folder(preset), notebooks.short
    seconds = sum(one.seconds for one in done if not one.skipped)
    executed = sum(not one.skipped for one in done)
    figures, target = folder / "figures", folder
    if publish:
        figures, target = ROOT / "figures", ROOT / "report"
        publish_results(results, figures, target)
    print(f"\n{executed} notebooks executed in {notebooks.duration(seconds)}, {len(done) - executed} unchanged")
    print(f"  notebooks  {short(folder / 'notebooks')}/")
    print(f"  results    {short(target / 'results.json')} ({len(results.names)} values)")
    print(f"  figures    {short(figures)}/ ({len(results.figures)} figures)")
    for run in sorted(folder.glob("*-*/done.json")):
        print(f"  run        {short(run.parent)}/")
    try:
        print(f"  report     {short(build_report(target / 'results.json', figures, target / 'report.pdf'))}")
    except Exception as error:
        complete = len(done) == len(notebooks.committed())
        if complete or not _is_readers(error):
            raise
        print(f"  report     not compiled, since only some notebooks ran ({_sentence(error)})")


def publish_results(results: Any, figures: Path, report: Path) -> None:
    """Copies the run's figures and results.json to where the repository keeps them, each whole or not at all."""
    from .provenance import atomic_path

    source = results.path.parent
    files = [entry[key] for entry in results.figures.values() for key in ("file", "vector") if key in entry]
    pairs = [(source / file, figures / Path(file).name) for file in files]
    for old, new in [*pairs, (results.path, report / "results.json")]:
        with atomic_path(new) as temporary:
            shutil.copyfile(old, temporary)


def build_report(results: Path, figures: Path, output: Path) -> Path:
    """The report as a PDF, compiled from report/report.typ. Returns its path."""
    from . import report

    report.compile(results, figures, output)
    return output


def compile_report(given: argparse.Namespace) -> int:
    """`course report`: from report/results.json and figures/, or with --preset from the results of that preset."""
    from .notebooks import short
    from .results import output_folder, read

    if given.preset is None:
        results, figures, output = ROOT / "report" / "results.json", ROOT / "figures", ROOT / "report" / "report.pdf"
    else:
        get_preset(given.preset)
        folder = output_folder(given.preset)
        results, figures, output = folder / "results.json", folder / "figures", folder / "report.pdf"
    read(results)
    print(f"report: {short(build_report(results, figures, output))}")
    return 0


def check_course(given: argparse.Namespace) -> int:
    """`course check`: see `checks.check`."""
    from .checks import check

    return 0 if check() else 1


def examine(given: argparse.Namespace) -> int:
    """`course doctor`: what was found, and 1 when the course cannot run."""
    from . import doctor

    findings, advice = doctor.examine()
    for finding in findings:
        print(f"{finding.state}  {finding.what:<14}{finding.found}")
    print(advice)
    return 1 if any(finding.state == doctor.WRONG for finding in findings) else 0


def refresh_notebooks(given: argparse.Namespace) -> int:
    """`course notebooks`: the committed notebooks with new outputs; 1 when one is not fit to be committed."""
    from . import notebooks

    paths = notebooks.select(given.only)
    environment = notebooks.OFFLINE | {"COURSE_OUTPUT": str(runs_folder() / "check")}
    wrong = 0
    for number, path in enumerate(paths, start=1):
        with notebooks.progress(f"[{number}/{len(paths)}] {path.name}", None, print):
            found = notebooks.refresh(path, environment)
        for problem in found:
            print(f"  {path.name}: {problem}", file=sys.stderr)
        wrong += bool(found)
    print(f"{len(paths)} notebooks refreshed in {notebooks.short(notebooks.FOLDER)}/, {wrong} with problems")
    return 1 if wrong else 0


def write_badges(given: argparse.Namespace) -> int:
    """`course colab ADDRESS`: what the notebooks need to be opened in Colab from that repository."""
    from . import colab, notebooks

    paths = notebooks.select()
    for path in paths:
        colab.stamp(path, given.address)
    print(f"{len(paths)} notebooks open in Google Colab from {given.address}, once they are there")
    return 0


# ------------------------------------------------------------------------------------------------------- figure
def redraw_figure(given: argparse.Namespace) -> int:
    """`course figure N`: reruns the notebook that makes it, aside, and says how the figure differs."""
    from . import notebooks
    from .figures import picture_difference
    from .results import output_folder

    stem = f"fig{given.number:02d}"
    path = notebook_of(stem)
    folder = runs_folder() / "figure"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    earlier = [output_folder(DEFAULT) / "results.json", ROOT / "report" / "results.json"]
    for results in [file for file in earlier if file.exists()][:1]:  # a notebook may read what an earlier one recorded
        shutil.copyfile(results, folder / "results.json")
    print(f"figure {given.number} is drawn by {path.name}")
    environment = notebooks.OFFLINE | {"COURSE_OUTPUT": str(folder)}
    with notebooks.progress(path.name, notebooks.expected_seconds(DEFAULT, path.stem), print):
        notebooks.execute(path, folder / path.name, {"PRESET": DEFAULT}, environment)
    drawn = sorted((folder / "figures").glob(f"{stem}_*.png")) + sorted((folder / "figures").glob(f"{stem}.png"))
    if not drawn:
        raise notebooks.CourseError(f"{path.name} ran, but drew no figure {given.number}")
    for new in drawn:
        committed = ROOT / "figures" / new.name
        print(f"{notebooks.short(new)}: {describe_difference(new, committed, picture_difference)}")
    return 0


def describe_difference(new: Path, committed: Path, difference: Any) -> str:
    """One phrase: identical, how far apart, of another size, or nothing to compare with."""
    if not committed.exists():
        return f"there is no {committed.parent.name}/{committed.name} to compare with"
    if new.read_bytes() == committed.read_bytes():
        return "identical to the committed figure, byte for byte"
    mean = difference(new, committed)
    if mean is None:
        return "of another size than the committed figure"
    if mean == 0:
        return "every pixel is identical to the committed figure's"
    return f"differs from the committed figure by {mean:.2f} grey levels of 255 on average"


def notebook_of(stem: str) -> Path:
    """The notebook that draws a figure: the one that recorded it, or else the one whose code names it."""
    from . import notebooks
    from .results import read

    paths = {path.stem: path for path in notebooks.committed()}
    try:
        figures = read(ROOT / "report" / "results.json")["figures"]
    except ValueError:
        figures = {}
    named = [entry.get("notebook") for name, entry in figures.items() if re.match(rf"{stem}(_|$)", name)]
    for path in [paths[name] for name in named if name in paths] + list(paths.values()):
        code = [cell.source for cell in notebooks.read(path).cells if cell.cell_type == "code"]
        if path.stem in named or any(re.search(rf"[\"']{stem}(_\w*)?[\"']", source) for source in code):
            return path
    raise notebooks.CourseError(f"no notebook draws a figure {int(stem[3:])}")


# -------------------------------------------------------------------------------------------------------- sweep
def run_sweep(given: argparse.Namespace) -> int:
    """`course sweep`: status 1 when trials are still missing, because other machines have them or were stopped."""
    from .notebooks import CourseError
    from .studies import get_study
    from .sweep import sweep

    study = get_study(given.study)
    if given.workers < 1:
        raise CourseError(f"--workers must be at least 1, not {given.workers}")
    return 0 if sweep(study, given.storage, given.workers) else 1


# ------------------------------------------------------------------------------------------------------- sample
def sample_pictures(given: argparse.Namespace) -> int:
    """`course sample`: one picture for each prompt and seed, in one PNG with a row a prompt."""
    from .notebooks import CourseError, short

    preset = get_preset(given.preset)
    if given.count < 1 or (given.steps is not None and given.steps < 1):
        raise CourseError("--count and --steps must be at least 1")
    warn_without_gpu(preset)
    adapter = find_adapter(preset, given.adapter) if given.adapter else None
    pictures = draw(preset, given, adapter)
    words = "-".join(re.findall(r"\w+", given.prompt[0].lower())[:8]) or "empty"
    output = given.output or runs_folder() / preset.name / "samples" / f"{words}-seed{given.seed}.png"
    if output.suffix.lower() != ".png":
        raise CourseError(f"--output must end in .png, not {output.name!r}")
    from .figures import contact_sheet
    from .provenance import atomic_path

    with atomic_path(output) as temporary:
        contact_sheet(pictures, columns=given.count).save(temporary)
    print(f"{len(pictures)} pictures: {short(output.resolve())}")
    return 0


def draw(preset: Preset, given: argparse.Namespace, adapter: Path | None) -> list[Any]:
    """The pictures that `course sample` was asked for, prompt by prompt."""
    from contextlib import nullcontext

    from . import lora
    from .adapters import load_adapter
    from .components import load_components
    from .sampling import generate

    components = load_components(preset, given.device)
    if adapter is not None:
        load_adapter(adapter, components.unet, components.text_encoder, origin_of(preset, given.other_base))
    prompts = [prompt for prompt in given.prompt for _ in range(given.count)]
    seeds = [given.seed + number for _ in given.prompt for number in range(given.count)]
    settings = {
        "num_inference_steps": given.steps or preset.num_inference_steps,
        "guidance_scale": preset.guidance_scale if given.guidance is None else given.guidance,
    }
    with lora.scaled(components.unet, given.scale) if adapter is not None else nullcontext():
        return generate(components, prompts, seeds, **settings)


if __name__ == "__main__":
    sys.exit(main())

"""The course command: skipping, forcing, failing and publishing on tiny notebooks; clear sentences for mistakes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from helpers.base import paths
from helpers.cli import figure, run, sample
from helpers.cli import parser as cli
from helpers.cli import train as command
from helpers.course import checks, notebooks
from helpers.data import own
from helpers.presets.variants import get_preset

FIRST = 'PRESET = "mini"\nFROM_SCRATCH = False'
WRITE = "from pathlib import Path\nimport os\nwith open(os.environ['COUNTER'], 'a') as f:\n    f.write('%s')"
RECORD = """
from helpers.base import provenance
from helpers.course import results
provenance.versions = lambda: {"device": "test"}
results._weights_hash = results._data_hashes = lambda preset: None
r = results.Results(PRESET)
r.record("answer", 42, tolerance=0)
path = r.path.parent / "figures" / "fig01_x.png"
path.parent.mkdir(parents=True, exist_ok=True)
path.write_bytes(b"picture")
r.record_figure("fig01_x", file="figures/fig01_x.png", alt="a very small test picture", model="MiniSD")
"""


def write_notebook(path: Path, *cells: str) -> None:
    first, *rest = cells
    notebook = new_notebook(cells=[new_code_cell(first, metadata={"tags": ["parameters"]}), *map(new_code_cell, rest)])
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebooks.write(notebook, path)


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A course of two notebooks in a repository of its own; COUNTER holds one letter for each execution."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    write_notebook(folder / "01_first.ipynb", 'PRESET = "mini"', WRITE % "a", RECORD)
    write_notebook(folder / "02_second.ipynb", FIRST, WRITE % "b", "print(PRESET, FROM_SCRATCH)")
    monkeypatch.setattr(notebooks, "FOLDER", folder)
    monkeypatch.setattr(notebooks, "COSTS", folder / "costs.json")
    monkeypatch.setattr(notebooks, "README", tmp_path / "README.md")
    monkeypatch.setattr(notebooks, "shared_key", lambda preset: {"preset": preset})
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(figure, "ROOT", tmp_path)
    monkeypatch.setattr(run, "build_report", lambda _, figures, output: output.write_bytes(b"report") and output)
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("COUNTER", str(tmp_path / "counter"))
    monkeypatch.delenv("COURSE_OUTPUT", raising=False)
    return tmp_path


def executed(course: Path) -> str:
    counter = course / "counter"
    return counter.read_text() if counter.exists() else ""


def committed(course: Path) -> dict[str, bytes]:
    """{file: bytes} of everything in the repository that git would see: what is neither a run nor the counter."""
    files = [path for path in course.rglob("*") if path.is_file() and path.name != "counter"]
    return {path.relative_to(course).as_posix(): path.read_bytes() for path in files if "runs" not in path.parts}


def last_line(said: str) -> str:
    return said.rstrip("\n").splitlines()[-1]


def test_a_full_run_then_a_second_then_a_change(course, capsys):
    assert cli.main(["run"]) == 0
    said = capsys.readouterr().out
    assert executed(course) == "ab"
    assert "[1/2] 01_first.ipynb: done" in said and "runs/mini/results.json (1 values, 1 figures)" in said
    output = (course / "runs/mini/notebooks/02_second.ipynb").read_text()
    assert "mini True" in output, "a notebook that trains is told to"

    assert cli.main(["run"]) == 0
    said = capsys.readouterr().out
    assert executed(course) == "ab" and said.count("unchanged, skipped") == 2

    write_notebook(course / "notebooks/02_second.ipynb", FIRST, WRITE % "c")
    assert cli.main(["run"]) == 0
    assert executed(course) == "abc", "only what has changed runs again"

    (course / "runs/mini/figures/fig01_x.png").unlink()
    assert cli.main(["run", "--only", "01"]) == 0
    assert executed(course) == "abca", "what lost its figure runs again"
    assert cli.main(["run", "--only", "1", "--force"]) == 0
    assert executed(course) == "abcaa"


@pytest.mark.parametrize("preset", ["mini", "smoke"])
def test_a_run_leaves_the_checkout_clean_and_says_where_things_lie(course, capsys, monkeypatch, preset):
    monkeypatch.setattr(paths, "ROOT", course)
    monkeypatch.chdir(course)
    (course / "README.md").write_text("| [01](notebooks/01_first.ipynb) | what | ? | ? |\n")
    for name, text in (("figures/fig01_x.png", "old"), ("report/results.json", "{}"), ("report/report.pdf", "old")):
        (course / name).parent.mkdir(exist_ok=True)
        (course / name).write_text(text)
    before = committed(course)
    assert cli.main(["run", "--preset", preset]) == 0
    assert committed(course) == before
    made = f"figures runs/{preset}/figures/, notebooks runs/{preset}/notebooks/, report runs/{preset}/report.pdf"
    assert last_line(capsys.readouterr().out) == f"{made} (the committed ones are unchanged)"
    assert (course / f"runs/{preset}/figures/fig01_x.png").read_bytes() == b"picture"
    assert (course / f"runs/{preset}/report.pdf").read_bytes() == b"report"


def test_a_refresh_replaces_what_is_committed(course, capsys, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", course)
    monkeypatch.chdir(course)
    (course / "README.md").write_text("| [01](notebooks/01_first.ipynb) | what | ? | ? |\n")
    monkeypatch.setattr(run, "animate", lambda preset, results: None)
    before = committed(course)
    assert cli.main(["run", "--refresh"]) == 0
    said, after = capsys.readouterr().out, committed(course)
    assert "refreshed" in said and "unchanged)" not in last_line(said) and "runs/mini/report.pdf" in last_line(said)
    changed = {name for name in after if after[name] != before.get(name)}
    made = {"figures/fig01_x.png", "report/results.json", "report/report.pdf", "notebooks/costs.json", "README.md"}
    assert changed == made, "the notebooks are refreshed by `course notebooks`"
    assert (course / "figures/fig01_x.png").read_bytes() == b"picture"
    assert json.loads((course / "report/results.json").read_text())["values"]["answer"]["notebook"] == "01_first"
    costs = json.loads((course / "notebooks/costs.json").read_text())["mini"]
    assert set(costs) == {"01_first", "02_second"}
    assert all(0.01 < cost["gigabytes"] < 4 and cost["seconds"] >= 1 for cost in costs.values())
    assert "?" not in (course / "README.md").read_text()


def test_a_report_that_does_not_compile_leaves_the_committed_files(course, monkeypatch, capsys):
    def broken(results, figures, output):
        raise ValueError("results.json lacks 'x'")

    monkeypatch.setattr(run, "build_report", broken)
    before = committed(course)
    assert cli.main(["run", "--refresh"]) == 1
    assert committed(course) == before and "lacks 'x'" in capsys.readouterr().err
    assert cli.main(["run", "--only", "1"]) == 0
    assert "not compiled, since only some notebooks ran" in (said := capsys.readouterr().out)
    assert "report.pdf" not in last_line(said)


def test_a_refresh_removes_what_nothing_draws_any_more(course):
    from helpers.course.results import Results

    def entries(*names):
        return {name: {"file": f"figures/{name}.png", "vector": f"figures/{name}.svg"} for name in names}

    folder, before = course / "runs/mini", {"values": {}, "provenance": {}, "figures": entries("old", "both")}
    for name in ("old", "both", "drawn_elsewhere"):
        for suffix in ("png", "svg"):
            (course / "figures").mkdir(exist_ok=True)
            (course / f"figures/{name}.{suffix}").write_text("committed")
    (course / "report").mkdir()
    (course / "report/results.json").write_text(json.dumps(before))
    (folder / "figures").mkdir(parents=True)
    for suffix in ("png", "svg"):
        (folder / f"figures/both.{suffix}").write_text("new")
    (folder / "results.json").write_text(json.dumps(before | {"figures": entries("both")}))
    run.publish(Results("mini"), [])
    left = {path.name: path.read_text() for path in (course / "figures").iterdir()}
    assert left == {"both.png": "new", "both.svg": "new"} | {
        f"drawn_elsewhere.{suffix}": "committed" for suffix in ("png", "svg")
    }


def test_a_notebook_that_lost_any_file_of_a_figure_runs_again(course):
    folder, figure_of = course / "runs/mini", {"file": "figures/a.webp", "data": "figures/a.json"}
    (folder / "figures").mkdir(parents=True)
    for file in (*figure_of.values(), "01.ipynb"):
        (folder / file).touch()
    (folder / "results.json").write_text(json.dumps({"values": {}, "provenance": {}, "figures": {"a": figure_of}}))
    stamp = {"values": [], "figures": ["a"]}

    def intact(stamp):
        return notebooks._intact("mini", "01", folder / "01.ipynb", stamp)

    assert intact(stamp) and not intact(stamp | {"values": ["x"]}) and not intact(stamp | {"figures": ["b"]})
    (folder / "figures/a.json").unlink()
    assert not intact(stamp)


@pytest.mark.parametrize("more", [["--only", "01"], ["--preset", "smoke"], ["--set", "FROM_SCRATCH=True"]])
def test_only_the_whole_course_of_the_default_preset_can_be_refreshed(course, capsys, more):
    assert cli.main(["run", "--refresh", *more]) == 1
    assert "whole course with the preset mini" in capsys.readouterr().err and executed(course) == ""


def test_the_runs_that_the_figures_show_are_animated(course):
    from helpers.course.results import Results

    folder = course / "runs/mini"
    for name, colour in (("doodles-aaa", "red"), ("doodles-bbb", "blue"), ("vintage-ccc", "green")):
        for step in (0, 10):
            (folder / name / f"validation/step-{step:06d}").mkdir(parents=True)
            (folder / name / f"validation/step-{step:06d}/metrics.json").write_text(f'{{"step": {step}, "epoch": 0}}')
            Image.new("RGB", (16, 16), colour).save(folder / name / f"validation/step-{step:06d}/000.png")
        (folder / name / "done.json").write_text("{}")
    results = Results("mini")
    assert run.animate("mini", results) is None, "no figure shows a run"
    results.data["figures"] = {"fig03": {"run": "bbb"}, "fig15": {"run": "bbb, ccc"}, "fig01": {}}
    strip = run.animate("mini", results)
    assert strip == folder.resolve() / "figures/style_coming_in.webp"
    with Image.open(strip) as animation:
        assert animation.n_frames == 2
        middle = [animation.convert("RGB").getpixel((x, 100)) for x in (100, 400)]
    assert middle[0][2] > 200 and middle[1][1] > 100 and middle[0][0] < 50, "the run of the figures, not an older one"


def test_a_failing_notebook_names_its_cell_and_keeps_the_rest(course, capsys):
    write_notebook(course / "notebooks/02_second.ipynb", FIRST, "x = 1", "1 / 0")
    assert cli.main(["run", "--preset", "smoke"]) == 1
    captured = capsys.readouterr()
    [line] = captured.err.strip().splitlines()
    assert "02_second.ipynb failed" in line and "ZeroDivisionError: division by zero" in line
    folder = course / "runs/smoke/notebooks"
    assert (folder / "01_first.ipynb").exists() and (folder / "02_second.failed.ipynb").exists()
    assert not (folder / "02_second.ipynb").exists() and not list(folder.glob("*.running.ipynb"))
    assert not (course / "figures").exists() and not (course / "report").exists()

    write_notebook(course / "notebooks/02_second.ipynb", FIRST, WRITE % "b")
    assert cli.main(["run", "--preset", "smoke"]) == 0
    assert executed(course) == "ab", "the first notebook is not executed again"
    assert not (folder / "02_second.failed.ipynb").exists()


def test_a_notebook_before_invalidates_those_after(course, monkeypatch):
    ran = []
    monkeypatch.setattr(notebooks, "execute", lambda path, output, *_: ran.append(path.stem) or output_of(path, output))
    paths = notebooks.committed()
    notebooks.run_all("mini", paths, say=lambda text: None)
    write_notebook(course / "notebooks/01_first.ipynb", 'PRESET = "mini"', "2")
    done = notebooks.run_all("mini", paths, say=lambda text: None)
    assert ran == ["01_first", "02_second"] * 2 and not any(one.skipped for one in done)
    assert all(one.skipped for one in notebooks.run_all("mini", paths, say=lambda text: None))
    monkeypatch.setattr(notebooks, "shared_key", lambda preset: {"code": "changed"})
    assert not any(one.skipped for one in notebooks.run_all("mini", paths, say=lambda text: None))


def output_of(path: Path, output: Path) -> float:
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(path.read_text())
    return 1.0


def test_outputs_do_not_change_the_source_hash(course):
    path = course / "notebooks/01_first.ipynb"
    before = notebooks.source_hash(path)
    notebook = notebooks.read(path)
    notebook.cells[0].execution_count = 5
    notebooks.write(notebook, path)
    assert notebooks.source_hash(path) == before
    notebook.cells[0].source += "\n"
    notebooks.write(notebook, path)
    assert notebooks.source_hash(path) != before


def test_costs_change_only_when_they_differ_much(course):
    def one(seconds, gigabytes=1.0, skipped=False):
        return notebooks.Executed(Path("01_x.ipynb"), Path("x"), seconds, gigabytes, skipped)

    def noted():
        return json.loads(notebooks.COSTS.read_text())["mini"]["01_x"]

    row = "| [01](notebooks/01_x.ipynb) | what | %s | %s |\n| [02](notebooks/02_y.ipynb) | what | a | b |\n"
    notebooks.README.write_text(row % ("?", "?"))
    notebooks.write_costs("mini", [one(100)])
    assert notebooks.README.read_text() == row % ("1 min 40 s", "1.0 GB")
    notebooks.write_costs("mini", [one(110, 1.1)])
    assert notebooks.expected_seconds("mini", "01_x") == 100 and noted()["gigabytes"] == 1.0
    notebooks.write_costs("mini", [one(200, skipped=True)])
    assert notebooks.expected_seconds("mini", "01_x") == 200, "executed before --refresh was asked for"
    notebooks.write_costs("mini", [one(110, 2.0)])
    assert noted() == {"seconds": 110, "gigabytes": 2.0}
    notebooks.write_costs("smoke", [one(5)])
    assert "1 min 50 s | 2.0 GB" in notebooks.README.read_text(), "the table is the default preset's"
    assert notebooks.expected_seconds("sd21", "01_x") is None


def test_the_committed_table_says_what_was_measured():
    costs, text = json.loads(notebooks.COSTS.read_text())["mini"], notebooks.README.read_text(encoding="utf-8")
    assert set(costs) == {path.stem for path in notebooks.committed()}
    assert notebooks.with_costs(text, costs) == text
    rows = re.findall(r"^\| \[\d\d\]\(notebooks/(\w+)\.ipynb\) .+ [\d.]+ GB \|$", text, re.MULTILINE)
    assert rows == sorted(costs)


def test_memory_of_child_processes_is_watched():
    with notebooks.watched_memory(every=0.02) as most:
        subprocess.run([sys.executable, "-c", "x = bytearray(200_000_000); import time; time.sleep(0.5)"], check=True)
    assert 2e8 < most() < 6e8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--preset", "nope"], "unknown preset 'nope'; known: mini"),
        (["run", "--only", "9"], "no notebook 09; there are 01, 02"),
        (["run", "--set", "WRONG=1"], "no notebook has a parameter 'WRONG'; known: FROM_SCRATCH, PRESET"),
        (["run", "--set", "WRONG"], "NAME=VALUE"),
        (["figure", "12"], "no notebook draws a figure 12"),
        (["train"], "--dataset doodles or vintage or lorelei"),
        (["train", "--dataset", "nope"], "unknown dataset 'nope'; known: doodles, vintage, lorelei"),
        (["train", "--dataset", "doodles", "--set", "steps=many"], "steps is a whole number"),
        (["train", "--dataset", "doodles", "--set", "stepz=1"], "unknown setting 'stepz'"),
        (["train", "--data", "no/such/folder"], "no folder"),
        (["train", "--data", "./lost"], "there is no folder or .parquet file lost"),
        (["train", "--data", "lost/x.parquet"], "there is no folder or .parquet file lost/x.parquet"),
        (["train", "--data", "notebooks/01_first.ipynb"], "neither a folder nor a .parquet file"),
        (["train", "--data", "notebooks", "--revision", "main"], "--revision is for datasets of the Hugging Face hub"),
        (["train", "--data", "notebooks", "--dataset", "a/b"], "it names a folder"),
        (["train", "--dataset", "doodles", "--text-column", "x"], "--text-column goes with --data"),
        (["train", "--dataset", "doodles", "--held-out", "3"], "--held-out goes with --data"),
        (["train", "--dataset", "doodles", "--rank", "4", "--set", "rank=4"], "rank is given twice: by --rank and by"),
        (["train", "--dataset", "doodles", "--batch-size", "0"], "batch_size must be at least 1"),
        (["sample", "--prompt", "x", "--count", "0"], "at least 1"),
        (["report"], "no results.json"),
        (["report", "--preset", "nope"], "unknown preset"),
    ],
)
def test_mistakes_end_in_one_sentence(course, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(course)
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    [line] = captured.err.strip().splitlines()
    assert line.startswith("course: ") and words in line


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nope"],
        ["run", "--nope"],
        ["figure", "six"],
        ["sample"],
        ["train", "--rank", "many"],
        ["train", "--steps", "1.5"],
        ["train", "--tracker", "paper"],
    ],
)
def test_a_mistyped_command_line_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and "usage: course" in capsys.readouterr().err


def test_a_folder_without_captions_is_refused(course, capsys):
    folder = course / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    assert cli.main(["train", "--data", str(folder)]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "a.txt" in line or "caption" in line


def test_missing_weights_are_said_in_a_sentence(course, capsys, monkeypatch):
    from dataclasses import replace

    preset = replace(get_preset("mini"), model="no/such/model")
    monkeypatch.setattr(sample, "get_preset", lambda name: preset)
    assert cli.main(["sample", "--prompt", "a cat"]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "no/such/model" in line


def test_bugs_keep_their_traceback(course, monkeypatch):
    monkeypatch.setattr(notebooks, "select", lambda only: {}["bug"])
    with pytest.raises(KeyError):
        cli.main(["run"])


def test_debugging_shows_the_traceback(course, monkeypatch):
    monkeypatch.setenv("COURSE_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown preset"):
        cli.main(["run", "--preset", "nope"])


def test_an_interrupt_is_no_traceback(course, monkeypatch, capsys):
    def interrupted(only):
        raise KeyboardInterrupt

    monkeypatch.setattr(notebooks, "select", interrupted)
    assert cli.main(["run"]) == 130
    assert "stopped" in capsys.readouterr().err


def test_settings_are_parsed():
    pairs = ["steps=200", "learning_rate=1e-4", "targets=('to_q',)", "use_rslora=True", "x=a b"]
    parsed = command.parse_settings(pairs)
    assert parsed == {
        "steps": 200,
        "learning_rate": 1e-4,
        "targets": ("to_q",),
        "use_rslora": True,
        "x": "a b",
    }
    assert command.preset_with("mini", {"steps": 7}).train.steps == 7


@pytest.mark.parametrize("setting", [{"steps": 1.5}, {"alpha": "x"}, {"use_rslora": 1}, {"targets": "to_q"}])
def test_settings_of_the_wrong_kind_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        command.preset_with("mini", setting)


# -------------------------------------------------------------------------------------------------------- train
@pytest.fixture
def pictures(tmp_path):
    """A folder of three captioned pictures."""
    folder = tmp_path / "my pictures"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")
    return folder


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """What `course train` passes to `train`, which does nothing but say that it is done."""
    from helpers.training import loop as training
    from helpers.training import runs

    calls = []

    def train(preset, name, from_scratch, force, tracker, device):
        calls.append({"preset": preset, "spec": preset.datasets[name], "config": preset.train, "tracker": tracker})
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "done.json").write_text(json.dumps({"steps": 7, "skipped_steps": trained.skipped}))
        return runs.Run(tmp_path / "run", preset.name, name, "key", trained.source)

    def trained(*arguments):
        assert cli.main(["train", *map(str, arguments)]) == 0
        return calls[-1]

    trained.source, trained.skipped = "trained now", 0
    monkeypatch.setattr(training, "train", train)
    return trained


def spec_of(*arguments):
    return command.source_of(cli._parser().parse_args(["train", *map(str, arguments)]))


def test_own_pictures_become_a_dataset(pictures):
    preset, name = own.with_own_pictures(get_preset("mini"), spec_of("--data", pictures, "--dataset", "mine"), 1)
    spec = preset.datasets["mine"]
    assert (name, spec.train_rows, spec.held_out_rows) == ("mine", 2, 1)
    assert preset.validation_prompts["mine"] == ("picture 0", "picture 1", "picture 2")
    with pytest.raises(ValueError, match="none to train on"):
        own.with_own_pictures(get_preset("mini"), spec_of("--data", pictures), 3)
    with pytest.raises(ValueError, match="doodles"):
        own.with_own_pictures(get_preset("mini"), spec_of("--data", pictures, "--dataset", "doodles"), 0)


def test_validation_prompts_are_four_different_captions(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    rows = "".join(f"x.png,{caption}\n" for caption in ["", "a", "b", "a", "", "c", "d", "e"])
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{rows}")
    spec = spec_of("--data", tmp_path, "--dataset", "mine")
    preset, name = own.with_own_pictures(get_preset("mini"), spec, 0)
    assert preset.validation_prompts[name] == ("a", "b", "c", "d")


def test_train_takes_a_folder(trained, pictures, capsys):
    spec = trained("--data", pictures, "--held-out", 1)["spec"]
    assert (spec.name, spec.source) == ("my_pictures", f"folder:{pictures}")
    assert (spec.train_rows, spec.held_out_rows, spec.image_column, spec.text_column) == (2, 1, "image", "text")
    said = capsys.readouterr().out
    assert said.startswith("my_pictures: 3 pictures\n") and "\ntrained now: " in said


@pytest.mark.parametrize("option", ["--text-column", "--caption-column"])
def test_train_takes_a_parquet_file(trained, tmp_path, monkeypatch, option):
    from datasets import Dataset
    from datasets import Image as ImageColumn

    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    rows = {"photo": [Image.new("RGB", (8, 8))] * 2, "words": ["a", "b"]}
    Dataset.from_dict(rows).cast_column("photo", ImageColumn()).to_parquet(tmp_path / "few.parquet")
    call = trained("--data", tmp_path / "few.parquet", "--image-column", "photo", option, "words")
    spec = call["spec"]
    assert (spec.name, spec.source, spec.train_rows) == ("few", f"parquet:{tmp_path}/few.parquet", 2)
    assert (spec.image_column, spec.text_column) == ("photo", "words")
    assert call["preset"].validation_prompts["few"] == ("a", "b")


def test_train_takes_a_hub_dataset(trained, monkeypatch, tmp_path, capsys):
    from datasets import Dataset

    from helpers.base import hub
    from helpers.data import loading as data

    asked = []
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    rows = Dataset.from_dict({"image": [str(tmp_path / "x.png")] * 5, "text": list("abcde")})
    monkeypatch.setattr(data, "load_dataset", lambda place, split, cache_dir: rows)
    copy = hub.Copy(tmp_path, "some-one/pokemon.blip", "c" * 40)
    monkeypatch.setattr(hub, "fetch", lambda what, repositories, *args, **settings: asked.append(*repositories) or copy)
    spec = trained("--data", "some-one/pokemon.blip", "--revision", "abc", "--held-out", "2")["spec"]
    assert set(asked) == {("some-one/pokemon.blip", "abc")}
    assert (spec.name, spec.source, spec.revision) == ("pokemon_blip", "hub:some-one/pokemon.blip", "abc")
    assert (spec.train_rows, spec.held_out_rows) == (3, 2)
    assert "some-one/pokemon.blip of the Hugging Face hub" in capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    (tmp_path / "some-one" / "pokemon.blip").mkdir(parents=True)
    assert spec_of("--data", "some-one/pokemon.blip").source.startswith("folder:"), "what is here comes first"


def test_shapes_and_skipped_steps_are_told(trained, pictures, capsys):
    trained.skipped = 3
    spec = trained("--data", pictures, "--dataset", "mine", "--caption", " in zwx style ")["spec"]
    said = capsys.readouterr().out
    assert spec.caption == "in zwx style" and "mine: 3 pictures" in said and "3 square" in said
    assert "skipped: 3 of 7 steps, whose gradients overflowed in fp16" in said
    assert cli.main(["train", "--dataset", "doodles", "--caption", "zwx"]) == 1
    assert "--caption goes with --data" in capsys.readouterr().err


def test_settings_have_options_of_their_own(trained):
    given = ["--steps", 7, "--batch-size", 2, "--learning-rate", "1e-4", "--seed", 3, "--set", "use_rslora=True"]
    config = trained("--dataset", "doodles", *given)["config"]
    assert (config.steps, config.batch_size, config.learning_rate, config.seed) == (7, 2, 1e-4, 3)
    assert config.use_rslora
    assert (config.rank, config.alpha) == (get_preset("mini").train.rank, get_preset("mini").train.alpha)


@pytest.mark.parametrize(
    ("given", "alpha"),
    [([], 8.0), (["--alpha", 4], 4.0), (["--set", "alpha=4.0"], 4.0), (["--alpha", 16], 16.0)],
)
def test_a_rank_alone_brings_its_alpha(trained, given, alpha):
    config = trained("--dataset", "doodles", "--rank", 8, *given)["config"]
    assert (config.rank, config.alpha) == (8, alpha)


def test_an_option_equals_the_setting_of_that_name(trained):
    """Equal settings, and so equal keys: one run."""
    options = trained("--dataset", "doodles", "--rank", 8, "--steps", 5)["config"]
    settings = [part for pair in ("rank=8", "alpha=8.0", "steps=5") for part in ("--set", pair)]
    assert repr(options) == repr(trained("--dataset", "doodles", *settings)["config"])


def test_trackers_may_be_repeated(trained):
    assert trained("--dataset", "doodles")["tracker"] is None
    given = ["--tracker", "wandb", "--tracker", "tensorboard"]
    assert trained("--dataset", "doodles", *given)["tracker"] == ["wandb", "tensorboard"]


@pytest.mark.parametrize(("source", "exported"), [("trained now", 1), ("found in runs", 1), ("reference", 0)])
def test_a_run_is_exported_as_the_reference(trained, monkeypatch, tmp_path, capsys, source, exported):
    from helpers.training import runs

    monkeypatch.setattr(runs, "export_reference", lambda run: tmp_path / "kept" / run.dataset)
    trained.source = source
    trained("--dataset", "doodles", "--export-reference")
    assert capsys.readouterr().out.count(f"reference: {tmp_path}/kept/doodles/") == exported


def test_differences_of_a_figure_are_said(tmp_path):
    from helpers.course.figures import picture_difference

    def phrase(first, second):
        return figure.describe_difference(tmp_path / first, tmp_path / second, picture_difference)

    for name, value, size in (("a", 10, 8), ("b", 12, 8), ("c", 10, 9)):
        Image.new("RGB", (size, size), (value,) * 3).save(tmp_path / f"{name}.png")
    Image.new("RGB", (8, 8), (10,) * 3).save(tmp_path / "d.png", compress_level=0)
    assert "byte for byte" in phrase("a.png", "a.png")
    assert "2.00 grey levels" in phrase("a.png", "b.png")
    assert "another size" in phrase("a.png", "c.png")
    assert "every pixel" in phrase("a.png", "d.png")
    assert "no" in phrase("a.png", "none.png")


def test_a_figure_is_found_in_the_notebook_that_names_it(course):
    write_notebook(course / "notebooks/02_second.ipynb", FIRST, 'save_figure(fig, "fig07_x", PRESET)')
    assert figure.notebook_of("fig07").name == "02_second.ipynb"
    (course / "report").mkdir()
    entry = {"notebook": "01_first", "provenance": "p"}
    results = {"values": {}, "provenance": {}, "figures": {"fig07_x": entry}}
    (course / "report/results.json").write_text(json.dumps(results))
    assert figure.notebook_of("fig07").name == "01_first.ipynb", "what was recorded counts more than what is named"


# -------------------------------------------------------------------------------------------------------- check
def outcome(name, passed=1, failed=0):
    return lambda *_: checks.Outcome(name, passed, failed, 0, f"{passed} passed")


GROUPS = ("lint", "types", "unit_tests", "notebook_tests", "measured_numbers")


@pytest.mark.parametrize("failing", [None, *GROUPS])
def test_check_runs_everything_and_fails_when_one_does(tmp_path, monkeypatch, failing):
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path))
    for name in GROUPS:
        monkeypatch.setattr(checks, name, outcome(name, failed=int(name == failing)))
    said = []
    assert checks.check(said.append) is (failing is None)
    assert said[-1] == f"total: {len(GROUPS)} passed, {int(failing is not None)} failed, 0 skipped"


@pytest.mark.parametrize(
    ("source", "counts"),
    [
        ("def test_a(): pass\ndef test_b(): assert 0", (1, 1)),
        ("def test_a(): pass", (1, 0)),
        ("", (0, 1)),
        ("syntax error", (0, 1)),
    ],
)
def test_pytest_is_counted_and_no_test_is_a_failure(tmp_path, source, counts):
    (tmp_path / "test_x.py").write_text(source)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    found = checks._pytest("x", ["-p", "no:cacheprovider", str(tmp_path)], environment)
    assert (found.passed, found.failed) == counts


@pytest.mark.parametrize(
    ("source", "counts"),
    [
        ("def double(x: int) -> int:\n    return 2 * x\n", (1, 0)),
        ("def double(x: int) -> str:\n    return 2 * x\n", (0, 1)),
        ("x: int = 1  # type: ignore[assignment]\n", (0, 1)),  # ignores what is not there
    ],
)
def test_types_are_checked(tmp_path, monkeypatch, source, counts):
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    (tmp_path / "x.py").write_text(source)
    found = checks.types(dict(os.environ), tmp_path / "x.py")
    assert (found.passed, found.failed) == counts
    assert (tmp_path / "runs" / "mypy").is_dir() and not (checks.ROOT / ".mypy_cache").exists()


def test_no_notebooks_is_a_failure():
    assert checks.notebook_tests({}, []).failed == 1


def test_strict_notebook_tests_compare_outputs(tmp_path):
    cell = new_code_cell("print('x ≈0.91')", execution_count=1)
    cell.outputs = [new_output("stream", text="x ≈0.93\n")]
    notebooks.write(new_notebook(cells=[cell]), tmp_path / "01_x.ipynb")
    assert checks.notebook_tests(dict(os.environ), [tmp_path / "01_x.ipynb"]).failed == 0
    cell.outputs = [new_output("stream", text="y ≈0.93\n")]
    notebooks.write(new_notebook(cells=[cell]), tmp_path / "01_x.ipynb")
    assert checks.notebook_tests(dict(os.environ), [tmp_path / "01_x.ipynb"]).failed == 1


def test_measured_numbers_are_compared(tmp_path):
    def write(name, value):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        values = {"x": {"value": value, "tolerance": 0.1, "provenance": "p"}}
        path = folder / "results.json"
        path.write_text(json.dumps({"values": values, "figures": {}, "provenance": {}}))
        return path

    committed = write("committed", 1.0)
    environment = {"COURSE_OUTPUT": str(tmp_path / "measured")}
    assert checks.measured_numbers(environment, committed).failed == 1, "nothing measured"
    write("measured", 1.05)
    assert checks.measured_numbers(environment, committed).failed == 0
    write("measured", 1.5)
    assert checks.measured_numbers(environment, committed).failed == 1


def test_the_command_starts_without_torch():
    """`course --help` answers at once."""
    import subprocess

    code = "import sys; from helpers import cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=notebooks.ROOT, check=False).returncode == 0


# Says what the runtime would read when torch is first asked for
WATCHED = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()
sys.meta_path.insert(0, Watch())
import {module}
import torch
"""


def waiting(module, **said):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in names} | said
    command = [sys.executable, "-c", WATCHED.format(module=module)]
    done = subprocess.run(command, cwd=notebooks.ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_threads_soon_wait_asleep_unless_told_otherwise():
    """Under the command, and in a notebook's first cell."""
    assert waiting("json") == "None" and waiting("helpers.cli") == waiting("helpers.course") == "2000"
    assert waiting("helpers.cli", GOMP_SPINCOUNT="7") == "7"
    assert waiting("helpers.cli", OMP_WAIT_POLICY="active") == "None"

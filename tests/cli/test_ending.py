"""What `course train` leaves beside an adapter and says at its end."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from helpers.base.paths import ROOT
from helpers.cli import train as ending
from helpers.presets.variants import get_preset
from helpers.training.runs import Run

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def run_with(folder, *columns, preset="mini", source="trained now"):
    """A run with one validation a column: the colours of its pictures, one a prompt."""
    (folder / "adapter").mkdir(parents=True)
    for step, colours in enumerate(columns):
        place = folder / "validation" / f"step-{step * 10:06d}"
        place.mkdir(parents=True)
        for number, colour in enumerate(colours):
            Image.new("RGB", (4, 4), colour).save(place / f"{number:03d}.png")
        (place / "metrics.json").write_text(json.dumps({"step": step * 10, "epoch": step}))
    return Run(folder, preset, "mine", "key", source)


def colours_of(path):
    with Image.open(path) as sheet:
        return [[sheet.getpixel((x, y)) for x in range(2, sheet.width, 4)] for y in range(2, sheet.height, 4)]


def test_the_evolution_has_a_row_a_prompt_and_a_column_a_validation(tmp_path):
    run = run_with(tmp_path / "run", (RED, RED), (GREEN, RED), (BLUE, GREEN))
    left = ending.leave_pictures(run)
    assert {path.parent for path in left.values()} == {tmp_path / "run" / "adapter"}
    assert colours_of(left["evolution"]) == [[RED, GREEN, BLUE], [RED, RED, GREEN]]
    assert colours_of(left["before and after"]) == [[RED, BLUE], [RED, GREEN]]


def test_a_long_evolution_is_thinned_out_and_keeps_its_ends(tmp_path):
    run = run_with(tmp_path / "run", *[((9 * n, 0, 0),) for n in range(20)])
    (row,) = colours_of(ending.leave_pictures(run)["evolution"])
    assert len(row) == ending.COLUMNS and row[0] == (0, 0, 0) and row[-1] == (9 * 19, 0, 0)


def test_one_validation_is_no_evolution_and_neither_is_one_without_prompts(tmp_path):
    assert ending.leave_pictures(run_with(tmp_path / "run", (RED,))) == {}
    assert ending.leave_pictures(run_with(tmp_path / "no prompts", (), ())) == {}


@pytest.mark.parametrize(("source", "written"), [("trained now", True), ("found in runs", True), ("reference", False)])
def test_the_repositorys_own_runs_are_left_alone(tmp_path, capsys, source, written):
    ending.print_ending(get_preset("mini"), run_with(tmp_path / "run", (RED,), (BLUE,), source=source))
    assert (tmp_path / "run" / "adapter" / "evolution.png").exists() is written
    assert ("before and after: " in capsys.readouterr().out) is written


def test_commands_name_preset_dataset_and_a_prompt(tmp_path, monkeypatch):
    preset, run = get_preset("sd15"), run_with(tmp_path / "run", preset="sd15")
    preset = replace(preset, validation_prompts={"mine": ('a "red"\n$cat',)})
    monkeypatch.setattr(ending, "find_adapter", lambda preset, name: run.adapter)
    said = "\n".join(ending.ways_to_use(preset, run))
    assert """course sample --preset sd15 --prompt 'a "red" $cat' --adapter mine""" in said
    assert "from_pretrained('stable-diffusion-v1-5/stable-diffusion-v1-5')" in said
    assert "course adapter convert --preset sd15 mine mine.safetensors" in said
    assert "ComfyUI/models/loras" in said and "stable-diffusion-webui/models/Lora" in said


def test_a_run_that_the_datasets_name_does_not_stand_for_is_named_by_its_file(tmp_path, monkeypatch):
    """`--adapter doodles` is the run with the preset's own settings; this one has others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    run = replace(run_with(tmp_path / "doodles run"), dataset="doodles")
    said = "\n".join(ending.ways_to_use(get_preset("mini"), run))
    assert "--adapter 'doodles run/adapter/pytorch_lora_weights.safetensors'" in said
    [reference] = (ROOT / "helpers/minisd/reference").glob("doodles-*")
    monkeypatch.setattr(ending, "find_adapter", lambda preset, name: replace(run, dir=reference).adapter)
    assert "--adapter doodles" in "\n".join(ending.ways_to_use(get_preset("mini"), replace(run, dir=reference)))


def test_paths_for_diffusers_hold_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run(ROOT / "runs/mini/mine-key", "mini", "mine", "key")
    monkeypatch.setattr(ending, "find_adapter", lambda preset, name: run.adapter)
    said = "\n".join(ending.ways_to_use(get_preset("mini"), run))
    assert repr(str(ROOT / get_preset("mini").model)) in said and repr(str(run.adapter.parent)) in said


def test_the_lines_for_diffusers_run(monkeypatch):
    """On MiniSD and the repository's own adapter, as they are printed."""
    monkeypatch.chdir(ROOT)
    [folder] = (ROOT / "helpers/minisd/reference").glob("doodles-*")
    said = ending.ways_to_use(get_preset("mini"), Run(folder, "mini", "doodles", "key", "reference"))
    code = "\n".join(line.strip() for line in said if line.startswith("    "))
    names: dict = {}
    exec(code, names)
    assert names["pipeline"].get_active_adapters() == ["default_0"]
    assert not any("stable-diffusion-webui" in line for line in said)

"""Going through a study: its grid, a storage that several workers share, and what is written at the end.

No trial trains here: `run_trial` is replaced by one that only writes down who asked.
"""

import importlib.util
import json
import sys
import threading
import time
from collections import Counter
from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState

from helpers.base.paths import ROOT
from helpers.studies import questions as studies
from helpers.studies import sweep, trials
from helpers.studies.effects import Findings
from helpers.studies.questions import CENTRE, STUDIES, Point, Study, get_study
from helpers.studies.sweep import SweepError, adopt, code_hash, enqueue, finished, grid, key_of, open_study, work

SMALL = Study(
    name="small",
    question="Does the sweep run?",
    style="doodles",
    measured_at=(2, 4),
    points=(
        Point(CENTRE, ""),
        Point("control", "base", {"control": "base"}),
        Point("control", "random", {"control": "random"}),
        Point("rank", "4", {"rank": 4, "alpha": 4.0}),
    ),
    seeds=(0, 1),
)
PLAIN = replace(SMALL, points=(SMALL.points[0], SMALL.points[3]), seeds=(0, 1, 2))  # its grid is points x seeds


def fake_result(study, style=0.5):
    values = {"style.world": [style, style + 0.1], "content.world": [0.25, 0.75]}
    return {"measures": {str(step): values for step in study.measured_at}, "run": "a-run"}


@pytest.fixture
def storage(tmp_path):
    return f"sqlite:///{tmp_path / 'optuna.db'}"


@pytest.fixture
def asked(monkeypatch):
    """The (point, seed) of each trial that was run, in order."""
    found = []

    def run_trial(study, point, seed):
        found.append((point.name, seed))
        time.sleep(0.02)
        return fake_result(study)

    monkeypatch.setattr(trials, "run_trial", run_trial)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return found


def quiet(line):
    pass


def states(opened):
    return Counter(trial.state.name for trial in opened.get_trials(deepcopy=False))


# --- the grid -------------------------------------------------------------------------------------------------------


def test_the_grid_goes_seed_by_seed_with_the_controls_last():
    assert grid(SMALL) == [
        (CENTRE, 0), ("rank=4", 0), ("control=base", 0), ("control=random", 0),
        (CENTRE, 1), ("rank=4", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_study_s_grid_is_whole(study):
    found = grid(study)
    assert len(set(found)) == len(found)
    for seed in study.seeds:
        names = [name for name, other in found if other == seed]
        controls = [name.startswith("control=") for name in names]
        assert names[0] == CENTRE and controls == sorted(controls), "the centre first, controls last"
        once = {point.name for point in study.points if "control" in point.settings}
        assert {point.name for point in study.points} - set(names) == (set() if seed == study.seeds[0] else once)
    assert [seed for _, seed in found] == sorted(seed for _, seed in found)


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_name_is_unique_and_leads_back_to_its_point(study):
    names = [point.name for point in study.points]
    assert len(set(names)) == len(names)
    assert [study.point(name) for name in names] == list(study.points)
    settings = [json.dumps(dict(point.settings), sort_keys=True) for point in study.points]
    assert len(set(settings)) == len(settings), "two points with the same settings would be the same trial"
    assert study.points[0].name == CENTRE and not study.points[0].settings, "controls take what points[0] says"


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_point_s_preset_keeps_what_is_measured(study):
    for point in study.points:
        for seed in study.seeds:
            preset, spec = study.preset(point, seed)
            config = preset.train
            kept = [s for s in range(1, config.steps + 1) if s % config.checkpoint_every == 0 or s == config.steps]
            assert set(study.measured_at) <= set(kept[-config.keep_checkpoints :]), point.name
            assert config.steps == study.steps == study.measured_at[-1] and config.seed == seed
            assert preset.datasets[spec.name] is spec and spec.name == study.style
            assert spec.source.startswith(f"drawn:{study.style}") and spec.held_out_rows >= study.loss_rows
            for name, value in point.settings.items():
                if name not in ("rows", "source", "method", "control"):
                    assert getattr(config, name) == value, f"{point.name}: {name}"
            assert spec.train_rows == point.settings.get("rows", spec.train_rows)


def test_points_of_a_study_train_different_runs():
    for study in STUDIES.values():
        presets = [study.preset(point, 0) for point in study.points if "control" not in point.settings]
        configs = [(preset.train, spec, point.settings.get("method")) for (preset, spec), point in zip(
            presets, [p for p in study.points if "control" not in p.settings], strict=True
        )]  # fmt: skip
        assert len(set(configs)) == len(configs), study.name


def test_another_style_s_preset_is_the_centre_on_other_pictures():
    preset, spec = SMALL.preset(SMALL.points[0], 1, "vintage")
    assert spec.source == "drawn:vintage" and spec.train_rows == 685 and preset.train.seed == 1
    assert preset.train == SMALL.preset(SMALL.points[0], 1)[0].train


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'small' has no point 'rank=5'; it has centre, control=base"):
        SMALL.point("rank=5")
    with pytest.raises(ValueError, match="unknown study 'width'; known: hyperparameters"):
        get_study("width")
    assert get_study("overfitting", prompts=3).prompts == 3 != get_study("overfitting").prompts


# --- the storage ----------------------------------------------------------------------------------------------------


def test_the_storage_s_study_is_named_by_the_code(storage, monkeypatch):
    first = open_study(SMALL, storage)
    assert enqueue(SMALL, first) == 6 and first.study_name == open_study(SMALL, storage).study_name
    monkeypatch.setattr(sweep, "code_hash", lambda study: "other code!!")
    other = open_study(SMALL, storage)
    assert other.study_name != first.study_name and not other.get_trials()
    assert all(name.startswith("small-") for name in (first.study_name, other.study_name))


def test_other_points_and_seeds_are_another_study_of_the_storage_with_the_same_hash(storage):
    names = {open_study(study, storage).study_name for study in (SMALL, PLAIN, replace(SMALL, seeds=(0,)))}
    assert len(names) == 3 and len({code_hash(study) for study in (SMALL, PLAIN, replace(SMALL, seeds=(0,)))}) == 1


@pytest.mark.parametrize(
    "change",
    [{"prompts": 3}, {"loss_rows": 3}, {"copies": True}, {"unprompted": True}, {"measured_at": (1, 4)},
     {"style": "vintage"}, {"base": {"rank": 3}}, {"measured_at": (2, 6)}],
    ids=str,
)  # fmt: skip
def test_whatever_changes_the_numbers_changes_the_hash(change):
    assert len(code_hash(SMALL)) == 12 and code_hash(replace(SMALL, **change)) != code_hash(SMALL)


def test_every_module_that_measures_is_there():
    assert all(importlib.util.find_spec(name) for name in sweep.MEASURING)


def test_sweeps_that_begin_at_once_open_a_new_file_one_after_the_other(storage, monkeypatch):
    inside, most = [], []

    def slow(*_, **__):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        raise RuntimeError("far enough")

    def opens():
        with pytest.raises(SweepError, match="far enough"):
            open_study(SMALL, storage)

    monkeypatch.setattr(sweep, "RDBStorage", slow)
    monkeypatch.setattr(sweep, "code_hash", lambda study: "hash")
    threads = [threading.Thread(target=opens) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


def test_a_storage_that_cannot_be_opened_is_named():
    with pytest.raises(SweepError, match="cannot open the storage 'nonsense://nowhere'"):
        open_study(SMALL, "nonsense://nowhere")
    with pytest.raises(SweepError, match="cannot open the storage 'sqlite:////no/such/folder/a.db'"):
        open_study(SMALL, "sqlite:////no/such/folder/a.db")


def test_putting_trials_in_line_twice_changes_nothing(storage):
    opened = open_study(SMALL, storage)
    assert [enqueue(SMALL, opened), enqueue(SMALL, open_study(SMALL, storage))] == [6, 0]
    waiting = opened.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    assert [key_of(trial) for trial in waiting] == grid(SMALL)


def test_failed_trials_are_put_in_line_again(storage, asked):
    opened = open_study(SMALL, storage)
    enqueue(SMALL, opened)
    opened.tell(opened.ask(), state=TrialState.FAIL)  # as when its worker is stopped by hand
    assert states(opened) == {"FAIL": 1, "WAITING": 5}
    assert enqueue(SMALL, opened) == 1 and enqueue(SMALL, opened) == 0
    work(SMALL, storage, quiet)
    assert sorted(asked) == sorted(grid(SMALL)) and asked[-1] == (CENTRE, 0), "it waits at the end of the line"
    assert enqueue(SMALL, opened) == 0


# --- workers ----------------------------------------------------------------------------------------------------------


def test_one_worker_runs_every_trial_in_order(storage, asked):
    opened, lines = open_study(SMALL, storage), []
    enqueue(SMALL, opened)
    work(SMALL, storage, lines.append)
    assert asked == grid(SMALL) and states(opened) == {"COMPLETE": 6}
    assert lines[0] == "1/6 centre, seed 0: style 0.55, content 0.50" and lines[-1].startswith("6/6 rank=4")
    done = finished(opened)
    assert set(done) == set(grid(SMALL)) and done["rank=4", 1].values == pytest.approx([0.55, 0.5])
    assert done["rank=4", 1].user_attrs["result"] == fake_result(SMALL)


def in_two_threads(study, storage):
    """What two workers at once raise: nothing, if all is well. Each has its own connection to the storage."""
    failures = []

    def worker():
        try:
            work(study, storage, quiet)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=worker, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return failures + [thread for thread in threads if thread.is_alive()]


def test_two_workers_run_every_trial_exactly_once(storage, monkeypatch):
    """On one SQLite file. Between looking for a waiting trial and taking it, both are slowed down."""
    study, found, by = replace(PLAIN, seeds=tuple(range(5))), [], Counter()

    def run_trial(study, point, seed):
        found.append((point.name, seed))
        by[threading.get_ident()] += 1
        time.sleep(0.3)  # a trial takes longer than taking one, or the other worker would never get its turn
        return fake_result(study)

    def slow(self, trial_id, state):
        check(self, trial_id, state)
        time.sleep(0.05)

    check = sweep.RDBStorage.check_trial_is_updatable
    monkeypatch.setattr(trials, "run_trial", run_trial)
    monkeypatch.setattr(sweep, "code_hash", lambda study: "the same")  # ast.parse of Python 3.11 is for one thread
    opened = open_study(study, storage)
    enqueue(study, opened)
    monkeypatch.setattr(sweep.RDBStorage, "check_trial_is_updatable", slow)
    assert not in_two_threads(study, storage)
    assert sorted(found) == sorted(grid(study)), "all of them, and none twice"
    assert len(by) == 2 and set(finished(opened)) == set(grid(study)) and states(opened)["COMPLETE"] == 10


class LateWorker:
    """A study's view of a worker that saw a waiting trial which another one took meanwhile."""

    def __init__(self, opened):
        self.opened, self.believes = opened, 1

    def __getattr__(self, name):
        return getattr(self.opened, name)

    def get_trials(self, deepcopy=True, states=None):
        if states == (TrialState.WAITING,) and self.believes:
            self.believes -= 1
            return ["somebody else's by now"]
        return self.opened.get_trials(deepcopy, states)


@pytest.mark.parametrize("times", range(3))
def test_a_fresh_trial_measures_nothing_when_all_are_taken(storage, asked, monkeypatch, times):
    opened = open_study(PLAIN, storage)
    enqueue(PLAIN, opened)
    work(PLAIN, storage, quiet)
    before = list(asked)
    monkeypatch.setattr(sweep, "open_study", lambda study, storage: LateWorker(opened))
    work(PLAIN, storage, quiet)
    assert asked == before and states(opened) == {"COMPLETE": 6, "FAIL": 1}
    assert enqueue(PLAIN, opened) == 0 and set(finished(opened)) == set(grid(PLAIN))


def test_a_trial_in_line_twice_is_run_once(storage, asked):
    opened = open_study(PLAIN, storage)
    enqueue(PLAIN, opened)
    for point, seed in grid(PLAIN)[:2]:
        opened.enqueue_trial({"point": point, "seed": seed})
    work(PLAIN, storage, quiet)
    assert asked == grid(PLAIN) and states(opened) == {"COMPLETE": 6, "FAIL": 2}


def taken_by_a_worker(opened):
    """A trial that is running elsewhere, whose worker has just given a sign of life."""
    trial = opened.ask()
    key = (
        trial.suggest_categorical("point", [p.name for p in PLAIN.points]),
        trial.suggest_categorical("seed", list(PLAIN.seeds)),
    )
    opened._storage.record_heartbeat(trial._trial_id)
    return trial, key


def test_the_trial_of_a_dead_worker_waits_again(storage, asked, monkeypatch):
    monkeypatch.setattr(sweep, "HEARTBEAT", 1)
    monkeypatch.setattr(sweep, "GRACE", 2)
    opened = open_study(PLAIN, storage)
    enqueue(PLAIN, opened)
    trial, key = taken_by_a_worker(opened)
    assert enqueue(PLAIN, opened) == 0 and states(opened) == {"RUNNING": 1, "WAITING": 5}, "it may be alive"
    time.sleep(4)
    assert enqueue(PLAIN, opened) == 0, "Optuna has put it in line, so that nothing is missing"
    assert states(opened) == {"FAIL": 1, "WAITING": 6}
    work(PLAIN, storage, quiet)
    assert key == grid(PLAIN)[0] and sorted(asked) == sorted(grid(PLAIN))
    assert states(opened) == {"FAIL": 1, "COMPLETE": 6}
    retried = finished(opened)[key]
    assert retried.number == 6 and retried.system_attrs["failed_trial"] == trial.number


def test_the_trial_of_a_slow_worker_is_left_to_it(storage, asked):
    opened = open_study(PLAIN, storage)
    enqueue(PLAIN, opened)
    _, key = taken_by_a_worker(opened)
    work(PLAIN, storage, quiet)
    assert key not in asked and len(asked) == 5 and states(opened) == {"RUNNING": 1, "COMPLETE": 5}


def test_an_error_in_a_trial_ends_the_worker_and_keeps_what_is_done(storage, asked, monkeypatch):
    def run_trial(study, point, seed):
        if (point.name, seed) == grid(PLAIN)[3]:
            raise RuntimeError("the disk is full")
        return fake_result(study)

    opened = open_study(PLAIN, storage)
    enqueue(PLAIN, opened)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the disk is full"):
        patch.setattr(trials, "run_trial", run_trial)
        work(PLAIN, storage, quiet)
    assert states(opened) == {"COMPLETE": 3, "FAIL": 1, "WAITING": 2}
    assert enqueue(PLAIN, opened) == 1
    work(PLAIN, storage, quiet)
    assert set(finished(opened)) == set(grid(PLAIN)) and len(asked) == 3


# --- a whole sweep, and its result ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where finished studies go in this test."""
    monkeypatch.setattr(studies, "FOLDER", tmp_path / "studies")
    return tmp_path / "studies"


def trials_in(folder):
    return [(t["point"], t["seed"]) for t in json.loads((folder / "small.json").read_text())["trials"]]


def test_a_sweep_runs_what_is_missing_and_writes_it_down(storage, asked, folder):
    lines = []
    assert sweep.sweep(SMALL, storage, say=lines.append) and asked == grid(SMALL) == trials_in(folder)
    assert lines[0] == "small: 6 trials, 0 done (0 of them taken from the file)"
    assert lines[-1] == "small: complete; see small.json" and len(lines) == 8
    before = (folder / "small.json").read_bytes()
    lines.clear()
    assert sweep.sweep(SMALL, storage, say=lines.append), "a second time it is only written"
    assert lines[0] == "small: 6 trials, 6 done (0 of them taken from the file)" and len(lines) == 2
    assert asked == grid(SMALL) and (folder / "small.json").read_bytes() == before


def test_a_sweep_is_not_complete_while_another_machine_works(storage, asked, folder):
    opened, lines = open_study(PLAIN, storage), []
    enqueue(PLAIN, opened)
    _, key = taken_by_a_worker(opened)
    assert sweep.sweep(PLAIN, storage, say=lines.append) is False
    assert lines[-1] == "small: 1 trials are missing; see small.json"
    assert trials_in(folder) == [other for other in grid(PLAIN) if other != key]


def test_a_sweep_that_is_stopped_keeps_what_is_done(storage, asked, folder, monkeypatch):
    def run_trial(study, point, seed):
        if (point.name, seed) == grid(PLAIN)[2]:
            raise KeyboardInterrupt
        return fake_result(study)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trials, "run_trial", run_trial)
        sweep.sweep(PLAIN, storage, say=quiet)
    assert trials_in(folder) == grid(PLAIN)[:2] and not asked
    assert Findings.load("small", folder).seeds(CENTRE) == [0]
    assert sweep.sweep(PLAIN, storage, say=quiet) and sorted(asked) == sorted(grid(PLAIN)[2:])


# --- taking over what a file holds ------------------------------------------------------------------------------------


@pytest.fixture
def committed(storage, asked, folder):
    """A finished sweep of SMALL, whose storage is on another machine."""
    sweep.sweep(SMALL, storage, say=quiet)
    asked.clear()


def test_another_machine_takes_over_what_the_file_holds(committed, asked, folder, tmp_path):
    other, lines = f"sqlite:///{tmp_path / 'other.db'}", []
    before = (folder / "small.json").read_bytes()
    assert sweep.sweep(SMALL, other, say=lines.append) and not asked
    assert lines[0] == "small: 6 trials, 6 done (6 of them taken from the file)"
    opened = open_study(SMALL, other)
    assert finished(opened)["rank=4", 1].values == pytest.approx([0.55, 0.5]) and adopt(SMALL, opened) == 0
    assert (folder / "small.json").read_bytes() == before


def test_a_study_grows_by_points_and_seeds_and_keeps_what_it_has(committed, asked, storage, folder):
    grown = replace(SMALL, points=(*SMALL.points, Point("rank", "8", {"rank": 8})), seeds=(0, 1, 2))
    assert sweep.sweep(grown, storage, say=quiet)
    assert asked == [key for key in grid(grown) if key not in grid(SMALL)] and len(asked) == 5
    assert trials_in(folder) == grid(grown)


def test_a_point_whose_settings_changed_is_run_again(committed, asked, storage, folder):
    changed = replace(SMALL, points=(*SMALL.points[:3], Point("rank", "4", {"rank": 4, "alpha": 8.0})), seeds=(0, 1, 2))
    assert sweep.sweep(changed, storage, say=quiet)
    assert [key for key in asked if key[1] < 2] == [("rank=4", 0), ("rank=4", 1)]


def test_a_file_of_other_code_is_not_taken_over(committed, asked, storage, folder, monkeypatch):
    monkeypatch.setattr(sweep, "code_hash", lambda study: "other code!!")
    assert adopt(SMALL, open_study(SMALL, storage)) == 0
    assert sweep.sweep(SMALL, storage, say=quiet) and asked == grid(SMALL)


def test_without_a_file_there_is_nothing_to_take_over(storage, folder):
    opened = open_study(SMALL, storage)
    assert adopt(SMALL, opened) == 0 and not opened.get_trials()


# --- workers in processes of their own --------------------------------------------------------------------------------


def test_a_worker_that_fails_is_an_error(storage, monkeypatch):
    """Processes of their own, of a study that is not among those by name: both end with an error."""
    monkeypatch.setattr(sweep, "open_study", lambda *_: pytest.fail("the workers open it themselves"))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    monkeypatch.setitem(STUDIES, "small", SMALL)
    with pytest.raises(SweepError, match="2 of 2 workers failed; what is done is kept: start it again"):
        sweep.run_workers(SMALL, storage, 2, quiet)


def test_several_workers_share_the_cores_and_know_the_storage(monkeypatch):
    started, ends = [], iter((0, 0, 1, 0, 3))

    class Process:
        def __init__(self, command, env, cwd):
            started.append((command, env["OMP_NUM_THREADS"], env["COURSE_SWEEP_STORAGE"], cwd))

        def wait(self):
            return next(ends)

    monkeypatch.setitem(STUDIES, "small", SMALL)
    monkeypatch.setattr(sweep.subprocess, "Popen", Process)
    monkeypatch.setattr(sweep.os, "cpu_count", lambda: 8)
    sweep.run_workers(SMALL, "sqlite:///x.db", 2, quiet)
    assert started == [([sys.executable, "-m", "helpers.studies.sweep", "small"], "4", "sqlite:///x.db", ROOT)] * 2
    with pytest.raises(SweepError, match="2 of 3 workers failed"):
        sweep.run_workers(SMALL, "sqlite:///x.db", 3, quiet)
    assert [threads for _, threads, _, _ in started[2:]] == ["2"] * 3


def test_the_result_is_what_findings_read(storage, asked, folder):
    opened = open_study(SMALL, storage)
    enqueue(SMALL, opened)
    work(SMALL, storage, quiet)
    path = sweep.write(SMALL, opened)
    assert path == folder / "small.json" == SMALL.file
    assert [p.name for p in path.parent.iterdir()] == ["small.json"], "nothing temporary is left"

    findings = Findings.load("small", folder)
    assert findings.about["command"] == "course sweep --study small"
    assert findings.about["code"] == code_hash(SMALL) and findings.about["question"] == SMALL.question
    assert findings.about["points"]["rank=4"] == {"rank": 4, "alpha": 4.0} and findings.about["prompts"] == 64
    assert {"torch", "python"} <= {name.lower() for name in findings.about["versions"]}
    assert list(findings.trials) == grid(SMALL) and findings.steps == 4
    assert findings.values("rank=4", "style.world", 2).tolist() == [[0.5, 0.6]] * 2
    assert findings.seeds("control=base") == [0] and findings.effect("rank=4", "style.world").value == 0
    assert len(path.read_text().splitlines()) > 7, "one line a trial, for whoever compares two versions"


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_study_s_description_survives_json(study):
    points = {point.name: dict(point.settings) for point in study.points}
    read = json.loads(json.dumps(points))
    assert list(read) == list(points) and all(read[name].keys() == points[name].keys() for name in points)


def test_the_default_storage_lies_in_the_runs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    assert sweep.default_storage() == f"sqlite:///{tmp_path / 'runs' / 'studies' / 'optuna.db'}"
    assert open_study(SMALL, sweep.default_storage()).get_trials() == []


def test_a_sweep_that_is_stopped_leaves_a_fuller_file_alone(committed, folder, tmp_path, monkeypatch):
    before = (folder / "small.json").read_bytes()

    def stopped(study, point, seed):
        raise KeyboardInterrupt

    monkeypatch.setattr(trials, "run_trial", stopped)
    for code in ("the same", "other code"):
        monkeypatch.setattr(sweep, "code_hash", lambda study, code=code: code)
        with pytest.raises(KeyboardInterrupt):
            sweep.sweep(replace(SMALL, seeds=(0, 1, 2)), f"sqlite:///{tmp_path / code}.db", say=quiet)
        assert (folder / "small.json").read_bytes() == before


def test_worker_processes_refuse_a_changed_study(storage, folder):
    changed = get_study("overfitting", prompts=2)
    with pytest.raises(SweepError, match="a changed one has one worker"):
        sweep.run_workers(changed, storage, 2, quiet)

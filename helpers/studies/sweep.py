"""Going through a study's grid with Optuna: one storage, any number of workers, on one machine or on several.

Every point with every seed is put into the storage as a waiting trial; workers take one at a time. A worker that dies
is noticed by its missing heartbeat, and its trial waits again. Nothing is pruned and nothing is sampled: a trial that
looked poor after a few steps would otherwise be missing from the intervals. The two objectives, style and content, are
there so that Optuna's own dashboard and `best_trials` show the Pareto front.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from filelock import FileLock
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState
from sqlalchemy import event

from helpers.base import provenance
from helpers.base.files import atomic_path
from helpers.base.paths import ROOT, runs_folder
from helpers.base.provenance import digest
from helpers.evaluation import classifier, probe
from helpers.presets.catalogue import MINISD
from helpers.studies.questions import CENTRE, Point, Study, get_study
from helpers.training.runs import run_config
from helpers.world.datasets import fingerprint

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # heartbeats are one since 2021
HEARTBEAT = 60  # seconds; a worker that is silent for five of them is taken for dead
GRACE = 5 * HEARTBEAT
MEASURING = (  # beside what a run depends on
    *("helpers.evaluation", "helpers.world", "helpers.training.full", "helpers.studies.trials"),
)


class SweepError(RuntimeError):
    """A study cannot be run or written down; the message says why."""


def default_storage() -> str:
    """The SQLite file in the runs folder. For several machines name a database server that all of them reach."""
    folder = runs_folder() / "studies"
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'optuna.db'}"


def code_hash(study: Study) -> str:
    """12 hexadecimal digits of what a study's numbers depend on: code, judges, the centre, and what is measured.

    Its other points and its seeds are not part of it: each trial is a function of its own point and seed, so that a
    study may grow and keep what it has.
    """
    code = provenance.code_hash(*MEASURING)
    judges = [provenance.file_hash(path) for path in (classifier.WEIGHTS, probe.WEIGHTS)]
    centre = run_config(study.preset(Point(CENTRE, ""), seed=0)[0], study.style)
    measured = [study.prompts, study.loss_rows, study.copies, study.unprompted, list(study.measured_at)]
    return digest([code, judges, centre, measured])[:12]


def grid(study: Study) -> list[tuple[str, int]]:
    """(name of a point, seed) of every trial: seed by seed, so that a sweep cut short has whole seeds.

    Controls come last, since some of them need the centre's adapter, and with the first seed alone.
    """
    points = sorted(study.points, key=lambda point: "control" in point.settings)
    return [
        (point.name, seed)
        for seed in study.seeds
        for point in points
        if seed == study.seeds[0] or "control" not in point.settings
    ]


# --- the storage --------------------------------------------------------------------------------------------------
def open_study(study: Study, storage: str) -> optuna.Study:
    """The study in a storage, made if need be. Its name changes with code, points and seeds: then it is another one."""
    name = f"{study.name}-{digest([code_hash(study), grid(study)])[:12]}"
    retry = RetryHeartbeatStaleTrialCallback(max_retry=3)
    beat = {"heartbeat_interval": HEARTBEAT, "grace_period": GRACE, "heartbeat_stale_trial_callback": retry}
    try:
        with one_at_a_time(storage):
            backend = RDBStorage(storage, engine_kwargs=connection_of(storage), **beat)
        if storage.startswith("sqlite:"):
            take_turns(backend)
    except Exception as error:  # SQLAlchemy's many kinds, and Optuna's
        raise SweepError(f"cannot open the storage {storage!r}: {error}") from error
    return optuna.create_study(
        study_name=name,
        storage=backend,
        directions=["maximize", "maximize"],
        sampler=optuna.samplers.RandomSampler(),  # never asked: every trial was put there by `enqueue`
        load_if_exists=True,
    )


def one_at_a_time(storage: str) -> AbstractContextManager[Any]:
    """For an SQLite file a lock beside it: two sweeps that begin at once would both make its tables."""
    file = storage.partition("sqlite:///")[2]
    there = file and Path(file).parent.is_dir()  # the lock would make a folder that is not
    return FileLock(f"{file}.lock", timeout=120) if there else nullcontext()


def connection_of(storage: str) -> dict[str, Any]:
    """How long a worker waits for the others' locks: SQLite's own five seconds are few when all start at once."""
    return {"connect_args": {"timeout": 120}} if storage.startswith("sqlite:") else {}


def take_turns(backend: RDBStorage) -> None:
    """Let every transaction on an SQLite file lock it from its beginning.

    Optuna takes a waiting trial by reading its state and then setting it, and asks the database to lock the row in
    between. SQLite has no such locks and ignores it, so that two workers would take the same trial.
    """

    @event.listens_for(backend.engine, "connect")
    def no_implicit_transactions(connection, _) -> None:
        connection.isolation_level = None

    @event.listens_for(backend.engine, "begin")
    def lock_now(connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    backend.engine.dispose()  # of the connections that were opened before


def key_of(trial: optuna.trial.FrozenTrial) -> tuple[str, int] | None:
    """(point, seed) of a trial, waiting ones included."""
    params = trial.params or trial.system_attrs.get("fixed_params", {})
    return (params["point"], params["seed"]) if {"point", "seed"} <= params.keys() else None


def finished(opened: optuna.Study) -> dict[tuple[str, int], optuna.trial.FrozenTrial]:
    """The completed trials by (point, seed)."""
    complete = opened.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return {key: trial for trial in complete if (key := key_of(trial)) is not None}


def enqueue(study: Study, opened: optuna.Study) -> int:
    """Put every trial of the grid that is neither done, running nor waiting into the storage; returns how many."""
    optuna.storages.fail_stale_trials(opened)
    states = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)
    known = {key_of(trial) for trial in opened.get_trials(deepcopy=False, states=states)}
    missing = [key for key in grid(study) if key not in known]
    for point, seed in missing:
        opened.enqueue_trial({"point": point, "seed": seed})
    return len(missing)


def adopt(study: Study, opened: optuna.Study) -> int:
    """Take over the trials of the committed file that today's study would run just so; returns how many.

    So a study can be finished on another machine than the one that began it, and grow by points and seeds.
    """
    if not study.file.exists():
        return 0
    committed = json.loads(study.file.read_text(encoding="utf-8"))
    if committed["code"] != code_hash(study):
        return 0
    done, wanted, count = finished(opened), set(grid(study)), 0
    for trial in committed["trials"]:
        key = trial.pop("point"), trial.pop("seed")
        settings = json.loads(json.dumps(dict(study.point(key[0]).settings))) if key in wanted else None
        if key in done or settings != committed["points"][key[0]]:
            continue
        opened.add_trial(
            optuna.create_trial(
                params={"point": key[0], "seed": key[1]},
                distributions=distributions(study),
                values=objectives(study, trial),
                user_attrs={"result": trial},
            )
        )
        count += 1
    return count


def distributions(study: Study) -> dict[str, optuna.distributions.CategoricalDistribution]:
    """What Optuna knows of the grid: the names of the points, and the seeds."""
    choices = {"point": [point.name for point in study.points], "seed": list(study.seeds)}
    return {name: optuna.distributions.CategoricalDistribution(values) for name, values in choices.items()}


def objectives(study: Study, result: dict[str, Any]) -> tuple[float, float]:
    """(style, content) of a trial after its last step: means over the prompts, as the first judge sees them."""
    last = result["measures"][str(study.steps)]
    return float(np.mean(last["style.world"])), float(np.mean(last["content.world"]))


class Duplicate(Exception):
    """A trial that another worker has taken: it is told as failed, and measures nothing."""


def work(study: Study, storage: str, say: Callable[[str], None] = print) -> None:
    """Take waiting trials and run them, one after the other, until none waits."""
    from helpers.studies.trials import run_trial

    opened, total = open_study(study, storage), len(grid(study))

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        name, seed = (trial.suggest_categorical(key, choices.choices) for key, choices in distributions(study).items())
        if (name, seed) not in grid(study):  # the last one was taken, and Optuna made one up
            raise Duplicate
        for other in opened.get_trials(deepcopy=False):
            alive = other.state in (TrialState.RUNNING, TrialState.COMPLETE)
            if other.number < trial.number and alive and key_of(other) == (name, seed):
                raise Duplicate
        found = run_trial(study, study.point(name), seed)
        trial.set_user_attr("result", found)
        style, content = objectives(study, found)
        say(f"{len(finished(opened)) + 1}/{total} {name}, seed {seed}: style {style:.2f}, content {content:.2f}")
        return style, content

    while opened.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        opened.optimize(objective, n_trials=1, catch=(Duplicate,))


# --- several workers, and the result ------------------------------------------------------------------------------
def sweep(study: Study, storage: str | None = None, workers: int = 1, say: Callable[[str], None] = print) -> bool:
    """Run what is missing of a study with some workers on this machine, and write down what there is.

    Start the same command on another machine with the same storage to share the work. Returns whether the study is
    complete: it is not while other machines still have some of it. Raises SweepError when a worker fails.
    """
    storage = storage or default_storage()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    opened = open_study(study, storage)
    taken = adopt(study, opened)
    say(f"{study.name}: {len(grid(study))} trials, {len(finished(opened))} done ({taken} of them taken from the file)")
    enqueue(study, opened)
    try:
        run_workers(study, storage, workers, say)
    finally:  # also when it is stopped: what is done is kept
        write(study, opened)
    missing = [key for key in grid(study) if key not in finished(opened)]
    say(f"{study.name}: {f'{len(missing)} trials are missing' if missing else 'complete'}; see {study.file.name}")
    return not missing


def run_workers(study: Study, storage: str, workers: int, say: Callable[[str], None]) -> None:
    """One worker in this process, or several in processes of their own, which share the cores out."""
    if workers == 1:
        work(study, storage, say)
        return
    if study != get_study(study.name):
        raise SweepError(f"worker processes know the study {study.name!r} by its name: a changed one has one worker")
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "COURSE_SWEEP_STORAGE": storage}
    command = [sys.executable, "-m", "helpers.studies.sweep", study.name]
    processes = [subprocess.Popen(command, env=environment, cwd=ROOT) for _ in range(workers)]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SweepError(f"{sum(map(bool, codes))} of {workers} workers failed; what is done is kept: start it again")


def write(study: Study, opened: optuna.Study) -> Path:
    """Keep a study's results beside the report: what was asked, with which code, and what came out of each trial.

    Of a study that is not complete, the trials that are done: the next sweep takes them over. A file of the same code
    that has more, or of other code while nothing is done, stays as it is.
    """
    done = finished(opened)
    keys = [key for key in grid(study) if key in done]
    if study.file.exists():
        there = json.loads(study.file.read_text(encoding="utf-8"))
        if not keys or (there["code"] == code_hash(study) and len(there["trials"]) > len(keys)):
            return study.file
    trials = [{"point": name, "seed": seed, **done[name, seed].user_attrs["result"]} for name, seed in keys]
    about = {
        "study": study.name,
        "question": study.question,
        "style": study.style,
        "command": f"course sweep --study {study.name}",
        "measured_at": list(study.measured_at),
        "prompts": study.prompts,
        "points": {point.name: dict(point.settings) for point in study.points},
        "base": dict(study.base),
        "code": code_hash(study),
        "weights": provenance.folder_weights_hash(ROOT / MINISD)[:12],
        "data": fingerprint(study.style, "train")[:12],
        "versions": provenance.versions(),
    }
    with atomic_path(study.file) as temporary:
        lines = ",\n".join(json.dumps(trial) for trial in trials)
        temporary.write_text(f'{json.dumps(about, indent=1)[:-2]},\n "trials": [\n{lines}\n]}}\n', encoding="utf-8")
    return study.file


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    work(get_study(sys.argv[1]), os.environ["COURSE_SWEEP_STORAGE"], lambda line: print(line, flush=True))

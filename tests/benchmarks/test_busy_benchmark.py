"""The benchmark of a busy machine as a program. What it measures, no test says."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from helpers.base.paths import ROOT

sys.path.insert(0, str(ROOT))  # benchmarks/ is no installed package
bench, records = (importlib.import_module(f"benchmarks.{name}") for name in ("busy", "records"))

TINY = bench.Settings("tiny", rounds=1, steps=1, neighbour="loop", warmup=0.0)


class FakeWorker:
    """Answers at once; `log` holds who was asked, and whether a neighbour was there."""

    log, there = [], False

    def __init__(self, waiting, settings):
        self.waiting, self.settings = waiting, settings

    def seconds(self, steps):
        FakeWorker.log.append((self.waiting, FakeWorker.there, steps))
        return 2.0 if FakeWorker.there else 1.0

    def close(self):
        FakeWorker.log.append((self.waiting, "closed"))


@pytest.fixture
def record(monkeypatch):
    from contextlib import contextmanager

    @contextmanager
    def neighbour(settings):
        FakeWorker.there = True
        yield
        FakeWorker.there = False

    FakeWorker.log = []
    monkeypatch.setattr(bench, "Worker", FakeWorker)
    monkeypatch.setattr(bench, "neighbour", neighbour)
    return bench.measure(bench.Settings("tiny", rounds=2, steps=3))


def test_everyone_is_asked_in_turn_quiet_and_busy(record):
    names = list(bench.WAITING)
    asked = [entry for entry in FakeWorker.log if len(entry) == 3]
    rounds = [(name, there, 3) for order in (names, names[::-1]) for there in (False, True) for name in order]
    assert asked == rounds and FakeWorker.log[len(rounds) :] == [(name, "closed") for name in names[::-1]]
    assert {found["ratio"] for found in record["busy_to_quiet"].values()} == {2.0}
    assert record["new_to_old_when_quiet"]["ratio"] == 1.0
    json.dumps(record, allow_nan=False)
    assert all(name in bench.table(record) for name in names) and "goals not met: none" in bench.table(record)


def test_the_goals_are_those_of_the_new_way(record):
    record["busy_to_quiet"][bench.OLD]["ratio"] = 20.0
    assert bench.missed(record) == []
    record["busy_to_quiet"][bench.NEW]["ratio"] = 2.6
    record["new_to_old_when_quiet"]["ratio"] = float("nan")
    assert bench.missed(record) == ["busy_to_quiet", "new_to_old_when_quiet"]


def test_each_way_of_waiting_says_all_there_is_to_say(monkeypatch):
    for name in bench.ASKED:
        monkeypatch.setenv(name, "of the shell")
    for waiting, said in bench.WAITING.items():
        found = bench.environment(waiting)
        assert {name: found[name] for name in bench.ASKED if name in found} == said
        assert found["PATH"] == os.environ["PATH"]
    assert bench.WAITING[bench.OLD] == {} and set().union(*bench.WAITING.values()) == set(bench.ASKED)


def test_a_worker_trains_as_asked_and_ends():
    worker = bench.Worker(bench.NEW, TINY)
    try:
        assert worker.seconds(2) > 0
    finally:
        worker.close()
    assert worker.process.returncode == 0
    with pytest.raises((RuntimeError, ValueError, BrokenPipeError)):
        worker.seconds(1)


def test_the_neighbour_computes_and_is_gone_afterwards(monkeypatch):
    started, start = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: started.append(start(*args, **more)) or started[-1])
    with bench.neighbour(TINY):
        assert started[0].poll() is None
    assert started[0].returncode not in (None, 0)


def test_a_tiny_run_is_written_only_where_it_is_asked_for(record, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "measure", lambda settings: record)
    monkeypatch.setattr(records, "RESULTS", tmp_path / "committed")
    assert bench.main(["--model", "tiny"]) == 0 and list(tmp_path.iterdir()) == []
    assert bench.main(["--model", "tiny", "--results", str(tmp_path), "--check"]) == 0
    [written] = tmp_path.iterdir()
    assert list(records.read_results(written)) == ["busy"] and "busy / quiet" in capsys.readouterr().out

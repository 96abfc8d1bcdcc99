"""One line for each parity fact: `python -m pytest tests/parity -q` prints them below the tests.

A test states a fact with the fixture `parity`, for each case it tries. A line's bracket names the cases that ran; it
says PASS if all of them passed. PASS lines name the bound, so they are the same on every machine; FAIL lines name
what was measured.
"""

import gc
import math

import pytest
import torch

LINES = pytest.StashKey[dict]()
FAILED = pytest.StashKey[set]()
ABOUT = (
    "CPU, float32. SD 1.5 and SD 2.1: tiny U-Nets of that structure with random weights. MiniSD: the course's model."
)


@pytest.fixture(autouse=True, scope="module")
def quick():
    """One thread, as the models are so small that a second one costs time; no search for garbage in the libraries."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


@pytest.fixture
def parity(request):
    """parity(what, difference, bound, where, **case): assert difference <= bound, and note it for the summary.

    Facts with the same words, bound and place become one line, which lists the values of their cases: each property
    by its name, but for `model` and `case`, whose values speak for themselves.
    """
    stash = request.config.stash
    lines, failed = stash.setdefault(LINES, {}), stash.setdefault(FAILED, set())
    group = request.module.__doc__.splitlines()[0].rstrip(".")

    def state(what, difference, bound=0.0, where="", **case):
        __tracebackhide__ = True
        passed = difference <= bound  # not so if the difference is NaN
        lines.setdefault(group, {}).setdefault((what, bound, where), []).append((case, difference, passed))
        if not passed:
            failed.add(request.node.nodeid)
        assert passed, f"{what}: max|Δ| is {difference:g}, the bound {bound:g} ({bracket(where, [case])})"

    return state


def bracket(where, cases):
    """ "SD 1.5; r 1, 4; dropout 0, 0.3": the place, and for each property the values that occur in the cases."""
    values = {
        key: list(dict.fromkeys(str(case[key]) for case in cases if key in case)) for case in cases for key in case
    }
    names = {key: "" if key in ("model", "case") else key + " " for key in values}
    parts = [names[key] + ", ".join(found) for key, found in values.items()]
    ran, possible = len({tuple(case.items()) for case in cases}), math.prod(map(len, values.values()))
    return "; ".join([where] * bool(where) + parts + [f"{ran} of {possible} combinations"] * (ran < possible))


def number(value):
    """1e-6 rather than 1e-06."""
    return f"{value:g}".replace("e-0", "e-")


def line(what, bound, where, cases):
    """The PASS line of a fact, or its FAIL line with the cases that failed and the largest difference among them."""
    failed = [(case, difference) for case, difference, passed in cases if not passed]
    limit = f"≤ {number(bound)}" if bound else "= 0"
    if not failed:
        return f"PASS  {what}: max|Δ| {limit}   ({bracket(where, [case for case, _, _ in cases])})"
    worst = max((difference for _, difference in failed), key=lambda d: math.inf if math.isnan(d) else d)
    said = f"max|Δ| = {number(worst)}, where it should be {limit}"
    return f"FAIL  {what}: {said}   ({bracket(where, [case for case, _ in failed])})"


def pytest_terminal_summary(terminalreporter, config):
    groups = config.stash.get(LINES, {})
    write = terminalreporter.write_line
    if groups:
        terminalreporter.section("parity")
        write(ABOUT)
    for group, facts in groups.items():
        write("")
        write(group)
        for (what, bound, where), cases in facts.items():
            write("  " + line(what, bound, where, cases))
    # a test that stopped before it could compare anything must not go unmentioned
    stopped = [r for kind in ("failed", "error") for r in terminalreporter.stats.get(kind, [])]
    for report in stopped:
        if report.nodeid not in config.stash.get(FAILED, set()) and "parity/" in report.nodeid:
            write(f"FAIL  {report.nodeid}: it stopped without a comparison; its error is above")

"""`course doctor`: what it looks at, and what it recommends to whom."""

from dataclasses import replace

import pytest

from helpers.base import hub
from helpers.cli import doctor
from helpers.cli import parser as cli
from helpers.cli.doctor import LACKS, OK, WRONG, Machine, advice
from helpers.presets.variants import get_preset

BIG = Machine(gpu_memory=80, bfloat16=True, free_gb=100, network=True)
ALL = frozenset({"sd21-base", "doodles", "vintage", "clip"})


@pytest.mark.parametrize(
    ("gib", "preset"),
    [(79.2, "sd21-base"), (39.4, "sd21-base"), (23.6, "sd21-base"), (14.6, "sd21-base@16gb"),
     (11.6, "sd21-base@12gb"), (7.6, "sd21-base@8gb"), (5.8, "mini"), (0, "mini")]
)  # fmt: skip
def test_each_gpu_gets_the_variant_that_fits(gib, preset):
    """The sizes are what torch tells of an H100, an A100, a 4090, a T4, a 4070, a 2070 and a 2060."""
    assert doctor.recommended(gib) == preset
    assert get_preset(preset).name == preset


def test_the_advice_counts_what_is_still_to_download():
    preset = get_preset("sd21-base")
    assert doctor.to_download(preset, frozenset()) == pytest.approx(5.2 + 0.1 + 0.6 + 1.7)
    assert doctor.to_download(preset, frozenset({"sd21-base", "vintage"})) == pytest.approx(0.1 + 1.7)
    assert doctor.to_download(get_preset("sd21-base@8gb"), ALL) == 0
    assert "`course run --preset sd21-base` suits this machine" in advice(BIG) and "7.6 GB to download" in advice(BIG)
    assert "nothing to download" in advice(replace(BIG, here=ALL))


def test_without_network_only_what_is_here_is_recommended():
    offline = replace(BIG, network=False)
    assert advice(offline).startswith("`course run` (MiniSD) works here")
    assert "without network 7.6 GB cannot be fetched" in advice(offline)
    assert "`course run --preset sd21-base` suits this machine" in advice(replace(offline, here=ALL))


def test_a_full_disk_is_told():
    told = advice(replace(BIG, free_gb=6))
    assert "needs 9.3 GB of disk, and 6.0 GB are free" in told and "HF_HOME" in told


def test_a_small_gpu_and_none_get_minisd():
    for gib in (0, 4):
        assert "Stable Diffusion needs a GPU with 8 GB" in advice(replace(BIG, gpu_memory=gib))


def told(capsys):
    """{what: (state, found)} of the lines that the command prints, its status, and its advice."""
    status = cli.main(["doctor"])
    *lines, last = capsys.readouterr().out.strip().splitlines()
    return status, {line[4:18].strip(): (line[:2], line[18:]) for line in lines}, last


@pytest.fixture
def looked(monkeypatch):
    """A machine of this test's choosing in place of the real one."""
    return lambda machine: monkeypatch.setattr(doctor, "look", lambda: machine)


def test_the_command_tells_all(looked, capsys):
    looked(replace(BIG, here=frozenset({"sd15", "doodles"}), token=True))
    status, lines, last = told(capsys)
    assert status == 0 and {state for state, _ in lines.values()} == {OK}
    assert "80.0 GiB, bfloat16" in lines["device"][1]
    assert lines["hub models"] == (OK, "here already: sd15 (of sd21-base, sd21, sd15)")
    assert lines["hub token"] == (OK, "there is one")
    assert "100 GB free" in lines["hub disk"][1]
    assert "sd21-base" in last


def test_what_only_stable_diffusion_needs_is_no_failure(looked, capsys):
    looked(Machine(gpu_problem="this machine has an NVIDIA GPU, but its torch was built without CUDA"))
    status, lines, last = told(capsys)
    assert status == 0
    assert [lines[what][0] for what in ("network", "hub models", "GPU")] == [LACKS] * 3
    assert "built without CUDA" in lines["GPU"][1] and last.startswith("`course run` (MiniSD) works here")


def test_missing_weights_of_minisd_are_a_failure(looked, capsys, monkeypatch, tmp_path):
    looked(Machine())
    monkeypatch.setattr(doctor, "get_preset", lambda name: replace(get_preset(name), model=str(tmp_path)))
    status, lines, _ = told(capsys)
    assert status == 1 and lines["MiniSD"][0] == WRONG and lines["Python"][0] == OK


def test_the_real_machine_is_looked_at(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = doctor.look()
    assert found.here == frozenset() and not found.network
    assert found.free_gb == pytest.approx(hub.free_gb(tmp_path), rel=0.05) and found.free_gb > 0


def test_old_versions_are_told():
    assert doctor.at_least("2.13.0+cpu", (2, 6)) and doctor.at_least("2.6.0a0+git", (2, 6))
    assert not doctor.at_least("2.5.1", (2, 6)) and not doctor.at_least("unknown", (2, 6))

"""Fixtures that several test files share."""

import shutil

import pytest
from tiny import tiny_minisd


@pytest.fixture
def tiny():
    """Components of a MiniSD with a few thousand random weights, new for each test."""
    return tiny_minisd()


# --- training runs: see training_tools.py, which is imported where it is needed --------------------------------------


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """13 captioned pictures that tests only read."""
    from training_tools import write_pictures

    folder = tmp_path_factory.mktemp("data") / "pictures"
    write_pictures(folder)
    return folder


@pytest.fixture(scope="session")
def whole(pictures, tmp_path_factory):
    """A run that nothing disturbed, for comparison; tests only read it."""
    from training_tools import make_preset, quiet

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COURSE_RUNS", str(tmp_path_factory.mktemp("whole")))
        return quiet(make_preset(pictures), tiny_minisd())


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A runs folder and a reference folder of this test's own."""
    from helpers.training import runs

    monkeypatch.setenv("COURSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(runs, "REFERENCE", tmp_path / "reference")
    return tmp_path


@pytest.fixture
def preset(world, pictures):
    """The tiny run's settings, for this test's own runs folder."""
    from training_tools import make_preset

    return make_preset(pictures)


@pytest.fixture
def finished(preset, whole):
    """A copy of the undisturbed run in this test's runs folder: what an earlier `train` would have left."""
    from helpers.training import runs

    folder = runs.run_dir(preset, "own", whole.key)
    shutil.copytree(whole.dir, folder)
    return runs.Run(folder, preset.name, "own", whole.key, "found in runs")


@pytest.fixture
def latents():
    """23 rows of random latents and 5 captions, as a cache."""
    from training_tools import random_cache

    return random_cache()


@pytest.fixture
def accelerator():
    """One process on a CPU, in full precision."""
    from helpers.presets.configuration import TrainConfig
    from helpers.training.steps import new_accelerator

    return new_accelerator(TrainConfig(), "cpu")

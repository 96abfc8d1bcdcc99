"""A preset with the reader's own pictures as one more dataset."""

import pytest
from PIL import Image

from helpers.base.errors import DataError
from helpers.data.own import with_own_pictures
from helpers.presets.configuration import DatasetSpec
from helpers.presets.variants import get_preset


@pytest.fixture
def everything(tmp_path):
    for number in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"picture {number}")
    return DatasetSpec("mine", f"folder:{tmp_path}", train_rows=1000, held_out_rows=0)


def test_the_presets_other_datasets_stay(everything):
    mini = get_preset("mini")
    preset, name = with_own_pictures(mini, everything, held_out=1)
    assert preset.datasets.names == (*mini.datasets.names, name)
    assert set(preset.datasets.known) == {*mini.datasets.known, name} and "lorelei" in preset.datasets.known
    assert (preset.datasets[name].train_rows, preset.datasets[name].held_out_rows) == (2, 1)


def test_a_name_that_is_taken_is_refused(everything):
    preset, _ = with_own_pictures(get_preset("mini"), everything, held_out=0)
    with pytest.raises(DataError, match="has a dataset 'mine' already"):
        with_own_pictures(preset, everything, held_out=0)

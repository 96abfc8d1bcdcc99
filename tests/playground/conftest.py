"""A playground of random weights, which the tests of this room share."""

import pytest
from tiny import random_adapter

from helpers.playground.engine import STYLES, Engine
from helpers.presets.variants import get_preset


@pytest.fixture
def engine(tiny):
    adapters = {name: random_adapter(tiny.unet, seed) for seed, name in enumerate(STYLES)}
    return Engine(get_preset("smoke"), tiny, adapters)

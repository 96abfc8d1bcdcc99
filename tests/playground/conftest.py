"""A playground of random weights, which the tests of this room share."""

import pytest
from tiny import random_engine


@pytest.fixture
def engine(tiny):
    return random_engine(tiny)

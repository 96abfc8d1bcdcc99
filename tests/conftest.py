"""Fixtures that several test files share."""

import pytest
from tiny import tiny_minisd


@pytest.fixture
def tiny():
    """Components of a MiniSD with a few thousand random weights, new for each test."""
    return tiny_minisd()

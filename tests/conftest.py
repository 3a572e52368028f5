"""What holds for all tests: each finds the level of logging as it was, whatever a test before it has set."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def logging_level() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)

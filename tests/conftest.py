"""What holds for all tests: one thread for products, and the level of logging as it was before each."""

import logging
import os
from collections.abc import Iterator

import pytest

# Several tests run at once: threads that wait for each other in small products took most of the time. Read
# when NumPy is imported, here and in the servers that tests start.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def logging_level() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)

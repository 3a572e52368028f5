"""What holds for all tests: one thread for products, logging as it was before each, and an end."""

import logging
import os
import signal
from collections.abc import Iterator

import pytest

# Several tests run at once: threads that wait for each other in small products took most of the time. Read
# when NumPy is imported, here and in the servers that tests start.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A test that takes longer hangs: it is to fail in words, and the others are to run.
MOST_S = 180.0


@pytest.fixture(autouse=True)
def end(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that has none; long ones may take what they take."""
    if request.node.get_closest_marker("long"):
        yield
        return

    def give_up(*_: object) -> None:
        pytest.fail(f"it has no end after {MOST_S:.0f} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, MOST_S)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def logging_level() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)

"""One server for all tests that need Pocket as it is started without flags."""

from collections.abc import Iterator

import pytest

from tests.server.serving.running import Server, start_server, stop_server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    started = start_server()
    yield started
    stop_server(started)

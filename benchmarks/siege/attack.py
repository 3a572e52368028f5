"""What an attack has: a time, connections, and counts of what it tried and of what it was told."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException

from benchmarks.siege.cage import KEYS, ask

AUTHORIZATION = f"Bearer {KEYS['attacker']}"
MIB = 2**20


class Attack:
    """Counts what is tried, and what comes of it."""

    def __init__(self, url: str, seconds: float) -> None:
        self.url, self._seconds = url, seconds
        self.begin()
        self.port = int(url.rpartition(":")[2])
        self.num_tried = 0
        self.answers: Counter[str] = Counter()

    def begin(self) -> None:
        """Let the time begin, once everything is prepared."""
        self.deadline = time.monotonic() + self._seconds

    @property
    def goes_on(self) -> bool:
        """Whether there is time left."""
        return time.monotonic() < self.deadline

    def connect(self) -> socket.socket:
        """A socket to the server."""
        self.num_tried += 1
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)

    def post(self, path: str, raw: bytes, timeout_s: float = 60, more: dict[str, str] | None = None) -> None:
        """Send a body and note the answer's status, or that there was none in time."""
        headers = {"authorization": AUTHORIZATION, "content-type": "application/json", **(more or {})}
        try:
            self.answers[str(self.ask("POST", path, headers, raw, timeout_s)[0])] += 1
        except (OSError, HTTPException) as error:
            self.answers[type(error).__name__] += 1

    def ask(
        self, method: str, path: str, headers: dict[str, str], raw: bytes = b"", timeout_s: float = 60
    ) -> tuple[int, bytes]:
        """The status and the body of an answer."""
        self.num_tried += 1
        return ask(self.port, method, path, headers, raw, timeout_s)

    def together(self, number: int, work: Callable[[int], None]) -> None:
        """So many at the same time, again and again."""

        def repeat(index: int) -> None:
            while self.goes_on:
                with suppress(OSError, HTTPException):
                    work(index)

        threads = [threading.Thread(target=repeat, args=(index,), daemon=True) for index in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, self.deadline + 5 - time.monotonic()))


def head(path: str = "/v1/chat/completions", length: int = 7 * MIB) -> bytes:
    """The head of a request whose body may come or not."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Authorization: {AUTHORIZATION}"]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()

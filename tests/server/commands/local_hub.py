"""A Hub of the test's own on loopback: what all of them have."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubHandler(BaseHTTPRequestHandler):
    """Answers GET and HEAD alike, but for the body; says nothing."""

    def do_HEAD(self) -> None:
        self.answer(sends_body=False)

    def do_GET(self) -> None:
        self.answer(sends_body=True)

    def answer(self, *, sends_body: bool) -> None:
        """Answers the request; a test's Hub says how."""
        raise NotImplementedError

    def send_head(self, status: int, headers: Mapping[str, str]) -> None:
        """Sends all that stands before a body."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def serving(handler: type[HubHandler]) -> Iterator[str]:
    """A Hub with this handler; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

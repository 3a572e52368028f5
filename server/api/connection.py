"""One HTTP connection, before the app sees a request. uvicorn makes one per client, in its event loop."""

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.api.doors import Doors
from server.api.error_bodies import error_object
from server.api.watch.record import RequestRecord

MAX_HEAD_BYTES = 64 * 2**10
MAX_LINE_BYTES = 16 * 2**10
# Each line of a head costs some microseconds, however short it is.
MAX_LINES = 256
# Of a body in chunks so much is read in one round of the event loop: each chunk costs some microseconds.
PIECE_BYTES = 4 * 2**10
# How long a connection may be open without a complete head, at first and after each answer.
REQUEST_TIMEOUT_S = 30.0
# A refused client may still be sending, and a reset would reach it before the refusal. What it sends is read
# with pauses: 600 connections a second without them took four fifths of a core.
LINGER_S = 1.0
MAX_LINGER_BYTES = 2**20
LINGER_PAUSE_S = 0.05
# Before a request that came behind another one is read. No client of today sends them so; without a pause
# four connections full of them have the event loop for themselves.
BEHIND_PAUSE_S = 0.01
# What monitors ask for: it is answered when all other places are taken.
MONITORED = b"/health"
RETRY_AFTER_S = 5
# What an offer to change the protocol consists of.
OFFER = frozenset([b"upgrade", b"http2-settings"])


class _Flow(FlowControl):
    """Reads no more from a client while what has come is still to be parsed."""

    is_holding = False

    def resume_reading(self) -> None:
        """Read on; uvicorn calls this when a route wants more of a body."""
        if not self.is_holding:
            super().resume_reading()


class HttpConnection(HttpToolsProtocol):
    """Bounds the head of every request, and answers one that offers another protocol as if it did not.

    Stock JVM clients send `Upgrade: h2c` with a body. httptools takes that body for the first bytes of the
    other protocol, so the request is parsed again without the offer.
    """

    def __init__(
        self,
        *args: Any,
        doors: Doors | None = None,
        note: Callable[[RequestRecord], None] = lambda record: None,
        **kwargs: Any,
    ) -> None:
        """`note` is told of each request that is refused here, before the app could."""
        super().__init__(*args, **kwargs)
        self._doors, self._note = doors or Doors(), note
        self._in_head = True
        self._is_chunked = False  # between a head and the end of its body
        self._num_head_bytes = 0  # or of a chunked body since the last that was content: of a trailer
        self._num_lines = 0
        self._num_line_bytes = 0
        self._num_discarded: int | None = None  # of a refused client; None before that
        self._patience: asyncio.TimerHandle | None = None
        self._held = b""  # what came behind a request that is being answered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there; asyncio calls this."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self.flow: _Flow = _Flow(self.transport)
        self._doors.enter(self)
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone; asyncio calls this."""
        self._stop_waiting()
        self._doors.leave(self)
        super().connection_lost(exc)

    def give_way(self) -> None:
        """Closes, because another client needs the place; a client that has sent a head is told so."""
        if self._num_discarded is not None or not self._owes_answer:
            self.transport.close()
            return
        self.cycle.disconnected = True  # what its route answers from now on is not sent
        self.cycle.message_event.set()
        self._refuse(_no_place())

    @property
    def _owes_answer(self) -> bool:
        """Whether a request has begun, and its answer has not."""
        return self.cycle is not None and not self.cycle.response_started

    def on_response_complete(self) -> None:
        """An answer is complete; uvicorn calls this."""
        super().on_response_complete()
        self._wait_for_request()
        if self._held:
            self.loop.call_later(BEHIND_PAUSE_S, self._go_on)

    def _wait_for_request(self) -> None:
        """Closes the connection if no request comes, or its head never ends."""
        self._stop_waiting()
        if self.cycle is None or self.cycle.response_complete:
            if not self.transport.is_closing():
                self._doors.await_request(self)
            self._patience = self.loop.call_later(REQUEST_TIMEOUT_S, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def data_received(self, data: bytes) -> None:
        """Takes what a client sends; asyncio calls this."""
        self._unset_keepalive_if_required()
        if self._num_discarded is not None:
            self._discard(data)
        elif self.flow.is_holding:
            self._held += data
        else:
            self._feed(data)

    def _feed(self, data: bytes) -> None:
        """Feeds the parser: a head line by line, so that its size is known before it is complete.

        Thousands of requests or of chunks fit into one packet. A request is read when the one before it is
        answered, and of chunks a few in each round of the event loop.
        """
        start, is_first = 0, True
        while start < len(data) and self._num_discarded is None and not self.transport.is_closing():
            if self._is_answering or (self._is_chunked and not is_first):
                self._hold(data[start:])
                return
            end = self._end_of_piece(data, start)
            if (self._in_head or self._is_chunked) and not self._has_room_for(data[start:end]):
                self._tell_refused(431, "invalid_request")
                self._refuse(b"" if self._is_busy else _head_too_large())
                return
            try:
                is_first = not self._is_chunked
                self.parser.feed_data(data[start:end])
                start = end
            except httptools.HttpParserUpgrade as upgrade:
                data, start = self._without_offer() + data[start + upgrade.args[0] :], 0
            except httptools.HttpParserError:
                self._tell_refused(400, "invalid_request")
                self.send_400_response("Invalid HTTP request received.")

    def _end_of_piece(self, data: bytes, start: int) -> int:
        if self._in_head:
            return data.find(b"\n", start) + 1 or len(data)
        return start + PIECE_BYTES if self._is_chunked else len(data)

    @property
    def _is_answering(self) -> bool:
        """Whether a request is complete, and its answer is not."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def _hold(self, data: bytes) -> None:
        if self._is_answering and not data.strip(b"\r\n"):
            return  # some clients end a body with an empty line
        self._held, self.flow.is_holding = data, True
        self.flow.pause_reading()
        if not self._is_answering:
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """Feeds what was held."""
        if self.transport.is_closing():
            return
        data, self._held, self.flow.is_holding = self._held, b"", False
        self._feed(data)
        if self.cycle is None or len(self.cycle.body) <= HIGH_WATER_LIMIT:
            self.flow.resume_reading()

    def on_message_begin(self) -> None:
        """A request begins; httptools calls this."""
        super().on_message_begin()
        self._num_head_bytes = self._num_lines = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """A line of a head, or of a trailer, which is no header; httptools calls this."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A head is complete; httptools calls this."""
        self._in_head = False
        self._is_chunked = any(name == b"transfer-encoding" for name, _ in self.headers)
        self._num_head_bytes = 0
        if not self._is_offer():
            self._stop_waiting()
            if self._doors.admit(self, is_monitor=self.url.partition(b"?")[0] == MONITORED):
                super().on_headers_complete()
            else:
                self._tell_refused(503, "provider_overloaded")
                self._refuse(_no_place())

    def on_body(self, body: bytes) -> None:
        """A part of the body; httptools calls this."""
        self._num_head_bytes = 0
        if self._num_discarded is None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is complete; httptools calls this."""
        self._in_head, self._is_chunked, self._num_head_bytes, self._num_line_bytes = True, False, 0, 0
        if not self._is_offer() and self._num_discarded is None:
            self._doors.complete(self)
            super().on_message_complete()

    def _is_offer(self) -> bool:
        return bool(self.parser.should_upgrade()) and self.parser.get_method() != b"CONNECT"

    def _without_offer(self) -> bytes:
        """The head that was parsed last, for a new parser, without its offer; nothing for CONNECT."""
        if not self._is_offer():
            return b""
        lines = [
            b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        ]
        for name, value in self.headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(token for token in tokens if token.lower() not in OFFER)
            if name not in OFFER:
                lines.append(name + b": " + value)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        return b"\r\n".join([*lines, b"", b""])

    def _has_room_for(self, piece: bytes) -> bool:
        """Whether a line, what has come of it, or a part of a trailer keeps its head within the limits."""
        self._num_head_bytes += len(piece)
        if self._in_head:
            self._num_line_bytes += len(piece)
            self._num_lines += piece.endswith(b"\n")
        has_room = self._num_head_bytes <= MAX_HEAD_BYTES and self._num_line_bytes <= MAX_LINE_BYTES
        if piece.endswith(b"\n"):
            self._num_line_bytes = 0
        return has_room and self._num_lines <= MAX_LINES

    @property
    def _is_busy(self) -> bool:
        """Whether a request was taken whose answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def _tell_refused(self, status: int, reason: str) -> None:
        """Notes a request that the app never sees; what it has begun with is noted by its record."""
        if self._is_busy:
            if not self.cycle.response_started:
                self.cycle.scope["state"]["refused"] = status, reason
            return
        self._note(RequestRecord("-", "-", status=status, reason=reason))

    def _refuse(self, answer: bytes) -> None:
        """Sends an answer, if there is one, and closes the connection."""
        self._num_discarded = 0
        self._doors.await_request(self)
        self.transport.write(answer)
        if self.transport.can_write_eof():
            self.transport.write_eof()  # it has the whole answer, and need not wait
        self.loop.call_later(LINGER_S, self.transport.close)

    def _discard(self, data: bytes) -> None:
        assert self._num_discarded is not None, "only a refused client's bytes are thrown away"
        self._num_discarded += len(data)
        if self._num_discarded > MAX_LINGER_BYTES:
            self.transport.close()
        elif not self.transport.is_closing():
            self.transport.pause_reading()
            self.loop.call_later(LINGER_PAUSE_S, self._read_on)

    def _read_on(self) -> None:
        if not self.transport.is_closing():
            self.transport.resume_reading()


def _head_too_large() -> bytes:
    message = (
        f"the request's headers are too large: at most {MAX_HEAD_BYTES} bytes, {MAX_LINE_BYTES} in a line, "
        f"and {MAX_LINES} lines"
    )
    return _answer(b"431 Request Header Fields Too Large", message, "invalid_request", {})


def _no_place() -> bytes:
    message = f"all connections of this server are taken; try again in {RETRY_AFTER_S} s"
    headers = {"Retry-After": str(RETRY_AFTER_S), "x-should-retry": "true"}
    return _answer(b"503 Service Unavailable", message, "provider_overloaded", headers)


def _answer(status: bytes, message: str, error_type: str, headers: Mapping[str, str]) -> bytes:
    body = json.dumps({"error": error_object(int(status[:3]), message, error_type)}).encode()
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
    return (
        b"HTTP/1.1 %b\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\nconnection: close\r\n\r\n"
        % (status, lines, len(body))
    ) + body

"""Bytes as they travel: offers of other protocols, heads without end, and what follows on the connection."""

import json
import socket
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise

import pytest

from server.api.connection import BEHIND_PAUSE_S, LINGER_PAUSE_S, PIECE_BYTES, HttpConnection
from tests.server.api.scripted import ScriptedEngine

BODY = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}).encode()
H2C = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
OFFERS = {
    "h2c": H2C,
    "two versions": "Connection: keep-alive, upgrade\r\nUpgrade: HTTP/2.0, SHTTP/1.3\r\n",
    "WebSocket": "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n",
    "TLS": "upgrade: TLS/1.0\r\nconnection: Upgrade\r\n",
    "in two headers": "Connection: Upgrade\r\nConnection: HTTP2-Settings\r\nUpgrade: h2c\r\n",
    "one that is no offer": "Upgrade: h2c\r\n",
}


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as connection:
        yield connection


def post(headers: str = "", body: bytes = BODY, length: str | None = None) -> bytes:
    length = f"Content-Length: {len(body)}" if length is None else length
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{headers}{length}\r\n\r\n"
    return head.encode() + body


def answer(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body of the next answer, which has a length or ends in the connection's end."""
    reader = connection.makefile("rb")
    status = int(reader.readline().split()[1])
    headers = dict(line.rstrip().lower().split(b": ", 1) for line in iter(reader.readline, b"\r\n"))
    return status, reader.read(int(headers[b"content-length"]))


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(5)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
@pytest.mark.parametrize("form", ["at once", "head and body apart", "byte by byte", "chunked"])
def test_a_request_that_offers_another_protocol_is_answered(base_url: str, offer: str, form: str) -> None:
    request = post(offer)
    if form == "chunked":
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (BODY[:9], BODY[9:]))
        request = post(offer, chunks + b"0\r\n\r\n", "Transfer-Encoding: chunked")
    cuts = {"byte by byte": range(len(request)), "head and body apart": [request.index(b"{")]}.get(form, [])
    with connected(base_url) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start, end in zip([0, *cuts], [*cuts, len(request)], strict=True):
            connection.sendall(request[start:end])
        status, body = answer(connection)
        assert status == 200, body
        assert json.loads(body)["usage"]["completion_tokens"] == 2
        connection.sendall(post())
        assert answer(connection)[0] == 200, "the connection goes on"


def test_requests_in_a_row_with_offers_are_all_answered(base_url: str, engine: ScriptedEngine) -> None:
    with connected(base_url) as connection:
        connection.sendall(post(H2C) + post() + post(H2C) + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert [answer(connection)[0] for _ in range(4)] == [200] * 4
    assert len(engine.requests) == 3


def test_connect_is_no_offer(base_url: str) -> None:
    with connected(base_url) as connection:
        connection.sendall(b"CONNECT api.openai.com:443 HTTP/1.1\r\nHost: api.openai.com\r\n\r\n")
        assert connection.recv(99).startswith(b"HTTP/1.1 4")


LINE = b"X-Filler: " + b"a" * 1000 + b"\r\n"
TOO_LARGE = {
    "many lines": LINE * 70,
    "tiny lines": b"a:b\r\n" * 20_000,
    "one long line": b"X-Long: " + b"b" * 17_000 + b"\r\n",
    "a line without end": b"X-Endless: " + b"c" * 900_000,
    "a name without end": b"d" * 900_000,
    "lines without end": LINE * 900,
}


@pytest.mark.parametrize("filler", TOO_LARGE.values(), ids=TOO_LARGE)
def test_a_head_that_is_too_large_is_refused(base_url: str, filler: bytes) -> None:
    with connected(base_url) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n" + filler + b"\r\n")
        status, body = answer(connection)
        assert status == 431
        assert "65536 bytes" in json.loads(body)["error"]["message"]
        assert is_closed(connection)


def test_a_target_or_a_start_without_end_is_refused(base_url: str) -> None:
    for start in (b"GET /" + b"x" * 20_000, b"GET /v1/models?" + b"q=1&" * 5_000, b"\r\n" * 40_000):
        with connected(base_url) as connection:
            connection.sendall(start)
            assert answer(connection)[0] == 431
            assert is_closed(connection)


def test_requests_that_come_at_once_are_read_one_by_one_with_pauses(base_url: str) -> None:
    """Without a pause four connections full of them have the event loop for themselves."""
    with connected(base_url) as connection:
        started_s, said = time.monotonic(), b""
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 11)
        while said.count(b"HTTP/1.1 ") < 11:
            said += connection.recv(65536)
    assert time.monotonic() - started_s >= 10 * BEHIND_PAUSE_S


def test_what_a_refused_client_sends_is_read_with_pauses(
    base_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    discard = HttpConnection._discard
    times: defaultdict[HttpConnection, list[float]] = defaultdict(list)  # of earlier tests' connections too

    def count(self: HttpConnection, data: bytes) -> None:
        times[self].append(time.monotonic())
        discard(self, data)

    monkeypatch.setattr(HttpConnection, "_discard", count)
    with connected(base_url) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n" + LINE * 70)
        assert answer(connection)[0] == 431
        with suppress(OSError):
            for _ in range(100):
                connection.sendall(b"x" * 20_000)
                time.sleep(0.001)
    discarded = max(times.values(), key=len)
    assert len(discarded) > 1
    assert all(later - earlier > 0.9 * LINGER_PAUSE_S for earlier, later in pairwise(discarded))


def test_lines_of_a_trailer_are_no_headers(base_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a front server sets or strips in a head could be set behind the body."""
    seen: list[tuple[bytes, bytes]] = []
    complete = HttpConnection.on_message_complete

    def look(self: HttpConnection) -> None:
        seen.extend(self.scope["headers"])
        complete(self)

    monkeypatch.setattr(HttpConnection, "on_message_complete", look)
    with connected(base_url) as connection:
        trailer = b"Authorization: Bearer x\r\nX-Session-Id: y\r\n\r\n"
        chunks = b"%x\r\n%b\r\n0\r\n%b" % (len(BODY), BODY, trailer)
        connection.sendall(post(body=chunks, length="Transfer-Encoding: chunked"))
        assert answer(connection)[0] == 200
    assert b"transfer-encoding" in dict(seen)
    assert not {b"authorization", b"x-session-id"} & dict(seen).keys()


def test_a_second_request_and_a_trailer_have_the_same_limits(base_url: str) -> None:
    with connected(base_url) as connection:
        connection.sendall(post())
        assert answer(connection)[0] == 200
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + LINE * 70)
        assert answer(connection)[0] == 431
    with connected(base_url) as connection:
        connection.sendall(post(body=b"2\r\n{}\r\n0\r\n", length="Transfer-Encoding: chunked"))
        ends_at = time.monotonic() + 5
        while time.monotonic() < ends_at:
            try:
                connection.sendall(LINE)
            except OSError:
                break
            time.sleep(0.0001)
        else:
            pytest.fail("a trailer is read for 5 s")


@pytest.mark.parametrize(
    "lines",
    [b"a:\r\n" * 300, b"X: y\r\n" * 4_000, b"Cookie: a=b\r\n" * 257],
    ids=["empty", "many", "cookies"],
)
def test_many_short_lines_are_refused_like_a_few_long_ones(base_url: str, lines: bytes) -> None:
    with connected(base_url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n")
        assert answer(connection)[0] == 431
        assert is_closed(connection)


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What was parsed in each call of the parser: heads of requests, and parts of bodies."""
    seen: list[tuple[int, int]] = []
    feed, head, body = HttpConnection._feed, HttpConnection.on_headers_complete, HttpConnection.on_body
    counts = [0, 0]

    def count_feed(self: HttpConnection, data: bytes) -> None:
        counts[:] = [0, 0]
        feed(self, data)
        seen.append((counts[0], counts[1]))

    def count_head(self: HttpConnection) -> None:
        counts[0] += 1
        head(self)

    def count_body(self: HttpConnection, data: bytes) -> None:
        counts[1] += 1
        body(self, data)

    monkeypatch.setattr(HttpConnection, "_feed", count_feed)
    monkeypatch.setattr(HttpConnection, "on_headers_complete", count_head)
    monkeypatch.setattr(HttpConnection, "on_body", count_body)
    return seen


@pytest.mark.parametrize("target", ["/health", "/v1/models", "/nothing"])
def test_requests_that_come_at_once_are_read_one_after_the_other(
    base_url: str, heads: list[tuple[int, int]], target: str
) -> None:
    """Thousands of them fit into one packet, and parsing them all kept everybody else waiting."""
    number = 400
    with connected(base_url) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * number)
        reader = connection.makefile("rb")
        for _ in range(number):
            headers = dict(
                line.rstrip().lower().partition(b": ")[::2] for line in iter(reader.readline, b"\r\n")
            )
            reader.read(int(headers[b"content-length"]))
    assert max(heads)[0] == 1


@pytest.mark.parametrize("chunk", [b"1\r\nx\r\n", b"1;a=b\r\nx\r\n", b"3;e\r\nxyz\r\n"])
def test_chunks_are_read_a_few_at_a_time(base_url: str, heads: list[tuple[int, int]], chunk: bytes) -> None:
    with connected(base_url) as connection:
        connection.sendall(post(body=chunk * 60_000 + b"0\r\n\r\n", length="Transfer-Encoding: chunked"))
        assert answer(connection)[0] == 400
    assert max(num_parts for _, num_parts in heads) <= PIECE_BYTES // len(chunk) + 1
    assert sum(num_parts for _, num_parts in heads) >= 60_000


def test_an_extension_of_a_chunk_has_an_end(base_url: str) -> None:
    for extension in (b";" + b"e" * 200_000, b";a=b" * 50_000, b" " * 200_000):
        with connected(base_url) as connection, suppress(ConnectionResetError):
            connection.sendall(post(body=b"1" + extension, length="Transfer-Encoding: chunked"))
            while connection.recv(65536):
                pass  # a refusal, and then the end


def test_a_head_within_the_limits_and_a_large_body_pass(base_url: str) -> None:
    filled = json.loads(BODY) | {"user": "u", "metadata": {"filler": "\n" * 3_000_000}}
    body = json.dumps(filled).encode()
    chunks = b"".join(b"1\r\n%b\r\n" % body[at : at + 1] for at in range(70_000))
    for headers in (LINE.decode() * 60, f"X-Long: {'b' * 16_000}\r\n"):
        with connected(base_url) as connection:
            connection.sendall(post(headers, body))
            assert answer(connection)[0] == 200
    with connected(base_url) as connection:  # as many lines of chunks as a head may not have
        connection.sendall(post(body=chunks, length="Transfer-Encoding: chunked"))
        rest = body[70_000:]
        connection.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(rest), rest))
        assert answer(connection)[0] == 200


@pytest.mark.parametrize("start", [b"", b"\r\n", b"GET /health HTTP/1.1\r\nHost: x\r\n", b"POST /v1/chat"])
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "second"])
def test_a_request_that_does_not_come_is_not_waited_for(
    base_url: str, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, start: bytes, is_first: bool
) -> None:
    monkeypatch.setattr("server.api.connection.REQUEST_TIMEOUT_S", 0.3)
    with connected(base_url) as connection:
        if not is_first:
            engine.token_s = 0.25  # an answer may take longer than a request
            connection.sendall(post())
            assert answer(connection)[0] == 200
        connection.sendall(start)
        assert is_closed(connection)

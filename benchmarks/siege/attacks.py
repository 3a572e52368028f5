"""Hostile clients, each a process of its own: `python -m benchmarks.siege.attacks NAME URL SECONDS`.

An attack does what it can until its time is over, and prints how often it tried and what it was told.
"""

import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http.client import HTTPConnection
from typing import Any

from benchmarks.siege.attack import AUTHORIZATION, MIB, Attack, head
from benchmarks.siege.bodies import BODIES, CHAT, JSON_BOMBS, TOOL_BOMBS, chat
from benchmarks.siege.cage import KEYS
from benchmarks.siege.wire import WIRE


def endless_headers(attack: Attack) -> None:
    """800 MB of header lines, and values without end, where the server takes them."""

    def flood(index: int) -> None:
        line = b"X-F: " + b"a" * 1000 + (b"\r\n" if index % 2 else b"")
        with attack.connect() as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Start: ")
            while attack.goes_on:
                client.sendall(line * 100)

    attack.together(6, flood)


def idle_connections(attack: Attack) -> None:
    """More connections than there are descriptors, which say nothing."""
    held = []
    while attack.goes_on:
        with suppress(OSError):
            held.append(attack.connect())
        if len(held) > 600:
            held.pop(0).close()
        time.sleep(0.002)


def half_requests(attack: Attack) -> None:
    """Half a head, a head alone, or a part of a body, and then nothing."""
    starts = [head()[:-2], head(), head() + b'{"messages":[', b"P", head() + b"x" * 300_000]
    held = []
    while attack.goes_on:
        with suppress(OSError):
            held.append(client := attack.connect())
            client.sendall(starts[attack.num_tried % len(starts)])
        if len(held) > 500:
            held.pop(0).close()
        time.sleep(0.005)


def slow_bodies(attack: Attack) -> None:
    """Bodies that come byte by byte, or stop before their last byte."""
    raw = b'{"messages":[{"role":"user","content":"' + b"x" * (7 * MIB)

    def trickle(index: int) -> None:
        with attack.connect() as client:
            client.sendall(head())
            client.sendall(raw[: len(raw) if index % 2 else 1000])
            while attack.goes_on:
                client.sendall(b"y")
                time.sleep(0.2)

    attack.together(40, trickle)


def bodies(name: str, number: int) -> Callable[[Attack], None]:
    """One body of `bodies.py`, from so many clients at once."""

    def attack_with(attack: Attack) -> None:
        path, raw, headers = BODIES[name]()
        attack.begin()
        attack.together(number, lambda _: attack.post(path, raw, more=headers))

    return attack_with


def schemas(
    bombs: dict[str, Callable[[int], Any]], patience_s: float, number: int
) -> Callable[[Attack], None]:
    """Costly schemas, each another one, from clients that leave soon."""

    def attack_with(attack: Attack) -> None:
        names = list(bombs)

        def send(_: int) -> None:
            turn = attack.num_tried
            body = bombs[names[turn % len(names)]](turn)
            attack.post("/v1/chat/completions", json.dumps(body).encode(), patience_s)

        attack.together(number, send)

    return attack_with


def wrong_keys(attack: Attack) -> None:
    """Keys that are none, in every form; anything but 401 is told as such."""
    forms = [
        "Bearer x",
        "Bearer",
        "Basic YTpi",
        "",
        "Bearer " + "k" * 5000,
        f"bearer  {KEYS['attacker'][:-1]}",
    ]

    def guess(_: int) -> None:
        with closing(HTTPConnection("127.0.0.1", attack.port, timeout=20)) as client:
            while attack.goes_on:
                attack.num_tried += 1
                path = random.choice(["/v1/models", "/metrics", "/v1/credits", "/v1/cache/stats", "/nothing"])
                client.request("GET", path, headers={"authorization": random.choice(forms)})
                answer = client.getresponse()
                answer.read()
                attack.answers["401" if answer.status == 401 else f"BYPASS {path} {answer.status}"] += 1

    attack.together(4, guess)


def quota(attack: Attack) -> None:
    """20 at once of a key that has 100 tokens a day; more is told as such."""
    taken = Counter[str]()
    lock = threading.Lock()

    def ask(_: int) -> None:
        body = json.dumps(chat("hi") | {"max_tokens": 20}).encode()
        headers = {"authorization": f"Bearer {KEYS['miser']}"}
        status, raw = attack.ask("POST", CHAT, headers, body)
        with lock:
            attack.answers[str(status)] += 1
            if status == 200:
                taken["tokens"] += json.loads(raw)["usage"]["total_tokens"]
        time.sleep(0.1)

    attack.together(20, ask)
    if taken["tokens"] > 100:
        attack.answers[f"BYPASS {taken['tokens']} tokens of 100"] += 1


def others_receipts(attack: Attack) -> None:
    """Generations and explanations of another key; a receipt that is shown is told as such."""
    body = json.dumps(chat("a secret of the bystander") | {"max_tokens": 1}).encode()
    own = {"authorization": f"Bearer {KEYS['bystander']}"}
    name = json.loads(attack.ask("POST", CHAT, own, body)[1]).get("id", "none")
    while attack.goes_on:
        for path in (f"/v1/generation?id={name}", f"/v1/cache/explain?id={name}"):
            status, _ = attack.ask("GET", path, {"authorization": AUTHORIZATION})
            attack.answers[f"BYPASS {path.partition('?')[0]}" if status == 200 else str(status)] += 1
        time.sleep(0.05)


def disconnects(attack: Attack) -> None:
    """Clients that leave at any moment."""

    def leave(_: int) -> None:
        raw = json.dumps(chat("Tell me a story.") | {"stream": random.random() < 0.5}).encode()
        with attack.connect() as client:
            client.sendall(head(length=len(raw)) + raw)
            time.sleep(random.random() * 0.5)

    attack.together(6, leave)


def fuzz(attack: Attack) -> None:
    """Bytes that are no HTTP, and JSON that is no request."""
    whole = head(length=30) + b'{"messages":[{"role":"user"}]}'

    def send(_: int) -> None:
        raw = bytearray(whole)
        for _ in range(random.randint(1, 8)):
            raw[random.randrange(len(raw))] = random.randrange(256)
        with attack.connect() as client:
            client.sendall(bytes(raw))
            client.settimeout(0.3)
            with suppress(OSError):
                attack.answers[client.recv(12).decode("latin1")[9:12] or "closed"] += 1

    attack.together(4, send)


def attacks() -> Iterator[tuple[str, Callable[[Attack], None]]]:
    """All of them by name, in the order of the table."""
    yield from (("headers without end", endless_headers), ("idle connections", idle_connections))
    yield from (("half requests", half_requests), ("slow bodies", slow_bodies))
    for name in BODIES:
        yield name, bodies(name, 64 if name.startswith("64") else 6)
    yield from WIRE.items()
    yield "45 schemas of 10,000 properties", schemas({"p": JSON_BOMBS["10,000 properties"]}, 2.0, 45)
    yield "20 kinds of schema bombs", schemas(JSON_BOMBS, 20.0, 8)
    yield "tools with schema bombs", schemas(TOOL_BOMBS, 5.0, 8)
    yield from (("wrong keys", wrong_keys), ("20 at once on a quota", quota))
    yield from (("another key's receipts", others_receipts), ("disconnects", disconnects), ("fuzz", fuzz))


def main() -> None:
    """Runs one attack."""
    name, url, seconds = sys.argv[1:]
    # It stands for machines elsewhere: what it computes is no work of the server's. With nice 10 instead each
    # wake-up of the engine still waits for up to 3 ms of it.
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    attack = Attack(url, float(seconds))
    dict(attacks())[name](attack)
    print(json.dumps({"tried": attack.num_tried, "answers": attack.answers}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()

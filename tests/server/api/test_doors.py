"""More clients than places: who is served, who gives way, and that monitors always get an answer."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from server.api.app import make_app
from server.api.doors import Doors, make_doors
from server.api.service import Service
from tests.server.api.conftest import running_app
from tests.server.api.scripted import ScriptedEngine

PLACES, SPARE = 6, 3
BODY = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 40, "stream": True})
HEAD = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(BODY)}\r\n\r\n"


@pytest.fixture
def narrow_url(service: Service, engine: ScriptedEngine) -> Iterator[str]:
    with running_app(make_app(service), Doors(PLACES, SPARE)) as url:
        yield url


def crowd(stack: ExitStack, url: str, sent: str, number: int) -> list[socket.socket]:
    """So many clients that send this and then nothing."""
    port = int(url.rpartition(":")[2])
    clients = []
    for _ in range(number):
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
        client.sendall(sent.encode())
        clients.append(client)
    return clients


STALLED = {
    "nothing": "",
    "a line": "POST /v1/chat/completions HTTP/1.1\r\n",
    "a head without end": HEAD[:-2],
    "a body without end": HEAD + BODY[:-5],
    "no body": HEAD,
    "a chunk without end": HEAD.replace("Content-Length: ", "Transfer-Encoding: chunked\r\nX: ") + "5\r\n{",
    "an answered request and then nothing": "GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("sent", STALLED.values(), ids=STALLED)
@pytest.mark.slow
def test_clients_that_send_nothing_more_give_way_to_one_that_asks(narrow_url: str, sent: str) -> None:
    with ExitStack() as stack:
        crowd(stack, narrow_url, sent, 3 * (PLACES + SPARE))
        time.sleep(0.1)
        for _ in range(3):
            assert httpx.get(f"{narrow_url}/health", timeout=5).status_code == 200
            answer = httpx.post(f"{narrow_url}/v1/chat/completions", content=BODY, timeout=5)
            assert answer.status_code == 200
            assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.slow
def test_answers_under_way_keep_their_places_and_health_has_its_own(
    narrow_url: str, engine: ScriptedEngine
) -> None:
    engine.script, engine.token_s = engine.script[:1] * 40, 0.04
    with ExitStack() as stack:
        served = crowd(stack, narrow_url, HEAD + BODY, PLACES)
        time.sleep(0.3)
        refused = httpx.post(f"{narrow_url}/v1/chat/completions", content=BODY, timeout=5)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "5"
        assert "all connections" in refused.json()["error"]["message"]
        crowd(stack, narrow_url, "", 20)
        assert httpx.get(f"{narrow_url}/health", timeout=5).status_code == 200
        for client in served:
            assert b"data: [DONE]" in client.makefile("rb").read(10**6).partition(b"\r\n0\r\n")[0]
        time.sleep(0.2)
        assert httpx.post(f"{narrow_url}/v1/chat/completions", content=BODY, timeout=5).status_code == 200


def test_a_body_that_is_waited_for_is_told_why_it_is_not_wanted(narrow_url: str) -> None:
    with ExitStack() as stack:
        [first, *_] = crowd(stack, narrow_url, HEAD + BODY[:-1], PLACES)
        time.sleep(0.1)
        answer = httpx.post(f"{narrow_url}/v1/chat/completions", content=BODY, timeout=5)
        assert answer.status_code == 200
        assert first.recv(100).startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize(
    ("descriptors", "places"), [(64, 8), (100, 20), (256, 176), (1024, 512), (10**6, 512)]
)
def test_places_follow_the_limit_of_open_files(descriptors: int, places: int) -> None:
    class Idle:
        gone = 0

        def give_way(self) -> None:
            Idle.gone += 1

    doors = make_doors(descriptors)
    for _ in range(places + 16):
        doors.enter(Idle())
    assert Idle.gone == 0
    doors.enter(Idle())
    assert Idle.gone == 1
    assert doors.num_connected == places + 16

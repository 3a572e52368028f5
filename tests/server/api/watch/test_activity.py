"""GET /activity tells of each request what its client is told; its owner or an admin can end it."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from server.api.access.guard import Access
from server.api.access.keys import Key, KeyRing
from server.api.answer.answer import WaitingRequests
from server.api.answer.prefill_pace import PrefillPace
from server.api.app import make_app
from server.api.service import Service
from server.link.messages import Progress, Queued, Started
from tests.server.api.answer.test_waiting import SteppingEngine
from tests.server.api.conftest import running_app
from tests.server.api.scripted import ScriptedEngine

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "user": "u", "stream": True}
KEYS = KeyRing.of({name: Key(name, name, name, is_admin=name == "boss") for name in ("one", "two", "boss")})


def until(check: Any) -> Any:
    deadline = time.monotonic() + 20
    while not (found := check()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


class Streaming:
    """A streamed chat that is read on a thread of its own, until its end or that of the body."""

    def __init__(self, url: str, key: str) -> None:
        self.lines: list[str] = []
        self._client = httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=30)
        self._thread = threading.Thread(target=self._read, args=(url,))

    def __enter__(self) -> "Streaming":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join(20)
        self._client.close()

    _stop = False

    def _read(self, url: str) -> None:
        with self._client.stream("POST", url + CHAT, json=BODY) as response:
            for line in response.iter_lines():
                self.lines.append(line)
                if self._stop:
                    return

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive(), "the answer goes on"


@contextmanager
def served(service: Service, engine: Any) -> Iterator[str]:
    held = replace(service, engine=engine, line=WaitingRequests(), keepalive_s=0.05)
    with running_app(make_app(held, Access(KEYS))) as url:
        yield url


def activity(url: str, key: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(
        url + "/v1/activity", headers={"Authorization": f"Bearer {key}"}
    ).json()["data"]
    return found


def cancel(url: str, request_id: str, key: str) -> int:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{url}/v1/activity/{request_id}/cancel", json={}, headers=headers).status_code


def test_owners_and_admins_see_and_end_a_running_request(service: Service, engine: ScriptedEngine) -> None:
    engine.script, engine.token_s = engine.script[:3] * 1000, 0.02
    with served(service, engine) as url:
        for who in ("one", "boss"):
            with Streaming(url, "one") as talk:
                [seen] = until(lambda: [one for one in activity(url, "one") if one["phase"] == "writing"])
                assert seen["key"] == "one"
                assert seen["new_tokens"] > 0
                assert activity(url, "two") == [], "others' requests are not shown"
                assert [one["id"] for one in activity(url, "boss")] == [seen["id"]]
                assert cancel(url, seen["id"], "two") == 404
                assert cancel(url, seen["id"], who) == 202
                talk.join()
            assert '"error"' in talk.lines[-2]
            assert "cancelled" in talk.lines[-2], "its client is told"
            until(lambda: not activity(url, "boss"))
            assert engine.cancelled[-1] == seen["id"]
        assert cancel(url, "gen-none", "boss") == 404


def test_each_phase_is_named_alike_in_comments_and_in_the_activity(service: Service) -> None:
    engine = SteppingEngine(places=(3,))
    with served(service, engine) as url, Streaming(url, "one") as talk:
        [seen] = until(lambda: [one for one in activity(url, "boss") if one["phase"] == "queued"])
        name = seen["id"]

        def send(event: Any, phase: str, comment: str) -> dict[str, Any]:
            engine.events[name].put_nowait(event)
            [now] = until(lambda: [one for one in activity(url, "boss") if one["phase"] == phase])
            until(lambda: any(comment in line for line in talk.lines) or not talk.lines)
            return dict(now)

        assert seen["queue_place"] == 3
        until(lambda: any("queue=3" in line for line in talk.lines))
        engine.events[name].put_nowait(Started(name))
        assert send(Progress(name, 0, 90, 0, "restoring"), "restoring", "restoring=0/90")["eta_s"] is None
        assert send(Progress(name, 30, 90), "reading", "prefill=30/90")["prefilled_tokens"] == 30
        time.sleep(0.1)
        engine.events[name].put_nowait(Progress(name, 60, 90))
        until(lambda: activity(url, "boss")[0]["eta_s"])
        until(lambda: any("prefill=60/90 eta=" in line for line in talk.lines))
        engine.events[name].put_nowait(Queued(name, 1))
        until(lambda: activity(url, "boss")[0]["phase"] == "queued")
        assert cancel(url, name, "boss") == 202
        engine.events[name].put_nowait(Started(name))
        talk.join()
        said = " ".join(talk.lines)
        for words in ("queue=3", "restoring=0/90", "prefill=30/90", "prefill=60/90 eta="):
            assert words in said


def test_the_eta_falls_while_nothing_is_heard() -> None:
    now = [0.0]
    pace = PrefillPace(lambda: now[0])
    pace.note(0)
    assert pace.eta_s(6000) is None
    now[0] = 10.0
    pace.note(1000)
    assert pace.eta_s(6000) == 50
    told = []
    for _ in range(70):
        now[0] += 1
        told.append(pace.eta_s(6000))
    assert told == [max(1, 50 - second) for second in range(1, 71)], (
        "it neither rises nor ends below a second"
    )
    pace.note(6000)
    assert pace.eta_s(6000) == 1
    pace.note(500)
    assert pace.eta_s(6000) is None, "a pass that starts again has no rate yet"


def test_the_machine_is_for_admins(service: Service, engine: ScriptedEngine) -> None:
    with served(service, engine) as url:
        for key, status in (("one", 403), ("boss", 200)):
            headers = {"Authorization": f"Bearer {key}"}
            assert httpx.get(url + "/v1/activity/experts", headers=headers).status_code == status
            answer = httpx.get(url + "/v1/activity/machine", headers=headers)
            assert answer.status_code == status
        assert answer.json()["data"]["state"] == "ready"


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_ask_for_a_key_themselves(service: Service, engine: ScriptedEngine, path: str) -> None:
    with served(service, engine) as url:
        answer = httpx.get(url + path)
        assert answer.status_code == 200
        assert 'data-needs-key="yes"' in answer.text
        assert "://" not in answer.text.replace("http://www.w3.org", ""), "nothing comes from elsewhere"

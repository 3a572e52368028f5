"""The routes that look at the prefix cache and change it."""

from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from server.api.app import make_app
from server.api.prompt.remembered import Remembered, Said
from server.api.request.model_names import ModelNames
from server.api.service import Dialect, Service
from server.link.engine_protocol import EngineStatus
from server.link.messages import Administer, Pin, Stats
from tests.server.api.conftest import local_client
from tests.server.api.scripted import ScriptedEngine

CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]}


def test_what_a_chat_begins_with_can_be_pinned_and_let_go(client: TestClient, engine: ScriptedEngine) -> None:
    client.post("/v1/chat/completions", json=CHAT)
    for action in ("pin", "unpin"):
        response = client.post(f"/v1/cache/{action}", json=CHAT)
        assert response.status_code == 202
        name = engine.administered[-1].request_id
        assert engine.administered[-1] == Administer(name, action, tuple(engine.requests[0].token_ids))
        assert response.json()["data"]["prompt_tokens"] == len(engine.requests[0].token_ids)
    assert client.post("/v1/cache/pin", json={"messages": []}).status_code == 400


@pytest.mark.parametrize("action", ["pin", "unpin"])
def test_what_would_change_nothing_is_refused(
    client: TestClient, engine: ScriptedEngine, action: str
) -> None:
    engine.num_changed = 0
    response = client.post(f"/v1/cache/{action}", json=CHAT)
    assert response.status_code == 400
    assert "nothing of these" in response.json()["error"]["message"]


def test_pins_are_listed_with_their_text(client: TestClient, engine: ScriptedEngine) -> None:
    client.post("/v1/chat/completions", json=CHAT)
    ids = tuple(engine.requests[0].token_ids)
    engine.pins = (Pin(len(ids), 640, ids[:9], ids[-4:]), Pin(64, 64, ids[:3], ids[:3]))
    [first, second] = client.get("/v1/cache/pins").json()["data"]
    assert (first["tokens"], first["bytes"], second["tokens"]) == (len(ids), 640, 64)
    assert first["begins"]
    assert first["ends"]


def test_clearing_forgets_what_was_said_too(engine: ScriptedEngine, dialect: Dialect, tmp_path: Path) -> None:
    remembered = Remembered(tmp_path)
    remembered.add("", "hello", Said((1,), "", "Hi", (), True))
    service = Service(engine, dialect, ModelNames("z-ai/glm-5.2"), remembered=remembered)
    assert local_client(make_app(service)).post("/v1/cache/clear", json={}).status_code == 202
    assert [one.action for one in engine.administered] == ["clear"]
    remembered.close()
    again = Remembered(tmp_path)
    assert again.find("", None, "hello", "Hi") is None
    again.close()


def test_without_an_engine_nothing_is_promised(
    client: TestClient, service: Service, engine: ScriptedEngine
) -> None:
    service.remembered.add("", "hello", Said((1,), "", "Hi", (), True))
    engine.ready = False
    for action in ("pin", "unpin", "clear"):
        response = client.post(f"/v1/cache/{action}", json=CHAT)
        assert response.status_code == 503
        assert "retry-after" in response.headers
    assert engine.administered == []
    assert service.remembered.find("", None, "hello", "Hi")


class _Counted(ScriptedEngine):
    @property
    def status(self) -> EngineStatus:
        values = {"prefix_saved_tokens": 640.0, "hits": 3.0}
        return replace(super().status, stats=Stats(values))


def test_the_counts_are_told(dialect: Dialect) -> None:
    service = Service(_Counted([1]), dialect, ModelNames("z-ai/glm-5.2"))
    data = local_client(make_app(service)).get("/v1/cache/stats").json()["data"]
    assert data == {"prefix_saved_tokens": 640.0}

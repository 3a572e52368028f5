"""The routes that look at the prefix cache and change it."""

from dataclasses import replace
from pathlib import Path

from starlette.testclient import TestClient

from server.api.app import make_app
from server.api.prompt.remembered import Remembered, Said
from server.api.request.model_names import ModelNames
from server.api.service import Dialect, Service
from server.link.engine_protocol import EngineStatus
from server.link.messages import Administer, Stats
from tests.server.api.conftest import local_client
from tests.server.api.scripted import ScriptedEngine

CHAT = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]}


def test_what_a_chat_begins_with_can_be_pinned_and_let_go(client: TestClient, engine: ScriptedEngine) -> None:
    client.post("/v1/chat/completions", json=CHAT)
    for action in ("pin", "unpin"):
        response = client.post(f"/v1/cache/{action}", json=CHAT)
        assert response.status_code == 202
        assert engine.administered[-1] == Administer(action, tuple(engine.requests[0].token_ids))
        assert response.json()["data"]["prompt_tokens"] == len(engine.requests[0].token_ids)
    assert client.post("/v1/cache/pin", json={"messages": []}).status_code == 400


def test_clearing_forgets_what_was_said_too(engine: ScriptedEngine, dialect: Dialect, tmp_path: Path) -> None:
    remembered = Remembered(tmp_path)
    remembered.add("", "hello", Said((1,), "", "Hi", (), True))
    service = Service(engine, dialect, ModelNames("z-ai/glm-5.2"), remembered=remembered)
    assert local_client(make_app(service)).post("/v1/cache/clear", json={}).status_code == 202
    assert engine.administered == [Administer("clear")]
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

"""What /metrics counts is what a client has counted, and it stays when the engine is down."""

import json
import random
import re
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from server.api.access.guard import Access
from server.api.access.keys import Key, KeyRing
from server.api.app import make_app
from server.api.service import Service
from server.api.watch.request_metrics import MAX_LABELS
from server.link.engine_protocol import EngineStatus
from server.link.messages import Stats
from tests.server.api.conftest import local_client, running_app
from tests.server.api.scripted import ScriptedEngine

CHAT, TEXT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
HELLO = [{"role": "user", "content": "hello"}]
KEY = {"Authorization": "Bearer good"}

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(client: TestClient, **headers: str) -> Samples:
    text = client.get("/metrics", headers=headers or KEY).text
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found.get((f"glmserve_{name}", tuple(sorted(labels.items()))), 0.0)


KINDS: list[tuple[str, dict[str, Any], dict[str, str]]] = [
    (CHAT, {"messages": HELLO}, KEY),
    ("/api/v1/chat/completions", {"messages": HELLO, "stream": True}, KEY),
    (TEXT, {"prompt": "hello"}, KEY),
    (MESSAGES, {"messages": HELLO, "max_tokens": 50, "model": "z-ai/glm-5.2"}, KEY),
    (RESPONSES, {"input": "hello"}, KEY),
    (CHAT, {"messages": HELLO}, {}),
    (CHAT, {"messages": 7}, KEY),
    (CHAT, {"messages": HELLO, "model": "gpt-9"}, KEY),
    ("/v1/nothing", {}, KEY),
    ("/v1/nothing/else", {}, KEY),
    ("/v1/activity", {}, KEY),
]


@pytest.mark.parametrize("num_requests", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_counters_equal_the_clients_own_count(
    service: Service, engine: ScriptedEngine, num_requests: int
) -> None:
    client = TestClient(make_app(service, Access(KeyRing.of({"good": Key("fleet", "fleet", "fleet")}))))
    random_ = random.Random(7)
    by_route: Counter[tuple[str, str]] = Counter()
    prompt = written = answered = 0
    for _ in range(num_requests):
        path, body, headers = random_.choice(KINDS)
        answer = client.post(path, json=body, headers=headers)
        known = path if path not in ("/v1/nothing", "/v1/nothing/else") else "other"
        by_route[known, str(answer.status_code)] += 1
        if answer.status_code == 200:
            answered += 1
            prompt += len(engine.requests[-1].token_ids)
            written += len(engine.script)
    found = samples(client)
    counted = {
        (dict(labels)["route"], dict(labels)["status"]): count
        for (name, labels), count in found.items()
        if name == "glmserve_requests_total" and dict(labels)["route"] != "/metrics"
    }
    assert counted == by_route
    assert {status for _, status in by_route} >= {"200", "400", "401", "404", "405"}
    assert value(found, "prompt_tokens_total") == prompt
    assert value(found, "generation_tokens_total") == written
    for name in ("request_queue_time", "time_to_first_token", "e2e_request_latency"):
        assert value(found, f"{name}_seconds_count") == answered, name
    assert (
        value(found, "inter_token_latency_seconds_count") == written - 2 * answered
    )  # no stop token, no first
    assert value(found, "key_tokens_total", key="fleet") == prompt + written
    refused = sum(count for (_, status), count in by_route.items() if status >= "400")
    assert sum(v for (name, _), v in found.items() if name == "glmserve_refusals_total") == refused
    assert value(found, "refusals_total", reason="authentication") == by_route[CHAT, "401"]


BAD_HTTP = {
    "a TLS client": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "another version": (b"GET / HTTP/9.9\r\n\r\n", 400),
    "no number": (b"POST /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
    "a blank in a name": (b"GET / HTTP/1.1\r\nHo st: x\r\n\r\n", 400),
    "a long target": (b"GET /" + b"x" * 20_000, 431),
    "many lines": (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-Line: 0123456789\r\n" * 5_000, 431),
}


def send_raw(url: str, data: bytes) -> int:
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(data)
        return int(connection.makefile("rb").readline().split()[1])


@pytest.mark.parametrize(("data", "status"), BAD_HTTP.values(), ids=BAD_HTTP)
def test_bad_http_leaves_a_line_and_counts_and_a_flood_is_summed(
    service: Service, data: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "server.api.watch.request_lines")
    app = make_app(service)
    with running_app(app) as url:
        assert [send_raw(url, data) for _ in range(30)] == [status] * 30
        time.sleep(1.1)
        found = samples(local_client(app))
    assert value(found, "requests_total", route="other", status=str(status)) == 30
    assert value(found, "refusals_total", reason="invalid_request") == 30
    told = [record.getMessage() for record in caplog.records if record.name.endswith("request_lines")]
    assert f" {status} " in told[0]
    assert 2 <= len(told) <= 6
    assert sum(int(line.split()[0]) if "more requests" in line else 1 for line in told) == 30


def test_a_body_that_is_no_http_counts_once_as_what_its_client_saw(service: Service) -> None:
    app = make_app(service)
    with running_app(app) as url:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert send_raw(url, head + b"zz\r\n{}\r\n") == 400
        time.sleep(0.2)
        found = samples(local_client(app))
    assert value(found, "requests_total", route="/v1/chat/completions", status="400") == 1
    assert sum(n for (name, labels), n in found.items() if name == "glmserve_requests_total") == 1


@pytest.mark.parametrize("body", [{}, {"stream": True}, {"n": 2}, {"stream": True, "n": 3}])
def test_what_failed_is_not_priced(service: Service, engine: ScriptedEngine, body: dict[str, Any]) -> None:
    client, before = local_client(make_app(service)), service.ledger.openrouter_cost
    answer = client.post(CHAT, json={"messages": HELLO} | body, headers=KEY)
    between = service.ledger.openrouter_cost
    assert between > before
    engine.fails_after = 2
    answer = client.post(CHAT, json={"messages": HELLO} | body, headers=KEY)
    assert "error" in answer.text
    engine.fails_after = None
    assert service.ledger.openrouter_cost == between
    if "stream" not in body:
        return  # a refusal has no receipt
    receipt = client.get(f"/v1/generation?id={answer.headers['x-generation-id']}", headers=KEY).json()
    assert receipt["data"]["openrouter_cost"] == 0


def test_they_stay_when_the_engine_is_down(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    client = local_client(make_app(service))
    client.post(CHAT, json={"messages": HELLO})
    stats = Stats(
        {
            "hits": 9.0,
            "misses": 3.0,
            "running": 4.0,
            "prefix_asked_tokens": 10.0,
            "prefix_restored_tokens": 5.0,
        }
    )
    down = EngineStatus("down", "it died", stats=stats, num_restarts=3)
    monkeypatch.setattr(ScriptedEngine, "status", property(lambda self: down))
    found = samples(client)
    assert value(found, "ready") == 0
    assert value(found, "engine_restarts_total") == 3
    assert value(found, "expert_hits_total") == 9
    assert value(found, "expert_hit_rate") == 0.75
    assert value(found, "prefix_hit_rate") == 0.5
    assert value(found, "requests_running") == 0, "nobody is there"
    assert value(found, "requests_total", route=CHAT, status="200") == 1


def test_there_is_no_hit_rate_where_nothing_streams(service: Service) -> None:
    found = samples(local_client(make_app(service)))
    assert not any("hit_rate" in name for name, _ in found)
    assert value(
        found, "build_info", **dict(next(labels for name, labels in found if name == "glmserve_build_info"))
    )
    assert any(name == "process_cpu_seconds_total" for name, _ in found)


def test_names_of_agents_are_bounded(service: Service) -> None:
    client = local_client(make_app(service))
    for number in range(MAX_LABELS + 20):
        client.post(CHAT, json={"messages": HELLO, "user": f"u{number}", "max_tokens": 1})
    found = samples(client)
    names = {dict(labels)["agent"] for name, labels in found if name == "glmserve_agent_tokens_total"}
    assert len(names) == MAX_LABELS + 1
    assert "other" in names


@pytest.mark.parametrize(
    ("access", "key", "status"),
    [
        (Access(KeyRing([("one", "k")]), metrics_key="m"), "m", 200),
        (Access(KeyRing([("one", "k")]), metrics_key="m"), "k", 200),
        (Access(KeyRing([("one", "k")]), metrics_key="m"), "x", 401),
        (Access(KeyRing([("one", "k")]), metrics_key="m"), "", 401),
        (Access(KeyRing([("one", "k")]), is_metrics_open=True), "", 200),
        (Access(KeyRing([("one", "k")])), "", 401),
        (Access(), "", 200),
    ],
)
def test_metrics_have_a_key_of_their_own_or_are_open(
    service: Service, access: Access, key: str, status: int
) -> None:
    client = TestClient(make_app(service, access))
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    assert client.get("/metrics", headers=headers).status_code == status
    if key == "m":
        assert client.get("/v1/models", headers=headers).status_code == 401, "it opens nothing else"
        assert client.post(CHAT, json={"messages": HELLO}, headers=headers).status_code == 401


def test_the_table_in_the_docs_names_every_metric(service: Service) -> None:
    client = local_client(make_app(service))
    client.post(CHAT, json={"messages": HELLO})
    page = Path("docs/metrics.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`(glmserve_[a-z0-9_]+)", page))
    families = list(text_string_to_metric_families(client.get("/metrics").text))
    names = {one.name for one in families if one.name.startswith("glmserve_")}
    names = {name for name in names if not name.endswith("_created")}
    assert {name for name in names if not {name, f"{name}_total"} & told} == set()


def test_the_dashboard_asks_only_for_what_the_table_names() -> None:
    dashboard = json.loads(Path("docs/grafana.json").read_text(encoding="utf-8"))
    told = set(re.findall(r"`(glmserve_[a-z0-9_]+)", Path("docs/metrics.md").read_text(encoding="utf-8")))
    asked = set(
        re.findall(r"glmserve_[a-z0-9_]+", json.dumps([one["targets"] for one in dashboard["panels"]]))
    )
    assert len(asked) > 15
    assert {name.removesuffix("_bucket") for name in asked} <= told

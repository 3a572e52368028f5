"""Each request leaves one line in the log, whatever became of it; floods of refusals are summed."""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.api.access.guard import Access
from server.api.access.keys import Key, KeyRing
from server.api.app import make_app
from server.api.service import Service
from server.api.watch.record import RequestRecord
from server.api.watch.request_lines import WINDOW_S, RequestLines
from server.logs import JsonLines, set_up_logging
from tests.server.api.scripted import ScriptedEngine

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "session_id": "agent-7"}


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [one.fields for one in caplog.records if one.name.endswith("request_lines")]  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_leaves_one_line_with_all_that_is_known(
    client: TestClient, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    caplog.set_level(logging.INFO)
    answer = client.post(CHAT, json=BODY | {"stream": stream})
    [fields] = lines(caplog)
    assert fields["id"] == answer.headers["X-Generation-Id"]
    assert fields["agent"] == "local 'agent-7'"
    assert (fields["key"], fields["route"], fields["status"]) == ("local", f"POST {CHAT}", 200)
    assert fields["prompt_tokens"] > 0
    assert fields["new_tokens"] > 1
    assert 0 <= fields["queue_s"] <= fields["first_token_s"] <= fields["total_s"]
    assert {"prefill_tokens_per_s", "decode_tokens_per_s"} <= fields.keys()
    assert not {"hit_rate", "read_bytes"} & fields.keys(), "nothing streams here"
    assert fields["ended"] == "stop"
    [text] = [one.message for one in caplog.records if one.name.endswith("request_lines")]
    assert "tok/s" in text
    assert "hits" not in text


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_broke_off_is_a_warning_with_its_cause(
    service: Service, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    caplog.set_level(logging.INFO)
    engine.fails_after, engine.failure = 2, "died"
    client = TestClient(make_app(service))
    client.post(CHAT, json=BODY | {"stream": stream})
    [record] = [one for one in caplog.records if one.name.endswith("request_lines")]
    assert record.levelno == logging.WARNING
    assert record.fields["ended"] == "provider_unavailable"  # type: ignore[attr-defined]
    assert 'glmserve_refusals_total{reason="provider_unavailable"} 1.0' in client.get("/metrics").text


def test_hit_rate_and_bytes_where_experts_are_streamed() -> None:
    record = RequestRecord(stats_before={"hits": 10.0, "misses": 0.0, "device_bytes": 1e6})
    record.stats_after = {"hits": 40.0, "misses": 10.0, "device_bytes": 3e6}
    assert (record.hit_rate, record.read_bytes) == (0.75, 2_000_000)


REFUSED = [
    (400, "invalid_request", CHAT, {"json": {"messages": 5}}),
    (400, "invalid_request", CHAT, {"content": b"{", "headers": {"content-type": "application/json"}}),
    (404, "not_found", "/v1/nothing", {"json": {}}),
    (404, "not_found", "/v1/activity/none/cancel", {"json": {}}),
    (405, "not_found", "/health", {"json": {}}),
    (400, "context_length_exceeded", CHAT, {"json": BODY | {"max_tokens": 4000, "messages": [
        {"role": "user", "content": "x" * 9000}]}}),
]  # fmt: skip


@pytest.mark.parametrize(("status", "reason", "path", "request_"), REFUSED)
def test_a_refused_request_leaves_a_line_too(
    service: Service, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture,
    status: int, reason: str, path: str, request_: dict[str, Any],
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO)
    answer = TestClient(make_app(service)).post(path, **request_)
    [fields] = lines(caplog)
    assert (answer.status_code, fields["status"], fields["ended"]) == (status, status, reason)
    assert fields["route"] == f"POST {path}"


def test_what_the_guard_refuses_leaves_a_line(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keys = KeyRing.of({"good": Key("fleet", "fleet", "fleet")})
    client = TestClient(make_app(service, Access(keys)))
    client.post(CHAT, json=BODY)
    client.post(CHAT, json={}, headers={"Authorization": "Bearer good"})
    locked = Access(hosts=frozenset(["localhost"]))
    TestClient(make_app(service, locked), "http://evil.example").get("/v1/models")
    assert [(one["status"], one["key"], one["ended"]) for one in lines(caplog)] == [
        (401, "none", "authentication"),
        (400, "fleet", "invalid_request"),
        (403, "none", "permission_denied"),
    ]


def test_an_engine_that_is_not_there_is_a_warning(
    service: Service, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.ready = False
    TestClient(make_app(service)).post(CHAT, json=BODY)
    [record] = [one for one in caplog.records if one.name.endswith("request_lines")]
    assert (record.levelno, record.fields["status"]) == (logging.WARNING, 503)  # type: ignore[attr-defined]


def test_a_flood_of_like_refusals_is_summed_by_the_second(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now = [0.0]
    sink = RequestLines(lambda: now[0])

    def refuse(status: int, reason: str) -> None:
        sink(RequestRecord("POST", "/v1/x", status=status, reason=reason))

    for _ in range(500):
        refuse(429, "rate_limit_exceeded")
    refuse(401, "authentication")
    now[0] = WINDOW_S
    sink.flush()
    texts = [one.message for one in caplog.records]
    assert len(texts) == 3, "the first of each kind, and the sum"
    assert "499 more requests" in texts[-1]
    assert "429" in texts[-1]
    refuse(429, "rate_limit_exceeded")
    assert len(caplog.records) == 4, "another second begins with a line of its own"


def test_questions_that_cost_nothing_are_for_debugging(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for path in ("/health", "/v1/models", "/metrics", "/v1/activity"):
        assert client.get(path).status_code == 200
    assert lines(caplog) == []


def test_a_path_of_a_client_cannot_forge_a_line(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    client.get("/v1/a%0a2026-01-01%20ERROR%20forged%1b[31m")
    [text] = [one.message for one in caplog.records if one.name.endswith("request_lines")]
    assert text.isprintable()


@pytest.fixture
def root_handlers() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:], root.level = handlers, level


@pytest.mark.usefixtures("root_handlers")
def test_json_lines_and_the_file_carry_the_requests_id(
    client: TestClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "glmserve.log"
    set_up_logging("info", "json", path, rotates=True)
    answer = client.post(CHAT, json=BODY | {"frobnicate": 1, "session_id": "json"})
    told = [json.loads(line) for line in path.read_text().splitlines()]
    warning = next(one for one in told if one["level"] == "warning")
    line = next(one for one in told if "status" in one)
    assert warning["id"] == line["id"] == answer.headers["X-Generation-Id"]
    assert "frobnicate" in warning["message"]
    assert line["new_tokens"] > 0
    assert capsys.readouterr().err.count("\n") == len(told), "standard error has the same lines"


@pytest.mark.usefixtures("root_handlers")
def test_text_lines_have_the_date_and_warnings_the_id(
    client: TestClient, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging("info")
    answer = client.post(CHAT, json=BODY | {"frobnicates": 1, "session_id": "text"})
    err = capsys.readouterr().err
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO|WARNING) ", err)
    assert f"[{answer.headers['X-Generation-Id']}]" in next(
        one for one in err.splitlines() if "WARNING" in one
    )


@pytest.mark.usefixtures("root_handlers")
def test_the_file_rotates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.logs.MAX_FILE_BYTES", 2000)
    path = tmp_path / "glmserve.log"
    set_up_logging("info", "text", path, rotates=True)
    for number in range(300):
        logging.getLogger("test").info("line %d %s", number, "x" * 50)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["glmserve.log"] + [
        f"glmserve.log.{n}" for n in range(1, 6)
    ]
    assert path.stat().st_size <= 2000


def test_an_exception_is_one_line_of_json() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        import sys

        record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed", None, sys.exc_info())
    assert json.loads(JsonLines().format(record))["exception"].endswith("ValueError: no")


def test_who_is_turned_away_by_a_full_line_counts_as_refused(
    service: Service, engine: ScriptedEngine
) -> None:
    record = RequestRecord(status=503)
    assert not record.is_generation
    assert not replace(record, answers=()).is_generation

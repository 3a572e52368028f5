"""Over a real socket: openai-python as it is, bytes as they travel, and clients that go away."""

import ast
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from server.api.access.guard import Access
from server.api.access.keys import KeyRing
from server.api.access.quotas import parse_quota
from server.api.app import make_app
from server.api.service import Service
from server.glm.tokenizer import Tokenizer
from tests.server.api.conftest import running_app, running_server
from tests.server.api.scripted import ScriptedEngine

ROOT = Path(__file__).parents[3]
HELLO: list[openai.types.chat.ChatCompletionUserMessageParam] = [{"role": "user", "content": "hello"}]
ADAPTIVE = {"type": "adaptive"}  # the script begins in a thought


@pytest.fixture
def api(base_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)


def test_openai_python_chats(api: openai.OpenAI) -> None:
    with api:
        answer = api.chat.completions.create(model="z-ai/glm-5.2", messages=HELLO)
    assert answer.choices[0].message.content == "Hi Ærø 👋!"
    assert answer.usage
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_openai_python_streams_a_chat(api: openai.OpenAI) -> None:
    with api:
        chunks = list(
            api.chat.completions.create(
                model="z-ai/glm-5.2", messages=HELLO, stream=True, stream_options={"include_usage": True}
            )
        )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Hi Ærø 👋!"
    assert chunks[-1].usage
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_openai_python_completes_and_lists_models(api: openai.OpenAI) -> None:
    with api:
        answer = api.completions.create(model="z-ai/glm-5.2", prompt="hello", max_tokens=2, logprobs=1)
        assert answer.choices[0].finish_reason == "length"
        assert answer.choices[0].logprobs
        assert [model.id for model in api.models.list()] == ["z-ai/glm-5.2"]


def test_openai_python_raises_what_the_server_says(api: openai.OpenAI, engine: ScriptedEngine) -> None:
    with api:
        with pytest.raises(openai.BadRequestError, match="temperature"):
            api.chat.completions.create(model="z-ai/glm-5.2", messages=HELLO, temperature=3)
        engine.fails_after = 2
        with pytest.raises(openai.APIError, match="the disk is gone"):
            list(api.chat.completions.create(model="z-ai/glm-5.2", messages=HELLO, stream=True))


def test_headers_and_comments_arrive_before_and_between_tokens(base_url: str, engine: ScriptedEngine) -> None:
    engine.token_s = 0.8
    body = {"messages": HELLO, "stream": True, "max_tokens": 2}
    started_at = time.monotonic()
    with httpx.stream("POST", f"{base_url}/v1/chat/completions", json=body) as response:
        assert time.monotonic() - started_at < 0.7
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    comments = [line for line in lines if line.startswith(":")]
    assert {comment.partition(" writing=")[0] for comment in comments} == {": OPENROUTER PROCESSING"}
    assert len(comments) >= 4
    assert {line.split(":")[0] for line in lines if line} == {"", "data"}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("chat/completions", {"messages": HELLO}),
        ("messages", {"messages": HELLO, "model": "z-ai/glm-5.2", "max_tokens": 99, "thinking": ADAPTIVE}),
        ("responses", {"input": "hello"}),
    ],
)
def test_an_event_is_one_line_to_whoever_takes_lines_apart(
    base_url: str, engine: ScriptedEngine, tokenizer: Tokenizer, path: str, fields: dict[str, Any]
) -> None:
    text = "a\u2028b\u2029c\x85d\x0be\x1cf\r\ng"
    engine.script = tokenizer.encode(f"hm</think>{text}<|user|>")
    with httpx.stream("POST", f"{base_url}/v1/{path}", json=fields | {"stream": True}) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
    events = [json.loads(line) for line in lines]
    texts = [event["choices"][0]["delta"] for event in events if event.get("choices")]
    texts += [event["delta"] for event in events if isinstance(event.get("delta"), dict)]
    texts += [{"text": e["delta"]} for e in events if e.get("type") == "response.output_text.delta"]
    assert "".join(one.get("content") or one.get("text") or "" for one in texts) == text


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("chat/completions", {"messages": HELLO}),
        ("completions", {"prompt": "hello"}),
        ("messages", {"messages": HELLO, "model": "z-ai/glm-5.2", "max_tokens": 2, "thinking": ADAPTIVE}),
        ("responses", {"input": "hello"}),
    ],
)
def test_no_block_of_a_stream_is_only_a_comment(
    base_url: str, engine: ScriptedEngine, path: str, fields: dict[str, Any]
) -> None:
    engine.token_s = 0.25  # several keepalives to a token
    engine.script = engine.script[:3]
    text = httpx.post(f"{base_url}/v1/{path}", json=fields | {"stream": True}).text
    assert text.count(": OPENROUTER PROCESSING\n") >= 4
    *blocks, _ = text.split("\n\n")
    kinds = [[line.partition(":")[0] for line in block.split("\n")] for block in blocks]
    assert all(kind[-1] == "data" for kind in kinds), kinds


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models/"),
        ("GET", "/api/v1/models//"),
        ("GET", "/health/"),
        ("POST", "/v1/chat/completions/"),
        ("POST", "/chat/completions/"),
        ("POST", "/api/v1/chat/completions/?x=1"),
        ("GET", "/api/v1/key/"),
    ],
)
def test_a_slash_at_the_end_changes_nothing(base_url: str, method: str, path: str) -> None:
    body = {"messages": HELLO, "max_tokens": 2} if method == "POST" else None
    headers = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "glm.example"}
    response = httpx.request(method, base_url + path, json=body, headers=headers)
    assert (response.status_code, response.headers.get("location")) == (200, None)


def test_a_slash_at_the_end_is_no_way_around_the_quota(service: Service) -> None:
    access = Access(KeyRing([("a", "sk-1")], {"a": parse_quota(["requests/minute=2"])}))
    with running_app(make_app(service, access)) as url:
        key = {"Authorization": "Bearer sk-1"}
        asked = [
            httpx.post(f"{url}/v1/{path}", json={"messages": HELLO, "max_tokens": 2}, headers=key).status_code
            for path in ("chat/completions", "chat/completions/", "chat/completions//", "chat/completions/")
        ]
    assert asked == [200, 200, 429, 429]


@pytest.mark.parametrize("is_streaming", [True, False])
def test_a_client_that_hangs_up_cancels_its_request(
    base_url: str, engine: ScriptedEngine, is_streaming: bool
) -> None:
    engine.token_s = 30
    body = json.dumps({"messages": HELLO, "stream": is_streaming}).encode()
    port = int(base_url.rpartition(":")[2])
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + body)
        until(lambda: engine.requests)
    until(lambda: engine.cancelled)
    assert engine.cancelled == [engine.requests[0].request_id]


def test_a_client_that_hangs_up_within_its_body_is_no_fault_of_ours(
    base_url: str, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    port = int(base_url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b'POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"a')
        time.sleep(0.2)
    time.sleep(0.2)
    assert httpx.post(f"{base_url}/v1/chat/completions", json={"messages": HELLO}).status_code == 200
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.fixture
def impatient_url(service: Service) -> Iterator[str]:
    with running_server(replace(service, patience_s=0.1)) as url:
        yield url


def test_who_waits_long_for_one_piece_gets_blanks_before_it(
    impatient_url: str, engine: ScriptedEngine
) -> None:
    body = {"messages": HELLO, "max_tokens": 2}
    response = httpx.post(f"{impatient_url}/v1/chat/completions", json=body)
    assert response.text.startswith("{"), "a fast answer is JSON from its first byte"
    engine.token_s = 0.25
    response = httpx.post(f"{impatient_url}/v1/chat/completions", json=body)
    assert response.text.startswith("   ")
    assert response.json()["choices"][0]["finish_reason"] == "length"
    assert response.headers["x-generation-id"] == response.json()["id"]
    engine.fails_after = 1
    response = httpx.post(f"{impatient_url}/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (200, 502)


def test_a_fault_of_ours_among_the_blanks_is_in_the_log(
    impatient_url: str, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.token_s = 0.25
    engine.script = [[]]  # type: ignore[list-item]
    response = httpx.post(f"{impatient_url}/v1/chat/completions", json={"messages": HELLO})
    assert response.json()["error"]["message"] == "the server failed; its log says more"
    [record] = [one for one in caplog.records if one.name == "server.api.answer.json_answer"]
    assert record.exc_info
    assert response.headers["x-generation-id"] in record.getMessage()


def test_who_hangs_up_among_the_blanks_cancels_the_request(
    impatient_url: str, engine: ScriptedEngine
) -> None:
    engine.token_s = 30
    with httpx.stream("POST", f"{impatient_url}/v1/chat/completions", json={"messages": HELLO}) as response:
        assert next(response.iter_raw()) == b" "
    until(lambda: engine.cancelled)


def test_a_body_that_is_too_large_gets_an_answer_and_not_a_reset(base_url: str) -> None:
    response = httpx.post(f"{base_url}/v1/chat/completions", content=b"x" * 10_000_000)
    assert response.status_code == 413


def until(is_true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 3
    while not is_true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def test_the_http_side_and_the_dialect_import_no_mlx() -> None:
    loaded = "{n.split('.')[0] for n in sys.modules}"
    code = f"import sys, server.commands.serve; print(sorted({loaded} & {{'mlx', 'mlx_lm'}}))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ast.literal_eval(found.stdout) == []

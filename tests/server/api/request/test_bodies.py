"""How bodies are read: in bounded time, and what is wrong with them is one thing in the client's words."""

import gzip
import json
import socket
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError
from starlette.testclient import TestClient

from server.api.dialects.anthropic_schema import MessagesRequest
from server.api.dialects.responses_schema import ResponsesRequest
from server.api.dialects.tokenize import DetokenizeRequest
from server.api.request.chat_schema import ChatRequest
from server.api.request.completion_schema import CompletionRequest

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hello"}
BODY = {"messages": [USER], "max_tokens": 1}
WRONG = [0.5] * 1000


@pytest.mark.parametrize(
    ("schema", "fields"),
    [
        (ChatRequest, {"messages": WRONG}),
        (ChatRequest, {"messages": [{"role": "user", "content": WRONG}]}),
        (ChatRequest, {"messages": [{"role": "assistant", "tool_calls": WRONG}]}),
        (ChatRequest, {"messages": [{"role": "assistant", "reasoning_details": WRONG}]}),
        (ChatRequest, {"messages": [USER], "tools": WRONG}),
        (ChatRequest, {"messages": [USER], "stop": WRONG}),
        (ChatRequest, {"messages": [USER], "models": WRONG}),
        (CompletionRequest, {"prompt": WRONG}),
        (CompletionRequest, {"prompt": [WRONG]}),
        (MessagesRequest, {"model": "m", "max_tokens": 1, "messages": WRONG}),
        (MessagesRequest, {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": WRONG}]}),
        (MessagesRequest, {"model": "m", "max_tokens": 1, "messages": [USER], "system": WRONG}),
        (MessagesRequest, {"model": "m", "max_tokens": 1, "messages": [USER], "tools": WRONG}),
        (MessagesRequest, {"model": "m", "max_tokens": 1, "messages": [USER], "stop_sequences": WRONG}),
        (ResponsesRequest, {"input": WRONG}),
        (ResponsesRequest, {"input": [{"role": "user", "content": WRONG}]}),
        (ResponsesRequest, {"input": [{"type": "reasoning", "summary": WRONG}]}),
        (ResponsesRequest, {"input": "x", "tools": WRONG}),
        (ResponsesRequest, {"input": "x", "include": WRONG}),
        (DetokenizeRequest, {"tokens": WRONG}),
    ],
)
def test_a_list_of_faults_is_not_looked_at_to_its_end(
    schema: type[BaseModel], fields: dict[str, Any]
) -> None:
    """Eight megabytes of them kept the event loop, and with it everybody, for half a minute and more."""
    with pytest.raises(ValidationError) as refused:
        schema.model_validate(fields)
    assert refused.value.error_count() < 10


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}]},
         "messages[0].content[1].type", "'text'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
        ({"messages": ["x"]}, "messages[0]", "an object"),
        ({"tool_choice": "always"}, "tool_choice", "'required'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function", "required"),
        ({"stop": ["x", 5]}, "stop[1]", "string"),
    ],
)  # fmt: skip
def test_a_fault_is_told_by_its_place_in_the_body_and_by_no_name_of_ours(
    client: TestClient, fields: dict[str, Any], param: str, words: str
) -> None:
    error = client.post(CHAT, json=BODY | fields).json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")
    assert words in error["message"]


def test_a_fault_between_fields_blames_one_of_them(client: TestClient) -> None:
    error = client.post(CHAT, json=BODY | {"tool_choice": "required"}).json()["error"]
    assert error["param"] == "tool_choice"
    assert error["message"].startswith("'tool_choice' is \"required\", but there are no tools")


def test_a_body_that_is_not_an_object_is_told_so(client: TestClient) -> None:
    assert client.post(CHAT, content=b"[]").json()["error"]["message"] == "Input should be an object"
    assert "is not JSON" in client.post(CHAT, content=b"{").json()["error"]["message"]


def test_a_compressed_body_is_refused_by_its_coding(client: TestClient) -> None:
    raw = json.dumps(BODY).encode()
    response = client.post(CHAT, content=gzip.compress(raw), headers={"Content-Encoding": "gzip"})
    assert response.status_code == response.json()["error"]["code"] == 415
    assert "'gzip'" in response.json()["error"]["message"]
    assert client.post(CHAT, content=raw, headers={"Content-Encoding": "identity"}).status_code == 200


def test_a_body_that_never_comes_to_its_end_is_waited_for_no_longer(
    base_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.request.body.MAX_BODY_S", 0.2)
    port = int(base_url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(f'POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{{"a'.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))  # to the end: it is closed
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["metadata"]["error_type"] == "timeout"
    assert httpx.post(base_url + CHAT, json=BODY).status_code == 200

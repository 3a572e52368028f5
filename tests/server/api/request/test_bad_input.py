"""Whatever a client sends, it gets a 4xx with the error body, and the next request works."""

import json
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.api.app import make_app
from server.api.request.body import MAX_BODY_BYTES
from server.api.request.parameters import Parameters
from server.api.service import Service
from tests.server.api.scripted import ScriptedEngine

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hello"}
CALL = {"id": "c", "type": "function", "function": {"name": "f"}}


def refused(client: TestClient, body: bytes | str, status: int = 400, path: str = CHAT) -> dict[str, Any]:
    """The error object, after checking its form and that the next request is answered."""
    response = client.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error["code"] == status
    assert error["message"]
    assert error["metadata"]["error_type"]
    assert client.post(CHAT, json={"messages": [USER]}).status_code == 200
    return error


def body_with(**fields: Any) -> str:
    return json.dumps({"messages": [USER]} | fields)


def call_with(arguments: str) -> list[dict[str, Any]]:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    return [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"not json",
        b"\xff\xfe{}",
        b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\\udc00\\ud800"}]}',
        b'{"\\ud800": 1, "messages": []}',
        b'{"a":' * 1000 + b"1" + b"}" * 1000,
        b"[" * 100_000,
    ],
    ids=lambda body: repr(body[:40]),
)
def test_bodies_that_are_not_json_objects_are_refused(client: TestClient, body: bytes) -> None:
    refused(client, body)


def test_nesting_of_1000_inside_a_field_is_refused(client: TestClient) -> None:
    deep = "[" * 1000 + "]" * 1000
    refused(client, f'{{"messages": [{{"role": "user", "content": "x"}}], "metadata": {deep}}}')
    error = refused(client, body_with(messages=call_with('{"a":' * 1000 + "1" + "}" * 1000)))
    assert error["param"] == "messages[1].tool_calls[0].function.arguments"


def test_a_body_of_10_megabytes_is_too_large(client: TestClient) -> None:
    error = refused(client, body_with(messages=[{"role": "user", "content": "x" * 10_000_000}]), 413)
    assert error["metadata"]["error_type"] == "payload_too_large"
    assert str(MAX_BODY_BYTES) in error["message"]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ({}, "messages"),
        (None, "messages"),
        (["hello"], "messages[0]"),
        ([{"role": "wizard", "content": "x"}], "messages[0].role"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0]"),
        ([{"role": "user", "content": None}], "messages[0]"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content"),
        ([USER, {"role": "assistant", "tool_calls": [{"id": 1}]}], "messages[1].tool_calls[0]"),
    ],
)
def test_bad_messages_are_named(client: TestClient, messages: Any, param: str) -> None:
    error = refused(client, body_with(messages=messages))
    assert error["param"].startswith(param)


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e999", "-0.1", '"1"', "true", "[]", "{}"]
)
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_numbers_that_make_no_sense_are_refused(client: TestClient, field: str, value: str) -> None:
    error = refused(client, f'{{"messages": [{{"role": "user", "content": "x"}}], "{field}": {value}}}')
    assert error["param"] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.1),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", "10"),
        ("max_tokens", 10**30),
        ("max_completion_tokens", -1),
        ("seed", 2**64),
        ("seed", 0.5),
        ("stop", ""),
        ("stop", [""]),
        ("stop", [1]),
        ("stop", {}),
        ("stream", "yes"),
        ("model", 5),
        ("logit_bias", []),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"999999": 1}),
        ("logit_bias", {"٣": 1}),
        ("logit_bias", {"5": 101}),
        ("logprobs", 3),
        ("n", 0),
        ("n", 17),
        ("user", {}),
        ("session_id", "x" * 257),
        ("model", "openai/gpt-9"),
        ("models", "z-ai/glm-5.2"),
        ("reasoning", {"max_tokens": 0}),
        ("tools", {}),
        ("tools", [{"type": "function"}]),
        ("reasoning_effort", "very"),
    ],
)
def test_wrong_values_are_refused_by_name(client: TestClient, field: str, value: Any) -> None:
    assert refused(client, body_with(**{field: value}))["param"].startswith(field)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_json_has_not_are_refused_wherever_they_stand(client: TestClient, value: str) -> None:
    parameters = f'{{"properties": {{"a": {{"default": [{value}]}}}}}}'
    function = f'"name": "f", "parameters": {parameters}'
    chat = body_with(tools=["TOOL"]).replace('"TOOL"', f'{{"type": "function", "function": {{{function}}}}}')
    assert "beyond 1e308" in refused(client, chat)["message"]
    response = f'{{"input": "x", "tools": [{{"type": "function", {function}}}]}}'
    assert "beyond 1e308" in refused(client, response, path="/v1/responses")["message"]


TWIN = {"name": "twin", "parameters": {}, "input_schema": {}}
FUNCTION = {"type": "function", "function": TWIN}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": [USER], "tools": [FUNCTION, FUNCTION]}),
        ("/v1/messages", {"messages": [USER], "model": "glm-5.2", "max_tokens": 9, "tools": [TWIN, TWIN]}),
        ("/v1/responses", {"input": "x", "tools": [{"type": "function", **TWIN}] * 2}),
    ],
)
def test_two_tools_of_one_name_are_refused_by_it(
    client: TestClient, path: str, fields: dict[str, Any]
) -> None:
    response = client.post(path, json=fields)
    assert response.status_code == 400
    assert "'twin' twice" in response.json()["error"]["message"]


def test_alternatives_without_log_probabilities_are_refused(client: TestClient) -> None:
    assert "top_logprobs" in refused(client, body_with(top_logprobs=2))["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_format", {"type": "python"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("functions", []),
        ("guided_json", {}),
        ("response_format", {"type": "json_object", "schema": {}}),
        ("modalities", ["text", "audio"]),
        ("plugins", [{"id": "web", "max_results": 3}]),
        ("web_search_options", {}),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client: TestClient, field: str, value: Any) -> None:
    error = refused(client, body_with(**{field: value}))
    assert field in error["message"]
    assert error["param"].startswith(field)


@pytest.mark.parametrize("field", ["metadata", "provider", "transforms", "trace", "plugins"])
def test_fields_without_a_meaning_here_are_ignored(client: TestClient, field: str) -> None:
    assert client.post(CHAT, json={"messages": [USER], field: {"x": 1}}).status_code == 200


def test_a_prompt_beyond_the_context_is_told_in_the_words_that_clients_search_for(
    client: TestClient, engine: ScriptedEngine
) -> None:
    path = f"/api{CHAT}"
    error = refused(client, body_with(messages=[{"role": "user", "content": "word " * 5000}]), path=path)
    assert error["metadata"]["error_type"] == "context_length_exceeded"
    assert "maximum context length is 4096 tokens. However, you requested about " in error["message"]
    error = refused(client, body_with(max_tokens=4095), path=path)
    num_prompt = len(engine.requests[0].token_ids)
    assert f"{4095 + num_prompt} tokens ({num_prompt} of text input, 4095 in the output)" in error["message"]


def test_unknown_paths_and_methods_get_the_body_too(client: TestClient) -> None:
    assert client.post("/v1/nothing").json()["error"]["code"] == 404
    assert client.get(CHAT).json()["error"]["code"] == 405


def test_a_fault_of_ours_is_a_500_that_tells_nothing(client: TestClient, engine: ScriptedEngine) -> None:
    engine.script = [[]]  # type: ignore[list-item]
    careless = TestClient(client.app, raise_server_exceptions=False)
    response = careless.post(CHAT, json={"messages": [USER]})
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the server failed; its log says more"


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (CHAT, "reasoning", {"budget": 5}),
        (CHAT, "thinking", {"type": "enabled", "budget": 5}),
        (CHAT, "chat_template_kwargs", {"budget": 5}),
        (CHAT, "response_format", {"type": "text", "budget": 5}),
        (CHAT, "stream_options", {"budget": 5}),
        ("/v1/responses", "reasoning", {"budget": 5}),
        ("/v1/responses", "text", {"budget": 5}),
        ("/v1/messages", "thinking", {"type": "adaptive", "budget": 5}),
        ("/v1/messages", "output_config", {"budget": 5}),
    ],
)
def test_options_inside_of_fields_are_not_swallowed_either(
    client: TestClient, service: Service, path: str, field: str, value: dict[str, Any]
) -> None:
    body: dict[str, Any] = {"model": "z-ai/glm-5.2", "messages": [USER], "max_tokens": 5}
    if path == "/v1/responses":
        body = {"input": "x"}
    strict = TestClient(make_app(replace(service, parameters=Parameters(is_strict=True))))
    error = refused(strict, json.dumps(body | {field: value}), path=path)
    assert "'budget'" in error["message"]
    assert error["param"] == f"{field}.budget"
    assert client.post(path, json=body | {field: value}).headers["x-glmserve-ignored"] == f"{field}.budget"
    unset = client.post(path, json=body | {field: value | {"budget": None}})
    assert unset.status_code == 200
    assert "x-glmserve-ignored" not in unset.headers


@pytest.mark.parametrize("field", ["function_call", "audio"])
def test_what_a_turn_held_and_this_model_cannot_read_is_refused(client: TestClient, field: str) -> None:
    said = {"role": "assistant", "content": "x", field: {"name": "f"}}
    assert refused(client, body_with(messages=[USER, said, USER]))["param"] == f"messages[1].{field}"
    refused_not = body_with(messages=[USER, said | {field: None, "refusal": None, "annotations": []}, USER])
    assert client.post(CHAT, content=refused_not).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("POST", "/api/generate", 404), ("GET", "/v1/chat/completions", 405)],
)
def test_a_path_with_nothing_there_is_named(client: TestClient, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert f"{method} {path}" in response.json()["error"]["message"]


def test_a_wrong_model_is_told_the_flags_that_help(client: TestClient) -> None:
    body = {"model": "gpt-9", "messages": [{"role": "user", "content": "x"}]}
    message = client.post("/v1/chat/completions", json=body).json()["error"]["message"]
    assert message.startswith("gpt-9 is not a valid model ID")
    assert "--served-model-name" in message
    assert "--model-policy" in message

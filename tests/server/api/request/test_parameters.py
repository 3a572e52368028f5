"""Parameters that are unknown are ignored and said; those that change the answer are refused by name."""

import logging
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.api.app import make_app
from server.api.request.parameters import MAX_NAMES, Parameters
from server.api.service import Service
from tests.server.api.scripted import ScriptedEngine

USER = {"role": "user", "content": "hello"}
BODIES: dict[str, dict[str, Any]] = {
    "/chat/completions": {"messages": [USER]},
    "/completions": {"prompt": "hello"},
    "/messages": {"model": "z-ai/glm-5.2", "messages": [USER], "max_tokens": 9},
    "/responses": {"input": "hello"},
}
FUNCTION = {"type": "function", "function": {"name": "f"}}
CLIENT_TOOL: dict[str, dict[str, Any]] = {
    "/chat/completions": FUNCTION,
    "/messages": {"name": "f", "input_schema": {}},
    "/responses": {"type": "function", "name": "f"},
}
UNKNOWN = {
    "no_stop_trim": True,
    "ignore_eos": False,
    "skip_special_tokens": True,
    "min_tokens": 3,
    "mirostat": 2,
    "kv_transfer_params": {"a": [1, 2]},
    "num_ctx": 4096,
    "Temperature": 0.5,
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("base", ["/v1", "/api/v1", ""])
@pytest.mark.parametrize("is_streaming", [False, True])
def test_unknown_parameters_are_ignored_and_said(
    client: TestClient, engine: ScriptedEngine, base: str, path: str, is_streaming: bool
) -> None:
    body = BODIES[path] | {"stream": is_streaming}
    response = client.post(base + path, json=body | UNKNOWN)
    assert response.status_code == 200
    assert response.headers["x-glmserve-ignored"] == ", ".join(UNKNOWN)
    plain = client.post(base + path, json=body | dict.fromkeys(UNKNOWN))
    assert "x-glmserve-ignored" not in plain.headers
    known, unknown = engine.requests[-1], engine.requests[-2]
    assert replace(unknown, request_id=known.request_id) == known


@pytest.mark.parametrize("path", BODIES)
def test_with_strict_parameters_they_are_refused_and_the_near_one_is_named(
    service: Service, engine: ScriptedEngine, path: str
) -> None:
    strict = TestClient(make_app(replace(service, parameters=Parameters(is_strict=True))))
    for name, value in UNKNOWN.items():
        response = strict.post(f"/v1{path}", json=BODIES[path] | {name: value})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == name
    response = strict.post(f"/v1{path}", json=BODIES[path] | {"temprature": 0.5})
    assert "'temprature' is not supported; did you mean 'temperature'?" in response.text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a, b", "a%2C%20b"),
        ("x\r\nSet-Cookie: y", "x%0D%0ASet-Cookie:%20y"),
        ("naïve 👋", "na%C3%AFve%20%F0%9F%91%8B"),
        ("\u2028", "%E2%80%A8"),
        ("%41", "%2541"),
    ],
)
def test_names_are_escaped_in_header_and_log(
    client: TestClient, caplog: pytest.LogCaptureFixture, name: str, said: str
) -> None:
    body = BODIES["/chat/completions"] | {name: 1, "session_id": name + "\n"}
    response = client.post("/v1/chat/completions", json=body)
    assert response.headers["x-glmserve-ignored"] == said
    assert said in caplog.text
    assert len([line for line in caplog.text.splitlines() if "ignored here" in line]) == 1
    assert len(caplog.records) == len(caplog.text.splitlines())


def test_names_are_few_and_short(client: TestClient) -> None:
    many = {f"unknown_{index}": 1 for index in range(10_000)}
    names = client.post("/v1/chat/completions", json=BODIES["/chat/completions"] | many).headers[
        "x-glmserve-ignored"
    ]
    assert names.split(", ") == list(many)[:MAX_NAMES]
    response = client.post("/v1/chat/completions", json=BODIES["/chat/completions"] | {"é" * 10**6: 1})
    assert len(response.headers["x-glmserve-ignored"]) < 1000


def test_the_log_says_it_once_for_each_agent(
    service: Service, engine: ScriptedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    client = TestClient(make_app(replace(service, parameters=Parameters())))

    def told(**fields: Any) -> str:
        caplog.clear()
        client.post("/v1/chat/completions", json=BODIES["/chat/completions"] | fields)
        return " ".join(one.message for one in caplog.records if one.levelno >= logging.WARNING)

    assert "max_tokns (did you mean max_tokens?)" in told(max_tokns=1, session_id="a")
    assert told(max_tokns=2, session_id="a") == ""
    assert "'b'" in told(max_tokns=1, session_id="b")
    assert told(max_tokns=1, other=1, session_id="a").endswith("ignored here: other")


def test_metrics_count_them_without_their_names(service: Service, engine: ScriptedEngine) -> None:
    client = TestClient(make_app(replace(service, parameters=Parameters())))
    client.post("/v1/chat/completions", json=BODIES["/chat/completions"] | {"wizard": 1, "sorcerer": 2})
    text = client.get("/metrics").text
    assert "glmserve_ignored_parameters_total 2.0" in text
    assert "wizard" not in text


HOSTED = ["web_search_preview", "code_interpreter", "openrouter:datetime", "computer_20250124", "mcp_toolset"]


@pytest.mark.parametrize("path", CLIENT_TOOL)
@pytest.mark.parametrize("kind", HOSTED)
def test_hosted_tools_are_ignored_and_said_and_cannot_be_chosen(
    client: TestClient, engine: ScriptedEngine, path: str, kind: str
) -> None:
    tools = [CLIENT_TOOL[path], {"type": kind, "name": "g"}]
    response = client.post(f"/v1{path}", json=BODIES[path] | {"tools": tools})
    assert response.status_code == 200, response.text
    assert response.headers["x-glmserve-ignored"] == f"tools[1].{kind}"
    client.post(f"/v1{path}", json=BODIES[path] | {"tools": tools[:1]})
    assert engine.requests[-1].token_ids == engine.requests[-2].token_ids
    client.post(f"/v1{path}", json=BODIES[path])
    client.post(f"/v1{path}", json=BODIES[path] | {"tools": tools[1:]})
    assert engine.requests[-1].token_ids == engine.requests[-2].token_ids
    choices: list[Any] = [{"type": kind}]
    if path == "/messages":
        choices = [{"type": "tool", "name": "g"}]
    for choice in choices:
        response = client.post(f"/v1{path}", json=BODIES[path] | {"tools": tools, "tool_choice": choice})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "tool_choice"


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/chat/completions", "modalities", ["text", "audio"]),
        ("/chat/completions", "modalities", ["image"]),
        ("/chat/completions", "audio", {"voice": "alloy", "format": "wav"}),
        ("/chat/completions", "web_search_options", {"search_context_size": "low"}),
        ("/chat/completions", "plugins", [{"id": "response-healing"}, {"id": "web", "max_results": 5}]),
        ("/completions", "plugins", [{"id": "web-fetch"}]),
        ("/responses", "plugins", [{"id": "web", "enabled": True}]),
        ("/chat/completions", "model", "z-ai/glm-5.2:online"),
        ("/completions", "model", "glm-5.2:nitro:online"),
        ("/messages", "model", "openrouter/z-ai/glm-5.2:online"),
        ("/responses", "model", "GLM-5.2:Online"),
        ("/chat/completions", "guided_regex", "[ab]"),
        ("/chat/completions", "structured_outputs", {"json": {}}),
        ("/completions", "response_format", {"type": "json_object"}),
        ("/completions", "ebnf", "root ::= [ab]"),
        ("/messages", "response_format", {"type": "json_object"}),
        ("/responses", "guided_choice", ["a", "b"]),
        ("/completions", "best_of", 3),
        ("/completions", "suffix", "x"),
        ("/responses", "truncation", "auto"),
        ("/responses", "n", 2),
        ("/responses", "conversation", "conv_1"),
        ("/messages", "mcp_servers", [{"type": "url"}]),
        ("/chat/completions", "top_logprobs", 3),
        ("/chat/completions", "tool_choice", "required"),
        ("/messages", "tool_choice", {"type": "any"}),
        ("/messages", "audio", {"voice": "alloy"}),
        ("/messages", "modalities", ["audio"]),
        ("/messages", "web_search_options", {}),
        ("/messages", "plugins", [{"id": "web"}]),
        ("/responses", "web_search_options", {}),
        ("/responses", "audio", {"voice": "alloy"}),
        ("/completions", "web_search", True),
        ("/chat/completions", "enable_search", True),
        ("/chat/completions", "search_parameters", {"mode": "on"}),
        ("/chat/completions", "modalities", "audio"),
        ("/chat/completions", "response_modalities", ["TEXT", "IMAGE"]),
        ("/chat/completions", "plugins", {"id": "web"}),
        ("/chat/completions", "plugins", ["WEB"]),
        ("/chat/completions", "images", ["aGVsbG8="]),
        ("/chat/completions", "format", "json"),
        ("/responses", "response_schema", {"type": "object"}),
        ("/chat/completions", "json_mode", True),
        ("/messages", "tool_choice", {"type": "tool", "name": "f"}),
    ],
)
def test_what_changes_the_answer_is_refused_in_param(
    client: TestClient, path: str, field: str, value: Any
) -> None:
    response = client.post(f"/v1{path}", json=BODIES[path] | {field: value})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modalities", ["text"]),
        ("plugins", [{"id": "file-parser"}, {"id": "web", "enabled": False}]),
        ("structured_outputs", True),
        ("models", ["z-ai/glm-5.2:online", "z-ai/glm-5.2"]),
        ("web_search_options", None),
        ("enable_search", False),
        ("search_parameters", {"mode": "off"}),
        ("web_search", {"enable": False}),
        ("json_mode", False),
        ("format", ""),
    ],
)
def test_what_asks_for_no_more_than_text_is_answered(client: TestClient, field: str, value: Any) -> None:
    response = client.post("/api/v1/chat/completions", json=BODIES["/chat/completions"] | {field: value})
    assert response.status_code == 200, response.text
    assert "x-glmserve-ignored" not in response.headers


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "builtin_function", "function": {"name": "$web_search"}},
        {"type": "web_search", "function": {"name": "f2"}, "web_search": {"enable": True}},
        {"type": "retrieval", "function": {"name": "f"}},
    ],
)
def test_a_hosted_tool_with_a_function_in_it_is_not_offered(
    client: TestClient, engine: ScriptedEngine, tool: dict[str, Any]
) -> None:
    body = BODIES["/chat/completions"]
    for tools in ([FUNCTION, tool], [FUNCTION]):
        response = client.post("/v1/chat/completions", json=body | {"tools": tools})
        assert response.status_code == 200, response.text
    assert engine.requests[-1].token_ids == engine.requests[-2].token_ids


@pytest.mark.parametrize("path", ["/chat/completions", "/responses"])
@pytest.mark.parametrize(
    ("choice", "word"),
    [
        ({"type": "auto"}, "auto"), ({"type": "none"}, "none"), ({"type": "required"}, "required"),
        ({"type": "any"}, "required"), ("any", "required"), ({"type": "auto", "disable_parallel": 1}, "auto"),
    ],
)  # fmt: skip
def test_a_choice_of_no_tool_may_be_an_object(
    client: TestClient, engine: ScriptedEngine, path: str, choice: Any, word: str
) -> None:
    for given in (choice, word):
        body = BODIES[path] | {"tools": [CLIENT_TOOL[path]], "tool_choice": given}
        response = client.post(f"/v1{path}", json=body)
        assert response.status_code == 200, response.text
    assert engine.requests[-1].grammar == engine.requests[-2].grammar


def test_a_tool_without_a_type_is_a_function(client: TestClient, engine: ScriptedEngine) -> None:
    for tool in (FUNCTION, {"function": FUNCTION["function"]}):
        body = BODIES["/chat/completions"] | {"tools": [tool], "tool_choice": "required"}
        assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert engine.requests[-1].token_ids == engine.requests[-2].token_ids


def test_anthropics_older_name_of_a_form_is_honoured(client: TestClient, engine: ScriptedEngine) -> None:
    form = {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    bodies: list[dict[str, Any]] = [
        {"output_format": form}, {"output_config": {"format": form}}, {"mcp_servers": []},
    ]  # fmt: skip
    for fields in bodies:
        assert client.post("/v1/messages", json=BODIES["/messages"] | fields).status_code == 200
    older, newer, none = (request.grammar for request in engine.requests[-3:])
    assert older == newer != none


def test_openrouters_require_parameters_refuses_unknown_ones(client: TestClient) -> None:
    body = BODIES["/chat/completions"] | {"provider": {"require_parameters": True}}
    assert client.post("/api/v1/chat/completions", json=body).status_code == 200
    response = client.post("/api/v1/chat/completions", json=body | {"wizard": 1})
    assert response.json()["error"]["param"] == "wizard"

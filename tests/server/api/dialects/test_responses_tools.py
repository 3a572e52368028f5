"""What Codex and the AI SDK send to /responses: tools and items of many types, and references."""

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from server.api.dialects.responses_tools import custom_input, flat_name
from server.glm.tokenizer import Tokenizer
from tests.server.api.dialects.test_responses import both, create, says, sdk  # noqa: F401
from tests.server.api.scripted import ScriptedEngine

USER = {"role": "user", "content": "hello"}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FIND = {"type": "function", "name": "find_city", "description": "Finds.", "strict": False, "parameters": CITY}
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}
MAPS = {"type": "namespace", "name": "mcp__maps", "description": "Maps.", "tools": [FIND, PATCH]}
HOSTED = [
    {"type": "web_search", "external_web_access": True},
    {"type": "local_shell"},
    {"type": "tool_search"},
]


def prompt_of(engine: ScriptedEngine, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(engine.requests[-1].token_ids)


def call(name: str, **arguments: str) -> str:
    pairs = "".join(
        f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>" for key, value in arguments.items()
    )
    return f"</think><tool_call>{name}{pairs}</tool_call><|observation|>"


def test_hosted_tools_are_ignored_and_said(client: TestClient, engine: ScriptedEngine) -> None:
    response = client.post("/v1/responses", json={"input": "x", "tools": [*HOSTED, FIND]})
    assert response.status_code == 200, response.text
    said = "tools[0].web_search, tools[1].local_shell, tools[2].tool_search"
    assert response.headers["x-glmserve-ignored"] == said
    assert [tool["name"] for tool in response.json()["tools"]] == ["find_city"]


@pytest.mark.parametrize("tools", [[MAPS], [{**MAPS, "name": "mcp__maps__"}], [FIND, MAPS], [MAPS, *HOSTED]])
@both
def test_a_namespace_is_flattened_and_its_calls_come_back_in_it(
    sdk: openai.OpenAI, says: Callable[..., None], engine: ScriptedEngine, tokenizer: Tokenizer,  # noqa: F811
    tools: Any, is_streaming: bool,
) -> None:  # fmt: skip
    says(call("mcp__maps__find_city", city="Oslo"))
    response = create(sdk, is_streaming, tools=tools)
    assert '"name": "mcp__maps__find_city"' in prompt_of(engine, tokenizer)
    (called,) = response.output
    namespace = next(tool["name"] for tool in tools if tool["type"] == "namespace")
    assert (called.type, called.namespace, called.name) == ("function_call", namespace, "find_city")
    assert json.loads(called.arguments) == {"city": "Oslo"}
    result = {"type": "function_call_output", "call_id": called.call_id, "output": "60 N"}
    create(sdk, is_streaming, tools=tools, input=[USER, called.to_dict(), result])
    assert "<tool_call>mcp__maps__find_city<arg_key>city</arg_key>" in prompt_of(engine, tokenizer)


@pytest.mark.parametrize(
    ("namespace", "name", "flat"),
    [
        (None, "f", "f"),
        ("", "f", "f"),
        ("docs", "search", "docs__search"),
        ("mcp__x__", "y", "mcp__x__y"),
        ("mcp__x", "_y", "mcp__x_y"),
    ],
)
def test_flat_names(namespace: str | None, name: str, flat: str) -> None:
    assert flat_name(namespace, name) == flat


def test_two_tools_of_one_flat_name_are_refused_by_it(client: TestClient) -> None:
    tools = [MAPS, {**FIND, "name": "mcp__maps__find_city"}]
    response = client.post("/v1/responses", json={"input": "x", "tools": tools})
    assert "'mcp__maps__find_city' twice" in response.json()["error"]["message"]


@pytest.mark.parametrize("text", ["*** Begin Patch\n+ä\n", '{"input": 3}', "", "a </think> b"])
def test_a_custom_tool_is_a_function_of_one_string(
    client: TestClient,
    says: Callable[..., None],  # noqa: F811
    engine: ScriptedEngine,
    tokenizer: Tokenizer,
    text: str,
) -> None:
    says(call("apply_patch", input=text), call("mcp__maps__apply_patch", input=text))
    body = {"input": "x", "tools": [PATCH, MAPS]}
    response = client.post("/v1/responses", json=body)
    (called,) = response.json()["output"]
    assert (called["type"], called["name"], called["input"]) == ("custom_tool_call", "apply_patch", text)
    assert "start: /.+/" in prompt_of(engine, tokenizer)
    raw = client.post("/v1/responses", json=body | {"stream": True}).text
    events = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: ")]
    deltas = [event["delta"] for event in events if event["type"].endswith("custom_tool_call_input.delta")]
    done = next(event for event in events if event["type"] == "response.custom_tool_call_input.done")
    assert "".join(deltas) == done["input"] == text
    item = next(event["item"] for event in events if event["type"] == "response.output_item.done")
    assert (item["type"], item["namespace"], item["input"]) == ("custom_tool_call", "mcp__maps", text)
    assert not any("function_call_arguments" in event["type"] for event in events)
    result = {"type": "custom_tool_call_output", "call_id": item["call_id"], "output": "Done!"}
    again = client.post("/v1/responses", json=body | {"input": [USER, item, result]})
    assert again.status_code == 200, again.text
    assert prompt_of(engine, tokenizer).count("<tool_response>Done!</tool_response>") == 1
    history = "<tool_call>mcp__maps__apply_patch<arg_key>input</arg_key>"
    assert history in prompt_of(engine, tokenizer)


@pytest.mark.parametrize("arguments", ["[]", "x", "[", '{"other": "x"}', '{"input": 5}'])
def test_arguments_that_are_no_input_are_given_as_they_are(arguments: str) -> None:
    assert custom_input(arguments) == arguments


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ({"type": "custom", "name": "apply_patch"}, "apply_patch"),
        ({"type": "function", "name": "find_city", "namespace": "mcp__maps"}, "mcp__maps__find_city"),
        ({"type": "function", "name": "mcp__maps__find_city"}, "mcp__maps__find_city"),
    ],
)
def test_each_kind_can_be_chosen(client: TestClient, engine: ScriptedEngine, choice: Any, name: str) -> None:
    body = {"input": "x", "tools": [PATCH, MAPS], "tool_choice": choice}
    assert client.post("/v1/responses", json=body).status_code == 200
    assert name in engine.requests[-1].grammar


SHELL = {"type": "exec", "command": ["ls", "-l"], "timeout_ms": None}
FOREIGN = [
    {
        "type": "web_search_call",
        "id": "ws_1",
        "status": "completed",
        "action": {"type": "search", "query": "q"},
    },
    {"type": "file_search_call", "id": "fs_1", "queries": ["a"], "results": None},
    {"type": "image_generation_call", "id": "ig_1", "result": "AA=="},
    {"type": "shell_call_output", "call_id": "c", "output": [{"stdout": "x", "outcome": {"type": "exit"}}]},
    {"type": "mcp_list_tools", "server_label": "x", "tools": []},
    {"type": "ghost_snapshot", "ghost_commit": {"id": "x"}},
    {"type": "tool_search_output", "tools": []},
]


@pytest.mark.parametrize("item", FOREIGN, ids=lambda item: item["type"])
def test_items_of_hosted_tools_are_ignored_and_said(
    client: TestClient, engine: ScriptedEngine, item: dict[str, Any]
) -> None:
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    answer = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A"}]}
    response = client.post("/v1/responses", json={"input": [USER, thought, item, answer, USER]})
    assert response.status_code == 200, response.text
    assert response.headers["x-glmserve-ignored"] == f"input[2].{item['type']}"
    client.post("/v1/responses", json={"input": [USER, thought, answer, USER]})
    assert engine.requests[-1].token_ids == engine.requests[-2].token_ids


@pytest.mark.parametrize("kind", ["local_shell_call_output", "function_call_output"])
def test_a_local_shell_call_is_a_call(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer, kind: str
) -> None:
    items = [
        USER,
        {"type": "local_shell_call", "id": "lsh_1", "call_id": "c", "status": "completed", "action": SHELL},
        {"type": kind, "call_id": "c", "output": "total 0"},
    ]
    response = client.post("/v1/responses", json={"input": items})
    assert response.status_code == 200, response.text
    assert "<tool_call>local_shell<arg_key>type</arg_key>" in prompt_of(engine, tokenizer)
    assert "<tool_response>total 0</tool_response>" in prompt_of(engine, tokenizer)


@pytest.mark.parametrize("kind", ["compaction", "wizard", "input_image"])
def test_items_whose_content_would_be_lost_are_refused(client: TestClient, kind: str) -> None:
    response = client.post("/v1/responses", json={"input": [USER, {"type": kind}]})
    assert response.json()["error"]["param"] == "input[1]"


@pytest.mark.parametrize("form", [{"type": "item_reference"}, {}])
@both
def test_references_stand_for_the_items_that_were_given(
    sdk: openai.OpenAI, says: Callable[..., None], engine: ScriptedEngine,  # noqa: F811
    is_streaming: bool, form: dict[str, str],
) -> None:  # fmt: skip
    says(call("find_city", city="Oslo").replace("</think>", "ask</think>Let me see."))
    response = create(sdk, is_streaming, tools=[FIND])
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    result = {"type": "function_call_output", "call_id": response.output[-1].call_id, "output": "4 C"}
    whole: Any = [USER, *(item.to_dict() for item in response.output), result]
    create(sdk, False, tools=[FIND], input=whole)
    referred: Any = [USER, *({**form, "id": item.id} for item in response.output), result]
    create(sdk, False, tools=[FIND], input=referred)
    assert engine.requests[-1].token_ids == engine.requests[-2].token_ids


def test_a_reference_is_good_for_its_own_key_only(client: TestClient) -> None:
    def ask(key: str, **fields: Any) -> Any:
        return client.post("/v1/responses", json=fields, headers={"Authorization": f"Bearer {key}"})

    item_id = ask("a", input="x").json()["output"][0]["id"]
    items = [USER, {"type": "item_reference", "id": item_id}, USER]
    assert ask("a", input=items).status_code == 200
    for key in ("b", "", "aa"):
        error = ask(key, input=items).json()["error"]
        assert error["param"] == "input[1].id"
        assert item_id in error["message"]


@pytest.mark.parametrize(
    "asked", [{"summary": "auto"}, {"summary": "detailed"}, {"generate_summary": "concise"}]
)
def test_a_summary_is_told_where_it_is_asked_for(sdk: openai.OpenAI, asked: Any) -> None:  # noqa: F811
    events: list[Any] = list(
        sdk.responses.create(model="z-ai/glm-5.2", input="x", reasoning=asked, stream=True)
    )
    kinds = [event.type.removeprefix("response.reasoning_summary_") for event in events]
    told = [kind for kind in kinds if not kind.startswith("response.")]
    assert told[0] == "part.added"
    assert told[-2:] == ["text.done", "part.done"]
    assert set(told[1:-2]) == {"text.delta"}
    deltas = [event.delta for event in events if event.type == "response.reasoning_summary_text.delta"]
    assert "".join(deltas) == "hm"
    thought = events[-1].response.output[0]
    assert [part.text for part in thought.summary] == [part.text for part in thought.content] == ["hm"]
    plain = sdk.responses.create(model="z-ai/glm-5.2", input="x").output[0]
    assert plain.summary == []  # type: ignore[union-attr]


@pytest.mark.parametrize("base", ["/v1", "/api/v1", ""])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/responses/compact"),
        ("POST", "/responses/input_tokens"),
        ("DELETE", "/responses/resp_1"),
        ("POST", "/responses/resp_1/cancel"),
        ("GET", "/responses/resp_1/input_items"),
        ("PUT", "/models/gpt-9"),
        ("DELETE", "/models/ft:gpt-9:me"),
        ("POST", "/model/gpt-9"),
        ("POST", "/models/gpt-9/endpoints"),
    ],
)
def test_where_nothing_is_every_method_is_404(client: TestClient, base: str, method: str, path: str) -> None:
    response = client.request(method, base + path, json={})
    assert response.status_code == response.json()["error"]["code"] == 404


@pytest.mark.parametrize("path", ["/models/z-ai/glm-5.2", "/model/z-ai/glm-5.2", "/models/glm-5.2/endpoints"])
def test_what_is_there_is_still_405(client: TestClient, path: str) -> None:
    assert client.delete(f"/v1{path}").status_code == 405
    assert client.get("/v1/responses").status_code == 405


@pytest.mark.parametrize(
    ("arguments", "text"),
    [('{"input": "cut', "cut"), ('{"input": "a\\n', "a\n"), ('{"input": ', ""), ("{", "")],
)
def test_the_input_of_a_call_that_was_cut_is_what_there_is(arguments: str, text: str) -> None:
    assert custom_input(arguments) == text

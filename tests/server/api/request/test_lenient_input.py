"""Small liberties that clients take with JSON, HTTP and empty values are understood."""

import json
from typing import Any

import anthropic
import httpx
import pytest
from starlette.testclient import TestClient

from server.glm.tokenizer import Tokenizer
from tests.server.api.scripted import ScriptedEngine

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hello"}
CHAT_BODY: dict[str, Any] = {"messages": [USER]}
BODIES: dict[str, dict[str, Any]] = {
    "/chat/completions": CHAT_BODY,
    "/completions": {"prompt": "hello"},
    "/messages": {"model": "z-ai/glm-5.2", "messages": [USER], "max_tokens": 9},
    "/responses": {"input": "hello"},
}


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/chat/completions", {"max_tokens": 3.0, "top_k": 5.0, "seed": 1e3, "n": 1.0}),
        ("/chat/completions", {"max_completion_tokens": 3.0, "logprobs": True, "top_logprobs": 2.0}),
        ("/chat/completions", {"reasoning": {"max_tokens": 64.0}, "max_tokens": 30e-1}),
        ("/completions", {"max_tokens": 3.0, "logprobs": 1.0, "best_of": 1.0}),
        ("/messages", {"max_tokens": 3.0, "top_k": -1.0}),
        ("/messages", {"max_tokens": 3, "thinking": {"type": "enabled", "budget_tokens": 2e3}}),
        ("/responses", {"max_output_tokens": 3.0, "top_logprobs": 0.0, "seed": -4.0}),
    ],
)
def test_whole_numbers_may_have_a_point(
    client: TestClient, engine: ScriptedEngine, path: str, fields: dict[str, Any]
) -> None:
    response = client.post(f"/v1{path}", json=BODIES[path] | fields)
    assert response.status_code == 200, response.text
    request = engine.requests[-1]
    assert request.max_tokens == 3
    assert type(request.max_tokens) is type(request.sampling.top_k) is int
    for name in fields.keys() & {"max_tokens", "top_k", "seed", "max_output_tokens"}:
        assert client.post(f"/v1{path}", json=BODIES[path] | {name: 2.5}).status_code == 400
        assert client.post(f"/v1{path}", json=BODIES[path] | {name: True}).status_code == 400


@pytest.mark.parametrize("prompt", [[5.0, 6, 7.0], [[5.0, 6], [7, 8]], [[5, 6.0]]])
def test_token_ids_may_have_a_point(client: TestClient, engine: ScriptedEngine, prompt: Any) -> None:
    assert client.post("/v1/completions", json={"prompt": prompt}).status_code == 200
    assert all(type(one) is int for request in engine.requests for one in request.token_ids)
    assert client.post("/v1/completions", json={"prompt": [5.5]}).status_code == 400
    assert client.post("/detokenize", json={"tokens": [71.0, 76, 72.0]}).json()["content"]


@pytest.mark.parametrize("path", BODIES)
def test_a_body_may_begin_with_a_mark(client: TestClient, path: str) -> None:
    body = json.dumps(BODIES[path]).encode("utf-8-sig")
    assert client.post(f"/v1{path}", content=body).status_code == 200


@pytest.mark.parametrize("coding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-be"])
def test_a_mark_says_the_coding_of_the_body(client: TestClient, coding: str) -> None:
    mark = b"" if coding in ("utf-16", "utf-32") else "\ufeff".encode(coding)
    body = mark + json.dumps(CHAT_BODY).encode(coding)
    assert client.post(CHAT, content=body).status_code == 200
    assert client.post(CHAT, content=body[:-1]).status_code == 400


def test_blanks_may_stand_before_a_mark(client: TestClient) -> None:
    body = json.dumps(CHAT_BODY).encode("utf-8-sig")
    assert client.post(CHAT, content=b" \r\n" + body + b"\n").status_code == 200


@pytest.mark.parametrize("path", ["//v1/models", "/v1//models//", "//api/v1/models/user", "///health"])
def test_slashes_in_a_row_are_one(base_url: str, path: str) -> None:
    response = httpx.get(base_url + path, follow_redirects=False)
    assert response.status_code == 200
    assert "location" not in response.headers


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf\xef\xbb\xbf", b"\xef\xbb", b"\xff\xfe", b"\x00"])
def test_other_marks_are_no_json(client: TestClient, mark: bytes) -> None:
    assert client.post(CHAT, content=mark + json.dumps(CHAT_BODY).encode()).status_code == 400


@pytest.mark.parametrize("coding", ["Identity", "IDENTITY", " identity ", "identity, Identity", ""])
def test_codings_have_no_case(client: TestClient, coding: str) -> None:
    assert client.post(CHAT, json=CHAT_BODY, headers={"Content-Encoding": coding}).status_code == 200


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "identity, br"])
def test_other_codings_are_still_refused(client: TestClient, coding: str) -> None:
    assert client.post(CHAT, json=CHAT_BODY, headers={"Content-Encoding": coding}).status_code == 415


@pytest.mark.parametrize(
    "path",
    [
        "/health",
        "/v1/models",
        "/api/v1/models",
        "/models/z-ai/glm-5.2",
        "/v1/models/user",
        "/metrics",
        "/key",
    ],
)
def test_head_is_get_without_a_body(client: TestClient, path: str) -> None:
    got, head = client.get(path), client.head(path)
    assert head.status_code == got.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == got.headers["content-type"]
    assert client.head("/v1/models/gpt-9").status_code == 404
    assert client.head(CHAT).status_code == 405


def test_head_over_a_socket_keeps_the_connection(base_url: str) -> None:
    with httpx.Client(base_url=base_url) as http:
        for path in ("/health", "/v1/models", "/api/v1/models"):
            assert http.head(path).status_code == 200
            assert http.get(path).json()


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PIXEL = "data:image/png;base64,AA=="


def chat_result(content: Any) -> dict[str, Any]:
    result = {"role": "tool", "tool_call_id": "c"} | ({} if content is ... else {"content": content})
    return {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, result]}


def anthropic_result(content: Any) -> dict[str, Any]:
    result = {"type": "tool_result", "tool_use_id": "c"} | ({} if content is ... else {"content": content})
    called = {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]}
    return BODIES["/messages"] | {"messages": [USER, called, {"role": "user", "content": [result]}]}


def response_result(content: Any) -> dict[str, Any]:
    result = {"type": "function_call_output", "call_id": "c"} | (
        {} if content is ... else {"output": content}
    )
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    return {"input": [{"role": "user", "content": "hello"}, call, result]}


RESULTS = [
    ("/chat/completions", chat_result),
    ("/messages", anthropic_result),
    ("/responses", response_result),
]


@pytest.mark.parametrize(("path", "make"), RESULTS)
@pytest.mark.parametrize("content", [None, ..., "", [], [{"type": "text", "text": None}]])
def test_a_result_may_be_empty(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer, path: str, make: Any, content: Any
) -> None:
    response = client.post(f"/v1{path}", json=make(content))
    assert response.status_code == 200, response.text
    assert "<tool_response></tool_response>" in tokenizer.decode(engine.requests[-1].token_ids)


@pytest.mark.parametrize(
    ("path", "make", "part", "said", "read"),
    [
        ("/chat/completions", chat_result, {"type": "image_url", "image_url": {"url": PIXEL}},
         "messages[2].content[1].image_url", "[image left out: this model reads text]"),
        ("/chat/completions", chat_result, {"type": "input_audio", "input_audio": {}},
         "messages[2].content[1].input_audio", "[audio left out: this model reads text]"),
        ("/messages", anthropic_result, {"type": "image", "source": {"type": "url", "url": "x"}},
         "messages[2].content[0].content[1].image", "[image left out: this model reads text]"),
        ("/messages", anthropic_result, {"type": "document", "source": {}},
         "messages[2].content[0].content[1].document", "[document left out: this model reads text]"),
        ("/messages", anthropic_result, {"type": "tool_reference", "tool_name": "get_weather"},
         "messages[2].content[0].content[1].tool_reference", "[tool: get_weather]"),
        ("/responses", response_result, {"type": "input_image", "image_url": PIXEL},
         "input[2].output[1].input_image", "[image left out: this model reads text]"),
        ("/responses", response_result, {"type": "input_file", "file_id": "x"},
         "input[2].output[1].input_file", "[file left out: this model reads text]"),
    ],
)  # fmt: skip
def test_what_a_tool_gave_beside_text_has_a_placeholder(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer,
    path: str, make: Any, part: dict[str, Any], said: str, read: str,
) -> None:  # fmt: skip
    response = client.post(f"/v1{path}", json=make([{"type": "text", "text": "4 C "}, part]))
    assert response.status_code == 200, response.text
    assert response.headers["x-glmserve-ignored"] == said
    assert f"<tool_response>4 C {read}</tool_response>" in tokenizer.decode(engine.requests[-1].token_ids)


@pytest.mark.parametrize("fields", [{"input": []}, {"input": ""}, {"input": [], "instructions": "S"}])
def test_an_empty_input_is_an_empty_turn(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer, fields: dict[str, Any]
) -> None:
    response = client.post("/v1/responses", json=fields)
    assert response.status_code == 200, response.text
    assert "<|user|><|assistant|>" in tokenizer.decode(engine.requests[-1].token_ids)


def test_anthropics_newer_keys_are_there(base_url: str, client: TestClient) -> None:
    usage = client.post("/v1/messages", json=BODIES["/messages"]).json()["usage"]
    assert usage["cache_creation"] == {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0}
    assert usage["service_tier"] == "standard"
    assert {"server_tool_use", "inference_geo"} <= usage.keys()
    with anthropic.Anthropic(base_url=base_url, api_key="none", max_retries=0) as sdk:
        message = sdk.messages.create(
            model="z-ai/glm-5.2", max_tokens=99, messages=[{"role": "user", "content": "x"}],
            thinking={"type": "enabled", "budget_tokens": 1024},
        )  # fmt: skip
        assert message.usage.output_tokens_details
        assert message.usage.output_tokens_details.thinking_tokens == 2
        for model in (sdk.models.list().data[0], sdk.models.retrieve("z-ai/glm-5.2")):
            assert (model.type, model.lifecycle) == ("model", "active")
            assert model.display_name == "z-ai/glm-5.2 (local)"
            assert model.created_at.year >= 2025
        assert not sdk.models.list().has_more


@pytest.mark.parametrize(
    ("role", "part", "said"),
    [
        ("assistant", {"type": "refusal", "refusal": "No."}, "No."),
        ("assistant", {"type": "output_text", "text": "No.", "annotations": []}, "No."),
        ("user", {"type": "input_text", "text": "Why?"}, "Why?"),
        ("tool", {"type": "output_text", "text": "4 C"}, "4 C"),
    ],
)
def test_text_is_text_by_its_names_in_other_dialects(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer,
    role: str, part: dict[str, Any], said: str,
) -> None:  # fmt: skip
    messages = [USER, {"role": role, "content": [part], "tool_call_id": "c"}, USER]
    response = client.post(CHAT, json={"messages": messages})
    assert response.status_code == 200, response.text
    assert said in tokenizer.decode(engine.requests[-1].token_ids)
    assert "x-glmserve-ignored" not in response.headers


def test_images_beside_the_content_are_refused(client: TestClient) -> None:
    response = client.post(CHAT, json={"messages": [USER | {"images": ["aGVsbG8="]}]})
    assert response.json()["error"]["param"] == "messages[0].images"
    assert client.post(CHAT, json={"messages": [USER | {"images": []}]}).status_code == 200


HOSTED_BLOCKS: list[dict[str, Any]] = [
    {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}},
    {"type": "web_search_tool_result", "tool_use_id": "s", "content": [{"type": "web_search_result"}]},
    {"type": "web_fetch_tool_result", "tool_use_id": "s", "content": {"type": "web_fetch_result"}},
    {"type": "bash_code_execution_tool_result", "tool_use_id": "s", "content": {"stdout": "x"}},
    {"type": "mcp_tool_use", "id": "m", "name": "n", "input": {}, "server_name": "s"},
    {"type": "mcp_tool_result", "tool_use_id": "m", "content": [{"type": "text", "text": "x"}]},
]


@pytest.mark.parametrize("block", HOSTED_BLOCKS, ids=lambda block: str(block["type"]))
def test_anthropics_own_tools_in_the_history_are_ignored_and_said(
    client: TestClient, engine: ScriptedEngine, block: dict[str, Any]
) -> None:
    text = {"type": "text", "text": "Found."}
    for blocks in ([block, text], [text]):
        talk = [USER, {"role": "assistant", "content": blocks}, USER]
        response = client.post("/v1/messages", json=BODIES["/messages"] | {"messages": talk})
        assert response.status_code == 200, response.text
        said = f"messages[1].content[0].{block['type']}" if len(blocks) == 2 else None
        assert response.headers.get("x-glmserve-ignored") == said
    assert engine.requests[-1].token_ids == engine.requests[-2].token_ids


@pytest.mark.parametrize("sealed", ["gAAAAABo_-z9", "gAAAAABo/+z9", "_w", "gP-A"])
def test_a_thought_that_another_server_sealed_is_ignored_and_said(
    client: TestClient, engine: ScriptedEngine, sealed: str
) -> None:
    item: dict[str, Any] = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": sealed}
    answer: dict[str, Any] = {"role": "assistant", "content": "Hi"}
    for items in ([item, answer], [item | {"encrypted_content": None}, answer]):
        body = {"input": [{"role": "user", "content": "hello"}, *items, {"role": "user", "content": "And?"}]}
        response = client.post("/v1/responses", json=body)
        assert response.status_code == 200, response.text
        said = None if items[0]["encrypted_content"] is None else "input[1].encrypted_content"
        assert response.headers.get("x-glmserve-ignored") == said
    assert engine.requests[-1].token_ids == engine.requests[-2].token_ids

"""Chat completions: what clients get, whole and in a stream."""

import json
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.api.app import make_app
from server.api.request.model_names import ModelNames
from server.api.service import Dialect, Service
from server.glm.tokenizer import Tokenizer
from server.link.messages import Sampling
from tests.server.api.scripted import ScriptedEngine

HELLO = {"messages": [{"role": "user", "content": "hello"}]}
PATHS = ["/v1/chat/completions", "/api/v1/chat/completions", "/chat/completions"]


def ask(client: TestClient, path: str = PATHS[0], **fields: Any) -> dict[str, Any]:
    response = client.post(path, json=HELLO | fields)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def stream(client: TestClient, path: str = PATHS[0], **fields: Any) -> list[dict[str, Any]]:
    response = client.post(path, json=HELLO | {"stream": True} | fields)
    assert response.status_code == 200, response.text
    assert "id:" not in response.text.replace('"id":', "")
    assert "event:" not in response.text
    lines = [line for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def joined(chunks: list[dict[str, Any]], field: str) -> str:
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get(field, "") for delta in deltas)


@pytest.mark.parametrize("path", PATHS)
def test_a_whole_answer_has_thought_and_content_apart(client: TestClient, path: str) -> None:
    result = ask(client, path)
    [choice] = result["choices"]
    assert choice["message"]["content"] == "Hi Ærø 👋!"
    assert choice["message"]["reasoning"] == choice["message"]["reasoning_content"] == "hm"
    assert choice["message"]["reasoning_details"][0]["text"] == "hm"
    assert "tool_calls" not in choice["message"]
    assert (choice["finish_reason"], choice["native_finish_reason"]) == ("stop", "stop")
    assert result["object"] == "chat.completion"
    assert result["id"].startswith("gen-")
    assert result["provider"] == "glmserve"
    assert result["system_fingerprint"].startswith("glmserve-")


def test_usage_adds_up_and_counts_the_thought(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    usage = ask(client)["usage"]
    assert usage["prompt_tokens"] == len(engine.requests[0].token_ids)
    assert usage["completion_tokens"] == len(engine.script)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == len(tokenizer.encode("hm"))
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_says_the_same_as_the_whole_answer(client: TestClient, path: str) -> None:
    chunks = stream(client, path)
    assert joined(chunks, "content") == "Hi Ærø 👋!"
    assert joined(chunks, "reasoning") == joined(chunks, "reasoning_content") == "hm"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


def test_every_chunk_keeps_the_rules_that_clients_check(client: TestClient) -> None:
    chunks = stream(client, PATHS[1])
    for chunk in chunks:
        assert chunk["object"] == "chat.completion.chunk"
        assert {"id", "provider", "model", "created", "system_fingerprint", "choices"} <= chunk.keys()
        assert None not in chunk.values()
        for choice in chunk["choices"]:
            assert "finish_reason" in choice
            assert None not in choice["delta"].values()
    assert len({chunk["id"] for chunk in chunks}) == 1
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]


@pytest.mark.parametrize(
    ("path", "options", "expected"),
    [
        (PATHS[0], {}, False),
        (PATHS[0], {"stream_options": {"include_usage": True}}, True),
        (PATHS[1], {}, True),
    ],
)
def test_usage_ends_a_stream_when_asked_for_and_always_on_the_openrouter_path(
    client: TestClient, path: str, options: dict[str, Any], expected: bool
) -> None:
    chunks = stream(client, path, **options)
    assert (chunks[-1]["choices"] == []) == expected
    assert [("usage" in chunk) for chunk in chunks] == [False] * (len(chunks) - 1) + [expected]


def test_the_generation_id_is_in_the_headers_too(client: TestClient) -> None:
    whole = client.post(PATHS[0], json=HELLO)
    assert whole.headers["x-generation-id"] == whole.json()["id"]
    assert client.post(PATHS[0], json=HELLO | {"stream": True}).headers["x-generation-id"].startswith("gen-")


def test_parameters_reach_the_engine(client: TestClient, engine: ScriptedEngine) -> None:
    ask(
        client,
        temperature=0,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        seed=-5,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias={"7": -100},
        max_tokens=5,
        logprobs=True,
        top_logprobs=2,
    )
    [request] = engine.requests
    assert request.sampling == Sampling(0, 0.5, 3, 0.1, 1.1, 0.2, 0.3, ((7, -100.0),), -5)
    assert (request.max_tokens, request.num_top_logprobs) == (5, 2)


def test_what_is_absent_or_null_gets_the_checkpoints_defaults(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    ask(client, temperature=None, top_k=None, stop=None, tools=None, max_tokens=None)
    [request] = engine.requests
    assert request.sampling == Sampling(temperature=0.7, top_p=0.9)
    assert request.max_tokens == engine.context_length - len(request.token_ids)
    assert request.stop_token_ids == tokenizer.eos_token_ids


def test_max_completion_tokens_wins_and_length_is_the_reason(client: TestClient) -> None:
    result = ask(client, max_completion_tokens=2, max_tokens=100)
    assert result["choices"][0]["finish_reason"] == "length"
    assert result["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("stop", ["Ærø", ["xyz", "Ærø"], ["rø 👋", "Ærø"]])
def test_a_stop_string_ends_the_answer_before_itself_and_cancels(
    client: TestClient, engine: ScriptedEngine, stop: Any
) -> None:
    result = ask(client, stop=stop)
    assert result["choices"][0]["message"]["content"] == "Hi "
    assert result["choices"][0]["finish_reason"] == "stop"
    assert joined(stream(client, stop=stop), "content") == "Hi "
    assert engine.cancelled == [request.request_id for request in engine.requests]


def test_stop_strings_do_not_cut_a_thought(client: TestClient) -> None:
    assert ask(client, stop="m")["choices"][0]["message"]["reasoning"] == "hm"


def test_log_probabilities_carry_bytes_that_join_to_the_text(client: TestClient) -> None:
    content = ask(client, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "Hi Ærø 👋!"
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert {"token", "logprob", "bytes"} == content[0]["top_logprobs"][0].keys()
    streamed = [
        entry
        for chunk in stream(client, logprobs=True, top_logprobs=2)
        for choice in chunk["choices"]
        if choice["logprobs"]
        for entry in choice["logprobs"]["content"]
    ]
    assert streamed == content


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "<|system|>Reasoning Effort: Max<|user|>hello<|assistant|><think>"),
        ({"reasoning_effort": "low"}, "<|system|>Reasoning Effort: High<|user|>hello<|assistant|><think>"),
        (
            {"reasoning": {"effort": "xhigh"}},
            "<|system|>Reasoning Effort: Max<|user|>hello<|assistant|><think>",
        ),
        ({"reasoning": {"effort": "none"}}, "<|user|>hello<|assistant|><think></think>"),
        ({"reasoning": {"enabled": False}}, "<|user|>hello<|assistant|><think></think>"),
        ({"thinking": {"type": "disabled"}}, "<|user|>hello<|assistant|><think></think>"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "<|user|>hello<|assistant|><think></think>"),
    ],
)
def test_effort_and_thinking_shape_the_prompt(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer, fields: dict[str, Any], expected: str
) -> None:
    ask(client, **fields)
    assert tokenizer.decode(engine.requests[0].token_ids) == "[gMASK]<sop>" + expected


def test_without_thinking_the_answer_is_content_from_the_first_token(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    engine.script = tokenizer.encode("Hi<|user|>")
    message = ask(client, reasoning={"enabled": False})["choices"][0]["message"]
    assert message["content"] == "Hi"
    assert "reasoning" not in message


@pytest.mark.parametrize("fields", [{"include_reasoning": False}, {"reasoning": {"exclude": True}}])
def test_the_thought_can_be_left_out_of_the_answer(client: TestClient, fields: dict[str, Any]) -> None:
    assert "reasoning" not in ask(client, **fields)["choices"][0]["message"]
    assert joined(stream(client, **fields), "reasoning") == ""


def test_a_conversation_with_tools_is_rendered(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    function = {"name": "weather", "description": "d", "parameters": {"type": "object"}}
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Oslo"}'}}
    messages = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "terse"}],
        },
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": None, "reasoning": "look", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "4 C"},
    ]
    ask(client, messages=messages, tools=[{"type": "function", "function": function}], tool_choice="auto")
    text = tokenizer.decode(engine.requests[0].token_ids)
    assert '{"name": "weather", "description": "d", "parameters": {"type": "object"}}\n</tools>' in text
    assert text.endswith(
        "<|system|>Be terse<|user|>weather?<|assistant|><think>look</think><tool_call>weather<arg_key>city"
        "</arg_key><arg_value>Oslo</arg_value></tool_call><|observation|><tool_response>4 C</tool_response>"
        "<|assistant|><think>"
    )


def test_a_failure_in_mid_stream_is_one_error_chunk(client: TestClient, engine: ScriptedEngine) -> None:
    engine.fails_after = 3
    text = client.post(PATHS[0], json=HELLO | {"stream": True}).text
    chunk = json.loads(text.split("data: ")[-1])
    assert "[DONE]" not in text
    assert chunk["error"]["code"] == 502
    assert chunk["error"]["metadata"]["error_type"] == "provider_unavailable"
    assert chunk["choices"][0]["finish_reason"] == "error"


@pytest.mark.parametrize(
    ("failure", "status"), [("engine", 500), ("disk", 502), ("died", 503), ("request", 400)]
)
def test_a_failure_before_a_whole_answer_is_a_status(
    client: TestClient, engine: ScriptedEngine, failure: Any, status: int
) -> None:
    engine.fails_after, engine.failure = 0, failure
    response = client.post(PATHS[0], json=HELLO)
    assert response.status_code == response.json()["error"]["code"] == status
    assert ("retry-after" in response.headers) == (status in (502, 503))


def test_requests_while_the_model_loads_are_told_to_come_back(
    client: TestClient, engine: ScriptedEngine
) -> None:
    engine.ready = False
    response = client.post(PATHS[0], json=HELLO)
    assert response.status_code == 503
    assert "25%" in response.json()["error"]["message"]
    health = client.get("/health")
    assert (health.status_code, health.json()["progress"]) == (503, 0.25)
    engine.ready = True
    assert client.get("/health").status_code == 200


def test_the_served_name_is_in_the_answer_and_in_the_list(engine: ScriptedEngine, dialect: Dialect) -> None:
    client = TestClient(make_app(Service(engine, dialect, ModelNames("my/model"))))
    assert ask(client, model="my/model")["model"] == "my/model"
    listed = client.get("/api/v1/models").json()
    assert [listed["data"][0]["id"], listed["models"][0]["id"], listed["total_count"]] == ["my/model"] * 2 + [
        1
    ]
    assert client.get("/v1/models/my/model").json()["context_length"] == 4096
    assert client.get("/v1/models/other").status_code == 404


def test_rows_of_the_embedding_beyond_the_vocabulary_are_no_text(
    service: Service, engine: ScriptedEngine
) -> None:
    engine.script = [400, *engine.script]
    client = TestClient(make_app(replace(service)))
    assert ask(client)["choices"][0]["message"]["reasoning"] == "hm"

"""Text completions, as evaluation harnesses use them."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.glm.tokenizer import Tokenizer
from tests.server.api.scripted import ScriptedEngine

PATH = "/v1/completions"


def ask(client: TestClient, **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, json=fields)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


@pytest.mark.parametrize("form", ["text", "texts", "ids", "id lists"])
def test_all_four_forms_of_prompt_reach_the_engine(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer, form: str
) -> None:
    ids = tokenizer.encode("hello")
    prompt: Any = {"text": "hello", "texts": ["hello", "hello"], "ids": ids, "id lists": [ids, ids]}[form]
    result = ask(client, prompt=prompt, max_tokens=3)
    num = 2 if form in ("texts", "id lists") else 1
    assert [list(request.token_ids) for request in engine.requests] == [ids] * num
    assert [choice["index"] for choice in result["choices"]] == list(range(num))
    assert result["usage"]["prompt_tokens"] == num * len(ids)
    assert result["object"] == "text_completion"


def test_text_is_raw_and_stops_where_it_should(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    engine.script = tokenizer.encode("a</think>b STOP c")
    assert ask(client, prompt="<think>")["choices"][0]["text"] == "a</think>b STOP c"
    choice = ask(client, prompt="x", stop=["STOP"])["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("a</think>b ", "stop")


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_prompt_is_scored_as_a_harness_reads_it(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer, max_tokens: int
) -> None:
    ids = tokenizer.encode("the quick brown fox")
    result = ask(client, prompt=ids, max_tokens=max_tokens, echo=True, logprobs=1, temperature=0, seed=1)
    [choice] = result["choices"]
    logprobs = choice["logprobs"]
    assert engine.requests[0].score_prompt
    assert choice["text"] == "the quick brown fox" + tokenizer.decode(engine.script[:max_tokens])
    assert len(logprobs["tokens"]) == len(ids) + max_tokens
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    for value, top in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert value == max(top.values())
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)


def test_offsets_count_characters_and_not_their_tokens(client: TestClient, tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("👋")) > 1
    fields = {"prompt": "👋x", "max_tokens": 2, "echo": True, "logprobs": 0}
    [choice] = ask(client, **fields)["choices"]
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert offsets[tokens.index("x")] == choice["text"].index("x")
    text = client.post(PATH, json=fields | {"stream": True}).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [offset for one in streamed if one for offset in one["text_offset"]] == offsets


def test_without_logprobs_an_echo_scores_nothing(client: TestClient, engine: ScriptedEngine) -> None:
    choice = ask(client, prompt="hello", max_tokens=1, echo=True)["choices"][0]
    assert choice["text"].startswith("hello")
    assert choice["logprobs"] is None
    assert not engine.requests[0].score_prompt


def test_a_stream_joins_to_the_whole(client: TestClient) -> None:
    fields = {"prompt": ["hello", "there"], "max_tokens": 6, "echo": True, "logprobs": 2}
    whole = ask(client, **fields)["choices"]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    text = client.post(PATH, json=fields | options).text
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert chunks[-1]["usage"]["completion_tokens"] == 12
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for expected in whole:
        mine = [choice for choice in choices if choice["index"] == expected["index"]]
        assert "".join(choice["text"] for choice in mine) == expected["text"]
        assert mine[-1]["finish_reason"] == expected["finish_reason"]
        for name, values in expected["logprobs"].items():
            streamed = [item for choice in mine if choice["logprobs"] for item in choice["logprobs"][name]]
            assert streamed == values


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, None),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [320]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "best_of": 2}, None),
        ({"prompt": "a", "suffix": "b"}, None),
    ],
)
def test_bad_prompts_are_refused_by_name(
    client: TestClient, fields: dict[str, Any], param: str | None
) -> None:
    response = client.post(PATH, json=fields)
    assert response.status_code == 400
    assert (response.json()["error"]["param"] or "").startswith(param or "")

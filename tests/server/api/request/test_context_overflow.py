"""A prompt that is too long is told in the words and the code that each dialect's clients search for."""

from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from server.api.request.turns import Presence
from server.api.service import Service
from server.glm.pieces import Check
from tests.server.api.scripted import ScriptedEngine

WORDS = "word " * 5000
CONTEXT = 4096


def bodies(text: str) -> dict[str, dict[str, Any]]:
    return {
        "/chat/completions": {"messages": [{"role": "user", "content": text}]},
        "/completions": {"prompt": text},
        "/responses": {"input": text},
    }


PARAMS = {"/chat/completions": "messages", "/completions": "prompt", "/responses": "input"}
LIMITS = {
    "/chat/completions": "max_completion_tokens",
    "/completions": "max_tokens",
    "/responses": "max_output_tokens",
}


@pytest.mark.parametrize("base", ["/v1", ""])
@pytest.mark.parametrize("path", PARAMS)
@pytest.mark.parametrize("is_streaming", [False, True])
@pytest.mark.parametrize("limit", [None, 7, CONTEXT - 1])
def test_under_v1_in_openais_words_and_code(
    client: TestClient, base: str, path: str, is_streaming: bool, limit: int | None
) -> None:
    text = WORDS if limit != CONTEXT - 1 else "word"
    body = bodies(text)[path] | {"stream": is_streaming, LIMITS[path]: limit}
    response = client.post(base + path, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["type"] == "invalid_request_error"
    assert error["param"] == PARAMS[path]
    assert error["message"].startswith(f"This model's maximum context length is {CONTEXT} tokens. However, ")
    assert error["metadata"]["error_type"] == "context_length_exceeded"


@pytest.mark.parametrize("path", PARAMS)
@pytest.mark.parametrize("is_streaming", [False, True])
def test_under_api_v1_as_openrouter_says_it(client: TestClient, path: str, is_streaming: bool) -> None:
    response = client.post(f"/api/v1{path}", json=bodies(WORDS)[path] | {"stream": is_streaming})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, 400, PARAMS[path])
    assert error["message"].startswith(f"This endpoint's maximum context length is {CONTEXT} tokens. However")
    assert error["type"] == "context_length_exceeded"


@pytest.mark.parametrize("base", ["/v1", "/api/v1", ""])
def test_in_messages_as_anthropic_says_it(client: TestClient, base: str) -> None:
    body = {"model": "z-ai/glm-5.2", "messages": [{"role": "user", "content": WORDS}], "max_tokens": 5}
    response = client.post(f"{base}/messages", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert response.json()["error"]["message"].startswith("prompt is too long: ")


@pytest.mark.parametrize("path", PARAMS)
def test_openai_python_knows_the_code(base_url: str, engine: ScriptedEngine, path: str) -> None:
    with (
        openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as sdk,
        pytest.raises(openai.BadRequestError) as caught,
    ):
        sdk.post(path, cast_to=object, body=bodies(WORDS)[path])
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == PARAMS[path]


@pytest.mark.parametrize("path", PARAMS)
@pytest.mark.parametrize("limit", [CONTEXT, CONTEXT + 1, 131_072, float(CONTEXT), 2**31 - 1])
def test_a_limit_of_the_whole_context_is_cut(
    client: TestClient, engine: ScriptedEngine, path: str, limit: float
) -> None:
    response = client.post(f"/v1{path}", json=bodies("hello")[path] | {LIMITS[path]: limit})
    assert response.status_code == 200, response.text
    request = engine.requests[-1]
    assert request.max_tokens == CONTEXT - len(request.token_ids)


@pytest.mark.parametrize("unit", ["word ", "<think>", "it is. ", "1 + 1 = 2\n"])
@pytest.mark.parametrize("path", [*PARAMS, "/messages"])
def test_no_more_of_a_text_is_encoded_than_the_context_holds(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, unit: str
) -> None:
    """A chat of 7.9 MB was encoded whole, for ten seconds and with 300 MB, before it was refused."""
    seen: list[int] = []
    make_check = Service.check_length

    def note(self: Service, wanted: Presence, limit: int | None) -> Check:
        check = make_check(self, wanted, limit)

        def noting(num_ids: int) -> None:
            seen.append(num_ids)
            check(num_ids)

        return noting

    monkeypatch.setattr(Service, "check_length", note)
    fields = bodies(unit * 400_000)
    fields["/messages"] = fields["/chat/completions"] | {"max_tokens": 9, "model": "glm"}
    response = client.post("/v1" + path, json=fields[path])
    assert response.status_code == 400
    assert CONTEXT < max(seen) < 40_000, "of 100,000 at least"

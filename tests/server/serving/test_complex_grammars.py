"""Grammars beyond what llguidance follows: an error for their own request, in a few words."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLParserLimits
from starlette.testclient import TestClient

from server.api.app import make_app
from server.api.request.model_names import ModelNames
from server.api.service import Dialect, Service
from server.glm.templates.template import ChatTemplate
from server.glm.tokenizer import Tokenizer
from tests.server.in_process import random_engine
from tests.server.serving.test_constraints import TEMPLATE

# After the first "a" thousands of rules may go on; llguidance follows 2,000 at a time.
WIDE = "\n".join(
    [
        f"start: {' | '.join(f'x{index}' for index in range(1500))}",
        *(f'x{index}: "a" y{index}\ny{index}: "b" x{index} | "c"' for index in range(1500)),
    ]
)
DEEP = "start: /(.*a.{30}b.*)&(.*c.{30}d.*)/"


@pytest.fixture(scope="module")
def client(tokenizer: Tokenizer, tokenizer_folder: Path) -> Iterator[TestClient]:
    dialect = Dialect(tokenizer, ChatTemplate(TEMPLATE, "test"))
    with random_engine(tokenizer_folder) as engine:
        yield TestClient(make_app(Service(engine, dialect, ModelNames("z-ai/glm-5.2"))))


@pytest.mark.parametrize(
    ("grammar", "limits", "reason"),
    [
        (WIDE, {}, "max is 2000"),
        (DEEP, {"max_lexer_states": 100}, "too many states"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_proves_too_complex_ends_in_an_error_and_not_as_an_answer(
    client: TestClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    grammar: str,
    limits: dict[str, Any],
    reason: str,
    stream: bool,
) -> None:
    monkeypatch.setattr("server.engine.decode.token_masks.parser_limits", lambda: LLParserLimits(**limits))
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "stream": stream}
    body |= {"reasoning": {"enabled": False}, "response_format": {"type": "grammar", "grammar": grammar}}
    response = client.post("/v1/chat/completions", json=body)
    if stream:
        error = json.loads(response.text.rstrip().rpartition("data: ")[2])["error"]
    else:
        assert response.status_code == 400
        error = response.json()["error"]
    assert (error["code"], error["metadata"]["error_type"]) == (400, "invalid_request")
    assert "too complex" in error["message"]
    assert reason in error["message"]
    assert "<state>" not in error["message"]
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
    monkeypatch.undo()
    body["response_format"]["grammar"] = 'start: "yes"'
    answer = client.post("/v1/chat/completions", json=body | {"stream": False}).json()
    assert answer["choices"][0]["message"]["content"] == "yes"


def test_what_is_wrong_with_a_grammar_is_told_without_the_state_of_its_parser(client: TestClient) -> None:
    grammar = "start: A\nA: /.*a.{30}/ & /.*b.{30}/ & ~/.*c.{30}/\n"
    form = {"type": "grammar", "grammar": grammar}
    body = {"messages": [{"role": "user", "content": "x"}], "response_format": form}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert message.startswith("the grammar cannot be followed: ")
    assert len(message.splitlines()) == 1

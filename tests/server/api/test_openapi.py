"""What the OpenAPI document promises is kept, whatever schemathesis sends."""

from typing import Any

import hypothesis
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.api.app import make_app
from server.api.openapi import BASES, BODIES
from server.api.request.model_names import ModelNames
from server.api.service import Dialect, Service
from server.glm.tokenizer import Tokenizer
from tests.server.api.answer.test_tool_calls import BERGEN
from tests.server.api.scripted import ScriptedEngine

CHECKS: Any = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
CALM = [
    hypothesis.HealthCheck.too_slow,
    hypothesis.HealthCheck.filter_too_much,
    hypothesis.HealthCheck.data_too_large,
]


@pytest.fixture(scope="module")
def app(dialect: Dialect, tokenizer: Tokenizer) -> FastAPI:
    """Answers to any model's name, with a thought, a text, and a call where there are tools."""
    engine = ScriptedEngine(tokenizer.encode(f"hm</think>Hi{BERGEN}<|observation|>"))
    return make_app(Service(engine, dialect, ModelNames("z-ai/glm-5.2", "any")))


def test_every_route_is_described(app: FastAPI) -> None:
    paths = app.openapi()["paths"]
    bodies = {base + path for base in BASES for path in BODIES}
    assert paths.keys() > bodies
    for path, methods in paths.items():
        for described_method in methods.values():
            has_body = "post" in methods and not path.endswith(("/cache/clear", "/engine/start", "/cancel"))
            assert has_body == ("requestBody" in described_method) == (path in bodies), path


def test_a_stream_is_what_the_document_says(app: FastAPI) -> None:
    schema: Any = schemathesis.openapi.from_asgi("/openapi.json", app)
    body = {"messages": [{"role": "user", "content": "hello"}], "stream": True}
    case = schema["/v1/chat/completions"]["POST"].Case(body=body, media_type="application/json")
    assert case.call_and_validate(checks=CHECKS).status_code == 200


def fuzz(app: FastAPI, num_cases: int) -> dict[str, int]:
    """Send so many cases, half of them wrong on purpose; the number of answers by status."""
    schema: Any = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [found.ok() for found in schema.get_all_operations()]
    under_test = [
        one for one in operations if one.path.startswith("/v1/") or one.path in ("/health", "/metrics")
    ]
    bodiless = ("/cache/clear", "/engine/start", "/cancel")
    with_body = [one for one in under_test if one.method == "post" and not one.path.endswith(bodiless)]
    num_each = num_cases // (2 * len(with_body)) + 1
    statuses: dict[str, int] = {}
    for operation in under_test:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            has_input = operation in with_body or "{" in operation.path
            if mode is GenerationMode.NEGATIVE and operation not in with_body:
                continue
            _fuzz_one(operation, mode, num_each if has_input else 1, statuses)
    return statuses


def _fuzz_one(operation: Any, mode: GenerationMode, num_cases: int, statuses: dict[str, int]) -> None:
    @hypothesis.settings(
        max_examples=num_cases, deadline=None, database=None, derandomize=True, suppress_health_check=CALM,
        phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    @hypothesis.given(st.data())
    def send(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=mode))
        response = case.call_and_validate(checks=CHECKS)
        kind = f"{mode.value} {response.status_code}"
        statuses[kind] = statuses.get(kind, 0) + 1

    send()


@pytest.mark.parametrize(
    "num_cases", [pytest.param(20, marks=pytest.mark.slow), pytest.param(2000, marks=pytest.mark.long)]
)
def test_no_case_of_schemathesis_finds_a_fault(app: FastAPI, num_cases: int) -> None:
    statuses = fuzz(app, num_cases)
    assert sum(statuses.values()) >= num_cases
    assert statuses["positive 200"] > num_cases / 5, statuses
    assert not any(status.split()[1].startswith("5") for status in statuses), statuses

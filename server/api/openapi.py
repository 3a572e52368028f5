"""The OpenAPI document: what the routes take and give, gathered from the schemas of bodies and of answers.

Routes parse bodies themselves (see `body.py`), so FastAPI knows nothing of them; this table does.
"""

from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.api import declared
from server.api.admin.memory_routes import PlanRequest
from server.api.dialects.anthropic_schema import MESSAGES_IGNORED, CountRequest, MessagesRequest
from server.api.dialects.responses_schema import ResponsesRequest
from server.api.dialects.tokenize import DetokenizeRequest, TokenizeRequest
from server.api.request.chat_schema import ChatRequest
from server.api.request.common_fields import IGNORED
from server.api.request.completion_schema import CompletionRequest

# OpenRouter's base path, OpenAI's, and none, as mlx-lm also has it.
BASES = ("/api/v1", "/v1", "")

Json = dict[str, Any]


@dataclass(frozen=True)
class Operation:
    """What a route takes and gives; `ignored` names fields that a body may have and that change nothing."""

    gives: type[BaseModel]
    takes: type[BaseModel] | None = None
    ignored: frozenset[str] = frozenset()
    error: type[BaseModel] = declared.Error

    @property
    def streams(self) -> bool:
        """Whether the answer may come in events."""
        return self.takes is not None and "stream" in self.takes.model_fields


OPERATIONS = {
    "/chat/completions": Operation(declared.ChatCompletion, ChatRequest, IGNORED),
    "/completions": Operation(declared.Completion, CompletionRequest, IGNORED),
    "/messages": Operation(
        declared.AnsweredMessage, MessagesRequest, MESSAGES_IGNORED, declared.MessagesError
    ),
    "/messages/count_tokens": Operation(
        declared.TokenCount, CountRequest, MESSAGES_IGNORED, declared.MessagesError
    ),
    "/responses": Operation(declared.ResponseObject, ResponsesRequest, ResponsesRequest.ignored),
    "/models": Operation(declared.ModelList),
    "/models/user": Operation(declared.ModelList),
    "/models/count": Operation(declared.Found),
    "/models/{model_id}": Operation(declared.ModelEntry),
    "/models/{model_id}/endpoints": Operation(declared.Found),
    "/model/{model_id}": Operation(declared.OneModel),
    "/key": Operation(declared.Found),
    "/auth/key": Operation(declared.Found),
    "/credits": Operation(declared.Found),
    "/generation": Operation(declared.Found),
    "/providers": Operation(declared.FoundMany),
    "/tokenize": Operation(declared.Tokens, TokenizeRequest),
    "/detokenize": Operation(declared.Text, DetokenizeRequest),
    "/cache/explain": Operation(declared.Found),
    "/cache/stats": Operation(declared.Found),
    "/cache/clear": Operation(declared.Found),
    "/cache/pin": Operation(declared.Found, ChatRequest, IGNORED),
    "/cache/unpin": Operation(declared.Found, ChatRequest, IGNORED),
    "/engine/start": Operation(declared.Found),
    "/memory/plan": Operation(declared.Found, PlanRequest),
    "/health": Operation(declared.Health, error=declared.Health),
}


class DescribedApp(FastAPI):
    """An app whose document also says what bodies look like."""

    def openapi(self) -> Json:
        """The document, made at the first call."""
        if self.openapi_schema is None:
            _describe(super().openapi())
        assert self.openapi_schema, "FastAPI keeps the document that it made"
        return self.openapi_schema


def _describe(document: Json) -> None:
    references, schemas = _schemas()
    document.setdefault("components", {})["schemas"] = schemas
    for path, methods in document["paths"].items():
        base = next(base for base in BASES if path.startswith(base))
        operation = OPERATIONS.get(path.removeprefix(base), Operation(declared.Error))
        for described in methods.values():
            if path.endswith("/models/{model_id}"):  # these two are lists
                described["parameters"][0]["schema"]["not"] = {"enum": ["user", "count"]}
            described["responses"].pop("422", None)
            for status in ("4XX", "5XX"):
                answer = _json(references[operation.error])
                described["responses"][status] = {"description": "an error", "content": answer}
            if path == "/metrics":
                described["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
                continue
            success = next(status for status in described["responses"] if status.startswith("20"))
            if operation.gives is not declared.Error:
                described["responses"][success]["content"] = _json(references[operation.gives])
            if operation.streams:
                events: Json = {"text/event-stream": {}}  # readers of a schema here disagree: stream or event
                described["responses"][success]["content"] |= events
            if operation.takes:
                described["requestBody"] = {"required": True, "content": _json(references[operation.takes])}


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _schemas() -> tuple[dict[type[BaseModel], Json], Json]:
    """A reference for each model, and the schemas referred to."""
    models = {
        model
        for one in OPERATIONS.values()
        for model in (one.gives, one.takes, one.error)
        if model is not None
    }
    ordered = sorted(models, key=lambda model: model.__name__)
    made, found = models_json_schema(
        [(model, "validation") for model in ordered], ref_template="#/components/schemas/{model}"
    )
    schemas: Json = found["$defs"]
    for operation in OPERATIONS.values():
        if operation.takes and operation.ignored:
            _name(schemas[operation.takes.__name__], operation.ignored)
    return {model: made[model, "validation"] for model in ordered}, schemas


def _name(schema: Json, ignored: frozenset[str]) -> None:
    """Name the fields that are ignored by design."""
    for name in sorted(ignored):
        schema["properties"].setdefault(name, {"description": "ignored by design"})

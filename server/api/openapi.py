"""The OpenAPI document: what the routes take and give, gathered from the schemas of bodies and of answers.

Routes parse bodies themselves (see `body.py`), so FastAPI knows nothing of them; this table does.
"""

import re
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
    "/activity": Operation(declared.FoundMany),
    "/activity/machine": Operation(declared.Found),
    "/activity/{request_id}/cancel": Operation(declared.Found),
    "/memory/plan": Operation(declared.Found, PlanRequest),
    "/health": Operation(declared.Health, error=declared.Health),
}


SECURITY: Json = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "Authorization: Bearer KEY"},
    "x-api-key": {
        "type": "apiKey",
        "in": "header",
        "name": "x-api-key",
        "description": "the same key, as Anthropic's clients send it",
    },
}
TAGS = {
    **dict.fromkeys(("chat", "completions", "messages", "responses"), "Answers"),
    **dict.fromkeys(("models", "model", "providers"), "Models"),
    **dict.fromkeys(("key", "auth", "credits", "generation"), "Account"),
    **dict.fromkeys(("tokenize", "detokenize"), "Tokens"),
    **dict.fromkeys(("activity", "health", "metrics"), "Watching"),
    **dict.fromkeys(("cache", "memory", "engine"), "Administration"),
}


# Routes that the table leaves out.
OTHERS = ("/metrics", "/", "/docs", "/openapi.json", *(f"{base}/responses/{{response_id}}" for base in BASES))
_PARAMETER = re.compile(r"\\{\w+\\}")


def _templates() -> list[tuple[re.Pattern[str], str]]:
    paths = {base + path for base in BASES for path in OPERATIONS if path != "/health"} | {"/health", *OTHERS}
    found = [(re.compile(_PARAMETER.sub(".+", re.escape(path))), path) for path in paths if "{" in path]
    return sorted(found, key=lambda one: -len(one[1]))


_TEMPLATES = _templates()
_EXACT = frozenset(
    {base + path for base in BASES for path in OPERATIONS if "{" not in path and path != "/health"}
    | {"/health", *(path for path in OTHERS if "{" not in path)}
)


def route_of(path: str) -> str:
    """The template of the route that a path means; "other" where there is none."""
    if path in _EXACT:
        return path
    return next((template for pattern, template in _TEMPLATES if pattern.fullmatch(path)), "other")


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
    document.setdefault("components", {}).update(schemas=schemas, securitySchemes=SECURITY)
    document["security"] = [{name: []} for name in SECURITY] + [{}]  # without keys anybody may ask
    for path, methods in document["paths"].items():
        base = next(base for base in BASES if path.startswith(base))
        operation = OPERATIONS.get(path.removeprefix(base), Operation(declared.Error))
        for described in methods.values():
            described["tags"] = [tag_of(path.removeprefix(base))]
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


def tag_of(path: str) -> str:
    """The group of a route, by the first word of its path."""
    return TAGS[path.split("/")[1]]


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

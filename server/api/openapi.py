"""The OpenAPI document: what the routes take, gathered from the schemas of bodies.

Routes parse bodies themselves (see `body.py`), so FastAPI knows nothing of them; this table does. Answers are
described in docs/api.md, and the golden files in tests/server/api hold them to their shapes.
"""

from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

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
class Takes:
    """The body of a route; `ignored` names fields that it may have and that change nothing."""

    body: type[BaseModel]
    ignored: frozenset[str] = frozenset()

    @property
    def may_stream(self) -> bool:
        """Whether the answer may come in events."""
        return "stream" in self.body.model_fields


BODIES = {
    "/chat/completions": Takes(ChatRequest, IGNORED),
    "/completions": Takes(CompletionRequest, IGNORED),
    "/messages": Takes(MessagesRequest, MESSAGES_IGNORED),
    "/messages/count_tokens": Takes(CountRequest, MESSAGES_IGNORED),
    "/responses": Takes(ResponsesRequest, ResponsesRequest.ignored),
    "/tokenize": Takes(TokenizeRequest),
    "/detokenize": Takes(DetokenizeRequest),
    "/cache/pin": Takes(ChatRequest, IGNORED),
    "/cache/unpin": Takes(ChatRequest, IGNORED),
    "/memory/plan": Takes(PlanRequest),
}


# Of every dialect.
ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message"],
            "properties": {"message": {"type": "string", "minLength": 1}},
        }
    },
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
        takes = BODIES.get(path.removeprefix(base))
        for described in methods.values():
            described["tags"] = [TAGS[path.removeprefix(base).split("/")[1]]]  # by the first word
            if path.endswith("/models/{model_id}"):  # these two are lists
                described["parameters"][0]["schema"]["not"] = {"enum": ["user", "count"]}
            answers = described["responses"]
            answers.pop("422", None)
            for status in ("4XX", "5XX"):
                answers[status] = {
                    "description": "an error",
                    "content": {"application/json": {"schema": ERROR}},
                }
            success = answers[next(status for status in answers if status.startswith("20"))]
            if path == "/metrics":
                success["content"] = {"text/plain": {"schema": {"type": "string"}}}
                continue
            success["content"] = {"application/json": {"schema": {"type": "object"}}}
            if takes and takes.may_stream:
                success["content"]["text/event-stream"] = {}
            if takes:
                body = {"application/json": {"schema": references[takes.body]}}
                described["requestBody"] = {"required": True, "content": body}


def _schemas() -> tuple[dict[type[BaseModel], Json], Json]:
    """A reference for each body, and the schemas referred to."""
    bodies = sorted({takes.body for takes in BODIES.values()}, key=lambda body: body.__name__)
    made, found = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    schemas: Json = found["$defs"]
    for takes in BODIES.values():
        for name in sorted(takes.ignored):
            schemas[takes.body.__name__]["properties"].setdefault(name, {"description": "ignored by design"})
    return {body: made[body, "validation"] for body in bodies}, schemas

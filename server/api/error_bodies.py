"""From exceptions to wire bodies: the only place that knows both.

The body is OpenRouter's, with an integer code that equals the status; OpenAI's `type` and `param` ride along.
Only an overflow of the context has OpenAI's own form where OpenAI's clients ask.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.types import Scope

from config.errors import RETRY_AFTER_S, BusyError, ContextOverflow, EngineError, RequestError
from server.api.access.quotas import QuotaError
from server.link.messages import Failed, FailureKind

PROVIDER = "glmserve"

# status, OpenRouter's word, whether trying again can help
_FAILURES: Mapping[FailureKind, tuple[int, str, bool]] = {
    "request": (400, "invalid_request", False),
    "engine": (500, "server", False),
    "disk": (502, "provider_unavailable", True),
    "changed": (503, "provider_unavailable", False),
    "died": (503, "provider_unavailable", True),
    "busy": (503, "provider_overloaded", True),
    "timeout": (408, "timeout", False),
    "cancelled": (499, "unmapped", False),
}

# Anthropic's word for a status.
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_ANTHROPIC_PATHS = ("/messages", "/messages/count_tokens")
_OPENROUTER_BASE = "/api/v1/"
# The field that holds the prompt, by the end of a path.
_PROMPTS = (
    ("/chat/completions", "messages"),
    ("/completions", "prompt"),
    ("/responses", "input"),
    ("", "messages"),
)

# What pydantic calls the kinds of a union: `str`, `list[TextPart]`, `NamedTool`, `constrained-str`.
_KIND = re.compile(r"(str|int)$|[A-Z]|[a-z-]+[\[-]")
# Where its own words are about classes of ours.
_MESSAGES = {"model_type": "Input should be an object", "dict_type": "Input should be an object"}

# What a 404 and a 405 say that no route of ours has raised.
NO_DETAILS = ("Not Found", "Method Not Allowed")

log = logging.getLogger(__name__)


class ClientGone(Exception):
    """Nobody reads the answer any more."""


class GenerationFailed(EngineError):
    """The engine gave up on a request, or is not there to take it."""

    def __init__(self, kind: FailureKind, message: str, retry_after_s: int | None = None) -> None:
        self.status, self.error_type, self.can_retry = _FAILURES[kind]
        self.retry_after_s = retry_after_s or RETRY_AFTER_S
        super().__init__(f"{message}; try again" if self.can_retry else message)

    @classmethod
    def from_event(cls, event: Failed) -> "GenerationFailed":
        """The exception for an engine's last word on a request."""
        return cls(event.kind, event.message, event.retry_after_s)


def error_object(status: int, message: str, error_type: str, param: str | None = None) -> dict[str, Any]:
    """The value of `error` in a body or in a stream's chunk."""
    return {
        "code": status,
        "message": message,
        "type": error_type,
        "param": param,
        "metadata": {"error_type": error_type, "provider_name": PROVIDER},
    }


def error_body(path: str, error: dict[str, Any]) -> dict[str, Any]:
    """The body around an error object, in the dialect that is spoken at this path."""
    return anthropic_error(error) if path.endswith(_ANTHROPIC_PATHS) else {"error": error}


def anthropic_error(error: dict[str, Any]) -> dict[str, Any]:
    """The body, or the event, that Anthropic's clients read an error from."""
    message = error["message"]
    if error["metadata"]["error_type"] == "context_length_exceeded":
        message = f"prompt is too long: {message}"  # what Claude Code looks for before it compacts
    kind = _ANTHROPIC_TYPES.get(error["code"], "api_error")
    return {"type": "error", "error": error | {"type": kind, "message": message}}


def describe(error: Exception) -> dict[str, Any]:
    """The error object of any exception; those that nobody raised on purpose say nothing about themselves."""
    match error:
        case RequestError():
            return error_object(error.status, str(error), error.error_type, error.param)
        case GenerationFailed():
            return error_object(error.status, str(error), error.error_type)
        case BusyError():
            return error_object(503, str(error), "provider_overloaded")
        case ValidationError():
            message, param = first_fault(error)
            return error_object(400, message, "invalid_request", param)
        case ClientGone():
            return error_object(499, "the client closed the connection", "unmapped")
        case HTTPException(status_code=404 | 405):
            return error_object(error.status_code, str(error.detail), "not_found")
        case HTTPException():
            return error_object(error.status_code, str(error.detail), "invalid_request")
        case _:
            return error_object(500, "the server failed; its log says more", "server")


def install_error_handlers(app: FastAPI) -> None:
    """Let every exception of the app become a body of ours."""
    for kind in (RequestError, EngineError, ClientGone, ValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _respond)


def _respond(request: Request, error: Exception) -> JSONResponse:
    path, body = request.url.path, describe(error)
    if isinstance(error, HTTPException) and error.status_code in (404, 405) and error.detail in NO_DETAILS:
        body["message"] = f"there is no {request.method} {path[:100]} here; docs/api.md lists what there is"
    status = body["code"]
    note_reason(request.scope, body["metadata"]["error_type"])
    if isinstance(error, ContextOverflow):
        body |= _overflow(path, error)
    return JSONResponse(error_body(path, body), status, _headers(error))


def note_reason(scope: Scope, reason: str) -> None:
    """Leaves the word for an error where the log and the metrics find it."""
    record = scope.get("state", {}).get("record")
    if record is not None:
        record.reason = reason


def _overflow(path: str, error: ContextOverflow) -> dict[str, Any]:
    """What an overflow says beside OpenRouter's words: the field and, elsewhere, OpenAI's words and code.

    Clients search for them before they compact a conversation or fall back to another model.
    """
    param = next(name for end, name in _PROMPTS if path.endswith(end))
    if path.startswith(_OPENROUTER_BASE) or path.endswith(_ANTHROPIC_PATHS):
        return {"param": param}
    num_prompt, limit = error.num_prompt_tokens, error.max_tokens
    return {
        "code": "context_length_exceeded",
        "message": f"This model's maximum context length is {error.context_length} tokens. However, you "
        f"requested {num_prompt + limit} tokens ({num_prompt} in the {param}, {limit} in the completion). "
        f"Please reduce the length of the {param} or completion.",
        "type": "invalid_request_error",
        "param": param,
    }


def _headers(error: Exception) -> dict[str, str]:
    if isinstance(error, GenerationFailed):
        if not error.can_retry:
            return {"x-should-retry": "false"}
        return {"x-should-retry": "true", "Retry-After": str(error.retry_after_s)}
    if isinstance(error, QuotaError):
        again = "true" if error.can_retry else "false"
        return {"x-should-retry": again, "Retry-After": str(error.retry_after_s)}
    if isinstance(error, RequestError) and error.status == 408:
        return {"Connection": "close"}  # the rest of the body may come at any time
    if isinstance(error, BusyError):
        return {"x-should-retry": "true", "Retry-After": str(error.retry_after_s)}
    if isinstance(error, HTTPException) and error.headers:
        return dict(error.headers)
    return {}


def first_fault(error: ValidationError) -> tuple[str, str | None]:
    """The first of those that lie deepest: of the kinds that a value may have it came nearest to that one."""
    faults = [(_steps(fault), fault) for fault in error.errors(include_url=False, include_input=False)]
    steps, fault = max(faults, key=lambda one: len(one[0]))
    message = _MESSAGES.get(fault["type"]) or fault["msg"].removeprefix("Value error, ")
    param = _path(steps) or None
    is_named = fault["loc"] == ()  # a fault of the whole body says in its words which field is to blame
    return (message if is_named else f"{param}: {message}"), param


def _steps(fault: ErrorDetails) -> list[int | str]:
    """The way to a fault in the client's body, without pydantic's names of the kinds that it tried."""
    steps = [step for step in fault["loc"] if isinstance(step, int) or not _KIND.match(step)]
    return [*steps, *_blamed(fault)]


def _blamed(fault: ErrorDetails) -> list[str]:
    """The field that `schema.fault` blames, if it is not the place of the fault itself."""
    return [fault["ctx"]["param"]] if fault["type"] == "fault" and fault["ctx"]["param"] else []


def _path(steps: list[int | str]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")

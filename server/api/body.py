"""Reads a request's body: bounded in size and depth, strict, and finite. Called by the routes."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import pydantic_core
from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from config.errors import RequestError
from server.api.errors import ClientGone
from server.glm.finite import all_finite

MAX_BODY_BYTES = 8 * 2**20
# A refused body is read on to here, so that the client gets to see the answer instead of a reset.
MAX_DRAINED_BYTES = 64 * 2**20

T = TypeVar("T", bound=BaseModel)


def body_of(schema: type[T]) -> Callable[[Request], Awaitable[T]]:
    """A FastAPI dependency that parses the body by a schema.

    Pydantic's own JSON parser is used throughout: it refuses nesting beyond 200 levels, lone surrogates and
    bytes that are not UTF-8, where Python's would crash, or let them through to crash later.
    """

    async def parse(request: Request) -> T:
        raw = await read_body(request)
        body = schema.model_validate_json(raw)  # first: it names the field
        if not _is_finite(raw):
            raise RequestError("the body holds NaN, Infinity or a number beyond 1e308: none of them is JSON")
        return body

    return parse


def _is_finite(raw: bytes) -> bool:
    """Whether every number is one. Fields that are passed on as they came (schemas, tools) are not asked."""
    try:
        return all_finite(pydantic_core.from_json(raw, allow_inf_nan=False))
    except ValueError:  # but for the words NaN and Infinity it has been parsed
        return False


async def read_body(request: Request) -> bytes:
    """The body, if it is not too large."""
    body = bytearray()
    num_bytes = 0
    try:
        async for part in request.stream():
            num_bytes += len(part)
            if num_bytes <= MAX_BODY_BYTES:
                body += part
            if num_bytes > MAX_DRAINED_BYTES:
                break
    except ClientDisconnect as error:
        raise ClientGone from error
    if num_bytes > MAX_BODY_BYTES:
        message = f"the body has more than {MAX_BODY_BYTES} bytes"
        raise RequestError(message, status=413, error_type="payload_too_large")
    return bytes(body)

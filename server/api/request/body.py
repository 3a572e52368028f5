"""Reads a request's body: bounded in size, depth and time, strict, and finite. Called by the routes."""

import asyncio
import codecs
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pydantic_core
from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from config.errors import RequestError
from server.api.error_bodies import ClientGone
from server.glm.finite import all_finite

MAX_BODY_BYTES = 8 * 2**20
# What some clients begin with; the longer marks first, because one begins another.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# A refused body is read on to here, so that the client gets to see the answer instead of a reset.
MAX_DRAINED_BYTES = 64 * 2**20
# The largest body at 28 kB/s. Who sends a byte a minute would otherwise be waited for for ever.
MAX_BODY_S = 300.0

T = TypeVar("T", bound=BaseModel)


def body_of(schema: type[T]) -> Callable[[Request], Awaitable[T]]:
    """A FastAPI dependency that parses the body by a schema."""

    async def parse(request: Request) -> T:
        value = _parse(await read_body(request))
        body = schema.model_validate(value)  # first: it names the field
        if not all_finite(value):  # in fields that are passed on as they came (schemas, tools)
            raise RequestError("the body holds NaN, Infinity or a number beyond 1e308: none of them is JSON")
        return body

    return parse


def _parse(raw: bytes) -> Any:
    """The JSON value.

    Pydantic's own parser is used throughout: it refuses nesting beyond 200 levels, lone surrogates and bytes
    that are not UTF-8, where Python's would crash, or let them through to crash later.
    """
    try:
        return pydantic_core.from_json(_without_mark(raw))
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from error


def _without_mark(raw: bytes) -> bytes:
    """The body in UTF-8 without its byte order mark; ValueError where it is not in the coding of the mark."""
    raw = raw.lstrip()
    for mark, coding in MARKS:
        if raw.startswith(mark):
            text = raw.removeprefix(mark)
            return text if mark == codecs.BOM_UTF8 else text.decode(coding).encode()
    return raw


async def read_body(request: Request) -> bytes:
    """The body, if it is not too large, and comes in time."""
    coding = request.headers.get("content-encoding", "")
    if any(one.strip().lower() not in ("", "identity") for one in coding.split(",")):
        message = f"a body in content-encoding {coding[:40]!r} is not read: send it as it is"
        raise RequestError(message, status=415)
    try:
        async with asyncio.timeout(MAX_BODY_S):
            return await _receive(request)
    except ClientDisconnect as error:
        raise ClientGone from error
    except TimeoutError as error:
        message = f"the body was not complete after {MAX_BODY_S:g} s"
        raise RequestError(message, status=408, error_type="timeout") from error


async def _receive(request: Request) -> bytes:
    body = bytearray()
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes <= MAX_BODY_BYTES:
            body += part
        if num_bytes > MAX_DRAINED_BYTES:
            break
    if num_bytes > MAX_BODY_BYTES:
        message = f"the body has more than {MAX_BODY_BYTES} bytes"
        raise RequestError(message, status=413, error_type="payload_too_large")
    return bytes(body)

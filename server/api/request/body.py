"""Reads a request's body: bounded in size, parts, depth and time, strict, finite. Called by the routes."""

import asyncio
import codecs
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pydantic_core
from fastapi import Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from config.errors import BusyError, RequestError
from server.api.access.receipts import holder_of
from server.api.answer.json_answer import while_connected
from server.api.error_bodies import ClientGone
from server.api.request.turns import Presence
from server.api.request.workload import SMALL_BYTES, Allowance, lease_of
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
# After the refusal of a body that still comes.
DRAIN_S = 3.0
# Between parts of it, so that many of them leave the event loop time for others.
DRAIN_PAUSE_S = 0.05
# Parts of JSON, each of which costs memory and time: a million tokens in messages of fifty have as many.
MAX_CONTAINERS, MAX_STRINGS = 2**16, 2**18
# What they take as Python has them, and validated; measured with messages, calls, tools and ids.
CONTAINER_BYTES, STRING_BYTES, ITEM_BYTES = 1200, 100, 48
# Copies of the text in use at once while a prompt is rendered.
NUM_COPIES = 5
# One without an end goes on to the body's end: else each quotation mark in it is tried as a beginning.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
# Between two pieces of a body the event loop may have the interpreter.
PIECE_BYTES = 2**18

T = TypeVar("T", bound=BaseModel)


@dataclass(frozen=True)
class Extent:
    """How large a body will be in memory, estimated from its bytes."""

    num_containers: int
    num_strings: int
    num_items: int
    text_bytes: int

    @classmethod
    def of(cls, raw: bytes) -> "Extent":
        """The extent of JSON. What stands in strings may be counted, unless that made the body too large."""
        num_strings = (_count(raw, b'"') - _count(raw, b'\\"')) // 2
        num_containers, num_items = _count(raw, b"{", b"["), _count(raw, b",")
        if num_containers > MAX_CONTAINERS and num_strings <= MAX_STRINGS:
            quoted = raw[: raw.rfind(b'"') + 1]
            # A function lets the event loop go on between two strings.
            structure = _STRING.sub(lambda string: b"", quoted)
            num_containers -= _count(quoted, b"{", b"[") - _count(structure, b"{", b"[")
            num_items -= _count(quoted, b",") - _count(structure, b",")
        extent = cls(num_containers, num_strings, num_items, 0)
        if extent.has_too_many_parts:
            return extent
        is_numbers = num_items > 16 * num_strings
        text = _num_bytes_beside_numbers(raw) if is_numbers else len(raw)
        return cls(num_containers, num_strings, num_items, text * _width(raw))

    @property
    def has_too_many_parts(self) -> bool:
        """Whether the body is refused for its parts, whatever its text takes."""
        return self.num_containers > MAX_CONTAINERS or self.num_strings > MAX_STRINGS

    @property
    def kept_bytes(self) -> int:
        """Of the parsed and validated body."""
        parts = CONTAINER_BYTES * self.num_containers + STRING_BYTES * self.num_strings
        return parts + ITEM_BYTES * self.num_items + self.text_bytes

    @property
    def peak_bytes(self) -> int:
        """While it is turned into a prompt."""
        return self.kept_bytes + NUM_COPIES * self.text_bytes


def body_of(schema: type[T]) -> Callable[[Request], Awaitable[T]]:
    """A FastAPI dependency that parses the body by a schema."""

    async def parse(request: Request) -> T:
        lease = lease_of(request)
        raw = await read_body(request)
        if lease.is_small:
            return _read(schema, raw, lease)
        work = lease.run(holder_of(request), lambda wanted: _read_if_wanted(schema, raw, lease, wanted))
        return await while_connected(request, work)

    return parse


def _read_if_wanted(schema: type[T], raw: bytes, lease: Allowance, wanted: Presence) -> T:
    wanted.check()
    return _read(schema, raw, lease)


def _read(schema: type[T], raw: bytes, lease: Allowance) -> T:
    try:
        raw = _without_mark(raw)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    extent = Extent.of(raw)
    if extent.has_too_many_parts:
        # A nesting without end is no JSON, and the parser says so at its start.
        _parse(raw[:SMALL_BYTES].decode(errors="ignore"), allow_partial=True)
        message = f"the body has more than {MAX_CONTAINERS} objects and arrays, or {MAX_STRINGS} strings"
        raise RequestError(message, status=413, error_type="payload_too_large")
    lease.hold(len(raw) + extent.peak_bytes)
    value = _parse(raw)
    body = schema.model_validate(value)  # first: it names the field
    if not all_finite(value):  # in fields that are passed on as they came (schemas, tools)
        raise RequestError("the body holds NaN, Infinity or a number beyond 1e308: none of them is JSON")
    lease.kept_bytes = extent.kept_bytes
    return body


def _parse(raw: bytes | str, *, allow_partial: bool = False) -> Any:
    """The JSON value.

    Pydantic's own parser is used throughout: it refuses nesting beyond 200 levels, lone surrogates and bytes
    that are not UTF-8, where Python's would crash, or let them through to crash later.
    """
    try:
        return pydantic_core.from_json(raw, allow_partial=allow_partial)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from error


def _count(raw: bytes, *marks: bytes) -> int:
    """How often these marks are in the body."""
    starts = range(0, len(raw), PIECE_BYTES)
    return sum(raw.count(one, start, start + PIECE_BYTES + len(one) - 1) for start in starts for one in marks)


def _num_bytes_beside_numbers(raw: bytes) -> int:
    starts = range(0, len(raw), PIECE_BYTES)
    return sum(len(raw[at : at + PIECE_BYTES].translate(None, b"0123456789, \n")) for at in starts)


def _width(raw: bytes) -> int:
    """Bytes of a character in Python's strings: all of a string have the width of its widest."""
    if raw.isascii() and not _has(raw, b"\\u"):
        return 1
    return 4 if _has(raw, b"\\ud", b"\\uD", *(bytes([byte]) for byte in range(0xF0, 0xF5))) else 2


def _has(raw: bytes, *marks: bytes) -> bool:
    """Whether any of these marks is in the body."""
    starts = range(0, len(raw), PIECE_BYTES)
    return any(one in raw[start : start + PIECE_BYTES + len(one) - 1] for start in starts for one in marks)


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
    lease = lease_of(request)
    is_given_up = False

    def give_up() -> None:
        nonlocal is_given_up
        is_given_up = True
        deadline.reschedule(asyncio.get_running_loop().time())

    try:
        async with asyncio.timeout(MAX_BODY_S) as deadline:
            lease.give_up = give_up
            return await _receive(request, lease)
    except ClientDisconnect as error:
        raise ClientGone from error
    except TimeoutError as error:
        if is_given_up:
            raise BusyError(
                "the body came too slowly, and its memory was needed; try again in 5 s", 5
            ) from error
        message = f"the body was not complete after {MAX_BODY_S:g} s"
        raise RequestError(message, status=408, error_type="timeout") from error
    finally:
        lease.give_up = lambda: None
        lease.complete()


async def _receive(request: Request, lease: Allowance) -> bytes:
    body = bytearray()
    num_bytes = 0
    parts = request.stream()
    async for part in parts:
        num_bytes += len(part)
        if num_bytes <= MAX_BODY_BYTES:
            try:
                lease.receive(num_bytes)
            except BusyError:
                body.clear()
                await _drain(parts, lease)
                raise
            body += part
        await lease.await_more()
        if num_bytes > MAX_DRAINED_BYTES:
            break
    if num_bytes > MAX_BODY_BYTES:
        message = f"the body has more than {MAX_BODY_BYTES} bytes"
        raise RequestError(message, status=413, error_type="payload_too_large")
    return bytes(body)


async def _drain(parts: AsyncGenerator[bytes, None], lease: Allowance) -> None:
    """Reads on for a while, so that a client which still sends gets to see the refusal."""
    try:
        async with asyncio.timeout(DRAIN_S):
            async for _ in parts:
                await asyncio.sleep(DRAIN_PAUSE_S)
                await lease.await_more()
    except TimeoutError:
        pass

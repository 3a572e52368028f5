"""Server-sent events: what a stream looks like on the wire, whatever it carries.

Comments keep the line alive from a wall-clock timer; there are no `id:` lines and no named events, which
break clients. Headers and a first comment go out before the engine has said anything.
"""

import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

import pydantic_core
from sse_starlette import EventSourceResponse, ServerSentEvent

from server.api.errors import GenerationFailed, describe
from server.api.shapes import Envelope

log = logging.getLogger(__name__)


def stream(
    chunks: AsyncGenerator[dict[str, Any], None],
    envelope: Envelope,
    kind: str,
    keepalive_s: float,
    progress: Callable[[], str] = str,
    headers: Mapping[str, str] | None = None,
) -> EventSourceResponse:
    """A response that sends these chunks and then `[DONE]`, or one error chunk in its place.

    `progress` is what the comments say beside that the request is being worked on.
    """
    return EventSourceResponse(
        _events(chunks, envelope, kind),
        headers={"X-Generation-Id": envelope.id, **(headers or {})},
        sep="\n",
        ping=keepalive_s,
        ping_message_factory=lambda: _keepalive(progress()),
    )


def _keepalive(progress: str = "") -> ServerSentEvent:
    return ServerSentEvent(comment=f"OPENROUTER PROCESSING {progress}".rstrip(), sep="\n")


def encode(value: dict[str, Any], name: str = "") -> bytes:
    """One event with this value as JSON; done for every token, so by the fastest encoder at hand."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + pydantic_core.to_json(value) + b"\n\n"


async def _events(
    chunks: AsyncGenerator[dict[str, Any], None], envelope: Envelope, kind: str
) -> AsyncGenerator[bytes, None]:
    async with aclosing(chunks):
        yield _keepalive().encode()
        try:
            async for chunk in chunks:
                yield encode(chunk)
            yield b"data: [DONE]\n\n"
        except Exception as error:  # the status is sent already, so the error must travel in the stream
            if not isinstance(error, GenerationFailed):
                log.exception("%s failed", envelope.id)
            yield encode(_error_chunk(error, envelope, kind))


def _error_chunk(error: Exception, envelope: Envelope, kind: str) -> dict[str, Any]:
    text = {"text": ""} if kind == "text_completion" else {"delta": {"content": ""}}
    choice = {"index": 0, **text, "finish_reason": "error", "native_finish_reason": None}
    return envelope.wrap(kind, error=describe(error), choices=[choice])

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
from starlette.types import Message, Send

from server.api.answer.shapes import Envelope
from server.api.error_bodies import GenerationFailed, describe

# sse-starlette would cut a stream off as soon as the server is told to stop. How long answers may go on, and
# what those that do not end are told, is for the server to say: this is longer than it ever waits.
NO_CUT_S = 3600.0
# JSON may hold these as they are, but clients that take lines apart as str.splitlines does, httpx for
# one, would see an event end there.
SEPARATORS = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085"))

log = logging.getLogger(__name__)


class EventStream(EventSourceResponse):
    """Sends encoded events as they come, and what `keepalive` says every `keepalive_s` seconds."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        keepalive: Callable[[], bytes],
        keepalive_s: float,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(
            events,
            headers=headers,
            sep="\n",
            ping=keepalive_s,
            ping_message_factory=lambda: _Encoded(keepalive()),
            shutdown_grace_period=NO_CUT_S,
        )

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        """sse-starlette's, without a cancel scope for each token: no send of ours has a time limit.

        Under another name in some other version it is not called, and streams only cost more.
        """
        await send(message)


class _Encoded(ServerSentEvent):
    """A ping of any number of lines and events, encoded already."""

    def __init__(self, encoded: bytes) -> None:
        super().__init__()
        self._encoded = encoded

    def encode(self) -> bytes:
        return self._encoded


def stream(
    chunks: AsyncGenerator[dict[str, Any], None],
    envelope: Envelope,
    kind: str,
    keepalive_s: float,
    progress: Callable[[], str] = str,
    headers: Mapping[str, str] | None = None,
) -> EventStream:
    """A response that sends these chunks and then `[DONE]`, or one error chunk in its place.

    `progress` is what the comments say beside that the request is being worked on.
    """
    headers = {"X-Generation-Id": envelope.id, **(headers or {})}
    return EventStream(_events(chunks, envelope, kind), lambda: comment(progress()), keepalive_s, headers)


def comment(progress: str = "") -> bytes:
    """The comment that OpenRouter's clients know, and how far the request has come.

    No blank line follows: a comment that stands alone as a block is an empty event to older Go clients.
    """
    return f": OPENROUTER PROCESSING {progress}".rstrip().encode() + b"\n"


def encode(value: dict[str, Any], name: str = "") -> bytes:
    """One event with this value as JSON; done for every token, so by the fastest encoder at hand."""
    head = f"event: {name}\n".encode() if name else b""
    raw = pydantic_core.to_json(value)
    for separator, escaped in SEPARATORS:
        raw = raw.replace(separator, escaped)
    return head + b"data: " + raw + b"\n\n"


async def _events(
    chunks: AsyncGenerator[dict[str, Any], None], envelope: Envelope, kind: str
) -> AsyncGenerator[bytes, None]:
    async with aclosing(chunks):
        yield comment()
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

"""Server-sent events: what a stream looks like on the wire, whatever it carries.

Comments keep the line alive from a wall-clock timer; there are no `id:` lines and no named events, which
break clients. Headers and a first comment go out before the engine has said anything.
"""

import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

import anyio
import pydantic_core
from fastapi.responses import StreamingResponse
from starlette.types import Send

from server.api.errors import GenerationFailed, describe
from server.api.shapes import Envelope

log = logging.getLogger(__name__)


class EventStream(StreamingResponse):
    """Sends encoded events as they come, and what `keepalive` says every `keepalive_s` seconds."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        keepalive: Callable[[], bytes],
        keepalive_s: float,
        headers: Mapping[str, str],
    ) -> None:
        # neither a cache nor a proxy may hold anything back
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers})
        self._events = events
        self._keepalive = keepalive
        self._keepalive_s = keepalive_s

    async def stream_response(self, send: Send) -> None:
        """Starlette's hook: called once, and cancelled when the client has gone."""
        async with aclosing(self._events):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._keep_alive, send)
                async for event in self._events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                tasks.cancel_scope.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        while True:
            await anyio.sleep(self._keepalive_s)
            await send({"type": "http.response.body", "body": self._keepalive(), "more_body": True})


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
    """The comment that OpenRouter's clients know, and how far the request has come."""
    return f": OPENROUTER PROCESSING {progress}".rstrip().encode() + b"\n\n"


def encode(value: dict[str, Any], name: str = "") -> bytes:
    """One event with this value as JSON; done for every token, so by the fastest encoder at hand."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + pydantic_core.to_json(value) + b"\n\n"


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

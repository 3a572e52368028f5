"""Streams whose events have names, as those of Messages and Responses: the name is the event's `type`."""

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from server.api.answer.sse import EventStream, encode
from server.api.error_bodies import GenerationFailed

Event = dict[str, Any]

log = logging.getLogger(__name__)


def stream_named(
    events: AsyncGenerator[Event, None],
    on_error: Callable[[Exception], Event],
    keepalive: Callable[[], bytes],
    keepalive_s: float,
    headers: dict[str, str],
) -> EventStream:
    """A response that sends these events, and what `on_error` makes of the error that ends them early."""
    return EventStream(_encode(events, on_error, headers["X-Generation-Id"]), keepalive, keepalive_s, headers)


async def _encode(
    events: AsyncGenerator[Event, None], on_error: Callable[[Exception], Event], name: str
) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        try:
            async for event in events:
                yield encode(event, event["type"])
        except Exception as error:  # the status is sent already, so the error must travel in the stream
            if not isinstance(error, GenerationFailed):
                log.exception("%s failed", name)
            event = on_error(error)
            yield encode(event, event["type"])

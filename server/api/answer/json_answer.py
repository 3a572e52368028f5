"""Answers that are sent in one piece.

Ends the work for a client that has gone, keeps the line alive for one that waits long. Called by the routes,
after the body is read.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from server.api.error_bodies import ClientGone, GenerationFailed, describe, error_body

Result = dict[str, Any]
T = TypeVar("T")

log = logging.getLogger(__name__)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of work that ends when the client leaves. Call it after the body is read."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        await _end(watching)
        await _end(working)


async def respond_whole(
    request: Request,
    work: Coroutine[Any, Any, Result],
    generation_id: str,
    patience_s: float | None,
    more_headers: Callable[[], Mapping[str, str]] = dict,
) -> Response:
    """The result as JSON. After `patience_s` the headers go out, and a blank each time it has passed again.

    Blanks before JSON mean nothing to a parser, but tell proxies that somebody works. The status is sent by
    then, so an error travels in the body. `more_headers` is asked when the headers go out.
    """
    headers = {"X-Generation-Id": generation_id}
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(request))
    is_kept = False
    try:
        await asyncio.wait({working, watching}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return JSONResponse(working.result(), headers={**headers, **more_headers()})
        if watching.done():
            raise ClientGone
        assert patience_s, "only patience ends the wait for neither"
        is_kept = True
        blanks = _blanks_then_result(working, patience_s, request.url.path, generation_id)
        return StreamingResponse(blanks, headers={**headers, **more_headers()}, media_type="application/json")
    finally:
        await _end(watching)
        if not is_kept:
            await _end(working)


async def _blanks_then_result(
    working: "asyncio.Future[Result]", patience_s: float, path: str, name: str
) -> AsyncGenerator[bytes, None]:
    try:
        while not working.done():
            yield b" "
            await asyncio.wait({working}, timeout=patience_s)
        try:
            result = working.result()
        except Exception as error:  # the status is sent already
            if not isinstance(error, GenerationFailed):
                log.exception("%s failed", name)
            result = error_body(path, describe(error))
        yield json.dumps(result, ensure_ascii=False).encode()
    finally:
        await _end(working)


async def _end(task: "asyncio.Future[Any]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

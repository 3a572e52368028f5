"""Reads several streams at once, as the choices of one answer are."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


class _End:
    """The last entry of a stream, with the error that ended it."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items of all streams as they come, each with its stream's index; the first error ends all."""
    if len(streams) == 1:  # a queue and a task would cost more than all the rest of a token
        async with aclosing(streams[0]) as only:
            async for only_item in only:
                yield 0, only_item
        return
    queue: asyncio.Queue[tuple[int, T | _End]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[T, None]) -> None:
        end = _End(None)
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait((index, item))
        except Exception as error:  # raised where the items are read
            end = _End(error)
        queue.put_nowait((index, end))

    tasks = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(streams)]
    num_open = len(tasks)
    try:
        while num_open:
            index, item = await queue.get()
            if not isinstance(item, _End):
                yield index, item
            elif item.error:
                raise item.error
            else:
                num_open -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

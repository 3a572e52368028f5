"""Pieces of a prompt's work that are computed while the next ones are described.

A device that waits for each piece stands still while the next is described; one that is handed everything at
once holds the intermediates of everything. So a few pieces are in flight.
"""

from collections import deque

import mlx.core as mx


class InFlight:
    """The pieces under way, at most `depth` of them; with a depth of 1 each is evaluated at once.

    When piece i has been launched the one `depth - 1` before it is waited for: the device always has work.
    """

    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._pieces: deque[tuple[mx.array, ...]] = deque()

    def launch(self, *arrays: mx.array) -> None:
        """Starts to compute a piece; returns when there is memory for another."""
        if self._depth > 1:
            mx.async_eval(*arrays)
        self._pieces.append(arrays)
        if len(self._pieces) >= self._depth:
            mx.eval(*self._pieces.popleft())

"""A saved beginning on its way into a cache, a few blocks at a time, so that nobody waits for a disk.

Made by the prefix cache, advanced by `SavedPrefixes` between the engine's steps, always on its thread; blocks
that are not in memory are read by the prefix cache's own threads meanwhile.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from time import monotonic

from models.attention.cache import SequenceCache
from streaming.prefix.block_format import Block, BlockName

# Blocks that are copied between two steps, and as many that are read from disk meanwhile: 49 MB of GLM-5.2.
GROUP = 8
# A disk that takes longer for a group is stuck: the prompt is read instead.
PATIENCE_S = 10.0
# How long a tail is waited for between two steps: looking for files that are not there takes a millisecond,
# and a sequence without a tail should not have to wait for a step of others.
TAIL_S = 0.01

log = logging.getLogger(__name__)

LookUp = Callable[[BlockName], Future[Block | None]]
FindTail = Callable[[int], Future[Block | None]]


class Restoring:
    """Fills `cache` with the blocks `names`, in order, as far as they were saved, and a tail behind them.

    A cache that keeps a state gets the one named `state` at the end; without it the rows are worth nothing.
    A cache that holds a beginning of the prompt already is only ever extended; it holds at most `most` tokens
    in the end. `find_tail` looks for the short block behind a number of whole ones; `on_stuck` hears of a
    read that is not waited for any longer. Until it is complete nobody else may write to the cache.
    """

    def __init__(
        self,
        cache: SequenceCache,
        names: Sequence[BlockName],
        block_tokens: int,
        most: int,
        look_up: LookUp,
        find_tail: FindTail,
        on_stuck: Callable[[Future[Block | None]], None],
        state: BlockName | None = None,
    ) -> None:
        self.length_before = cache.length
        # Room for all at once: 16,384 tokens of GLM-5.2 took 9.8 s group by group, and take 1.6 to 2.5 s so.
        cache.expect(most + 1 - cache.length)
        self._cache, self._most = cache, most
        self._num_whole = cache.length // block_tokens  # whole blocks that have come
        self._rest = deque(names[self._num_whole :])
        self._look_up, self._find_tail, self._on_stuck = look_up, find_tail, on_stuck
        self._coming: deque[Future[Block | None]] = deque()
        self._state = state
        # A tail, and the state behind it: asked for when all whole blocks have come.
        self._end_parts: list[Future[Block | None]] = []
        self._since_s: float | None = None  # the group that comes was asked for
        self._is_stuck = False

    def wait(self, wait_s: float) -> bool:
        """Waits at most `wait_s`. Returns True if the next group has come, or its disk is stuck."""
        self._read_ahead()
        self._since_s = self._since_s or monotonic()
        awaited = self._end_parts or self._coming
        pending = wait(awaited, max(wait_s, TAIL_S) if self._end_parts else wait_s).not_done
        if not pending:
            return True
        self._is_stuck = monotonic() > self._since_s + PATIENCE_S
        if self._is_stuck:
            log.error("the disk brought no saved prompts for %.0f s; this one is read anew", PATIENCE_S)
            self._on_stuck(pending.pop())
            self._rest.clear()
            while self._coming and not all(future.done() for future in self._coming):
                self._coming.pop()
        return self._is_stuck

    def advance(self) -> bool:
        """Copies the group that has come.

        Returns True after the last; an error leaves the groups before it.
        """
        if self._end_parts:
            # One that has not come is not waited for: its disk is stuck.
            found = [part.result() if part.done() else None for part in self._end_parts]
            return self._end(found[:1], found[1] if self._state else None)
        assert all(future.done() for future in self._coming), "nobody waits here"
        group: list[Block] = []
        while self._coming and (block := self._coming.popleft().result()):
            group.append(block)
        self._num_whole += len(group)
        is_last = len(group) < GROUP or not self._rest
        if is_last:
            self._rest.clear()
            self._coming.clear()
        if self._is_stuck:
            return self._end(group)
        self._fill(group)
        self._since_s = monotonic()
        self._read_ahead()
        if is_last:
            self._end_parts = [self._find_tail(self._num_whole)]
            if self._state:
                self._end_parts.append(self._look_up(self._state))
        return False

    def _end(self, blocks: Sequence[Block | None], state: Block | None = None) -> bool:
        self._fill([block for block in blocks if block])
        if state and self._cache.num_rows == state.start:
            self._cache.fill_state(state.payload, state.start)
        self._cache.trim(min(self._cache.length, self._most))
        return True

    def _read_ahead(self) -> None:
        """Ask for the next group, so that it is read while others compute."""
        while self._rest and len(self._coming) < GROUP:
            self._coming.append(self._look_up(self._rest.popleft()))

    def _fill(self, blocks: Sequence[Block]) -> None:
        if not blocks or blocks[-1].start + blocks[-1].tokens.size <= self._cache.length:
            return
        self._cache.trim(blocks[0].start)
        self._cache.fill_rows([block.payload for block in blocks], [block.tokens.size for block in blocks])

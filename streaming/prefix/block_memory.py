"""Blocks of saved KV in memory, least recently used first to go. Knows no model.

Owned by the prefix cache. The engine's thread puts and takes; the writer's thread takes, so a lock guards it.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable

from streaming.prefix.block_format import Block


class BlockMemory:
    """At most `max_bytes` of blocks."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def __len__(self) -> int:
        return len(self._blocks)

    def get(self, key: bytes) -> Block | None:
        """A block; its place in the order of use stays."""
        with self._lock:
            return self._blocks.get(key)

    def put(self, key: bytes, block: Block) -> None:
        """Keep a block, as the most recently used; others go where it needs their room."""
        if block.nbytes > self.max_bytes:
            return
        with self._lock:
            if key not in self._blocks:
                self._blocks[key] = block
                self._nbytes += block.nbytes
            self._blocks.move_to_end(key)
            while self._nbytes > self.max_bytes:
                self._nbytes -= self._blocks.popitem(last=False)[1].nbytes

    def drop(self, keys: Iterable[bytes]) -> None:
        """Forget these blocks."""
        with self._lock:
            for key in keys:
                if block := self._blocks.pop(key, None):
                    self._nbytes -= block.nbytes

    def use(self, chain: Iterable[bytes]) -> None:
        """Mark the blocks of a conversation, in order, as used now: its end will go before its start."""
        with self._lock:
            for key in reversed(list(chain)):
                if key in self._blocks:
                    self._blocks.move_to_end(key)

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._blocks.clear()
            self._nbytes = 0

    def check_integrity(self) -> None:
        """The books balance."""
        assert self._nbytes == sum(block.nbytes for block in self._blocks.values()) <= self.max_bytes

"""The owner of saved KV: what was computed once is found again, in memory first, then on the SSD.

Conversations are cut into blocks of 64 tokens, each named by a hash over all tokens up to its end, so that
whatever shares a beginning shares its blocks. The live end of a conversation, less than a block, is kept as a
short block of its own. Called by the engine's thread only; reads go through a few threads of its own, writes
happen behind it (`streaming/prefix/block_writer.py`).

What is exact: a restored row is bit for bit the row that was computed when it was saved. It need not be what
computing it again would give, because few rows and many round differently on the CPU; so a continuation from
the cache equals the uncached one in its text (tested), not in the last bits of its logits.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from models.attention.cache import SequenceCache
from models.attention.cache_blocks import bytes_per_token, read_blocks
from server.engine.prefix.restore import GROUP, Restoring
from server.engine.prefix.states import BLOCK_TOKENS, Way, find_way, state_after, state_block, state_name
from streaming.prefix.block_files import BlockFiles
from streaming.prefix.block_format import (
    HEADER_BYTES,
    Block,
    BlockName,
    Tokens,
    as_tokens,
    chain_key,
    root_key,
)
from streaming.prefix.block_memory import BlockMemory
from streaming.prefix.block_writer import BlockWriter
from streaming.prefix.pins import PinnedChain, list_pins

Known = TypeVar("Known")

READERS = 4
# Blocks beside those in `BlockMemory`: one group being copied, one being read.
TRANSIENT_BLOCKS = 2 * GROUP


@dataclass(frozen=True)
class DiskTier:
    """Where blocks outlive the process, and how much of them."""

    directory: Path
    max_bytes: int
    bytes_per_day: int


class PrefixCache:
    """Saved KV of one model."""

    def __init__(self, fingerprint: bytes, max_bytes: int, disk: DiskTier | None = None) -> None:
        """At most `max_bytes` of memory. Raises OSError where the directory cannot be made or read."""
        self._fingerprint = fingerprint
        self._files = BlockFiles(disk.directory, fingerprint, disk.max_bytes) if disk else None
        self._memory = BlockMemory(max_bytes)
        self._writer = (
            BlockWriter(self._files, self._memory, disk.bytes_per_day) if disk and self._files else None
        )
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="prefix-reader")
        # Tails do not stand behind groups: short prompts have nothing else.
        self._tail_reader = ThreadPoolExecutor(1, thread_name_prefix="prefix-tail")
        self._unanswered: Future[Block | None] | None = None  # a read that was waited for long enough
        self.num_asked_tokens = self.num_restored_tokens = self.num_saved_tokens = 0

    def restore(self, token_ids: Sequence[int], cache: SequenceCache, group: str = "") -> Restoring:
        """Begin to fill the cache with the longest saved beginning of a prompt; `note_restored` at its end.

        The last token is never among them: somebody has to compute what follows it. Only what was saved in
        the same `group` is found.
        """
        tokens = as_tokens(token_ids)
        names, root = self._names(tokens, group), self._root(group)

        def find_tail(num_whole: int) -> "Future[Block | None]":
            where = num_whole * BLOCK_TOKENS, _key_before(names, num_whole, root)
            if self._disk_answers:
                return self._tail_reader.submit(self._find_tail, tokens, *where, True)
            return _known(self._find_tail(tokens, *where, False))

        most = len(token_ids) - 1
        restoring = partial(Restoring, cache, block_tokens=BLOCK_TOKENS, most=most, look_up=self._look_up,
                            on_stuck=self._note_stuck)  # fmt: skip
        if not cache.keeps_state:
            return restoring(names=names, find_tail=find_tail)
        way = find_way(tokens, names, root, self._is_saved)
        if way.length <= cache.length:
            way = Way(0)
        tail = way.tail
        return restoring(
            names=names[: way.num_whole],
            find_tail=lambda _: self._look_up(tail) if tail else _known(None),
            state=way.state,
        )

    def note_restored(
        self, token_ids: Sequence[int], length_before: int, length: int, group: str = ""
    ) -> None:
        """Counts what was restored of a prompt, and marks its blocks as used."""
        tokens = as_tokens(token_ids[:length])
        names = self._names(tokens, group)
        self._use([*names, state_after(tokens, names, self._root(group))])
        self.num_asked_tokens += len(token_ids) - length_before
        self.num_restored_tokens += length - length_before

    def save(
        self,
        token_ids: Sequence[int],
        cache: SequenceCache,
        start: int = 0,
        keeps_tail: bool = False,
        group: str = "",
        keeps_state: bool = False,
    ) -> int:
        """Keep what the cache holds of these tokens from `start` on, where all before is saved already.

        With `keeps_tail` a last part of less than a block is kept too, with `keeps_state` the state behind
        it; states that the cache has kept are saved in any case. Returns the `start` of the next call, which
        is not the end where memory cannot take all of it now.
        """
        tokens = as_tokens(token_ids)[: cache.length]
        names, root = self._names(tokens, group), self._root(group)
        first = start // BLOCK_TOKENS
        stop = min(len(names), max(first, self._room_after(first, block_bytes(cache))))
        fresh: list[BlockName] = []
        for some in range(first, stop, GROUP):
            fresh += self._keep(tokens, names, root, cache, some, min(some + GROUP, stop))
        end = stop * BLOCK_TOKENS
        lengths = [length for length in cache.kept_lengths if length <= end]
        if keeps_tail and stop == len(names) and end < tokens.size:
            tail = Block(
                _key_before(names, len(names), root),
                end,
                tokens[end:].copy(),
                read_blocks(cache, end, [tokens.size - end])[0],
            )
            self._put(tail)
            fresh.append(tail.name)
            names.append(tail.name)
            stop += 1
        if keeps_state and stop == len(names):
            lengths.append(tokens.size)
        states = self._keep_states(tokens, names, root, cache, lengths)
        if fresh or states:
            self._use([*names[:stop], *states], [*fresh, *states])
        return end

    def _keep_states(
        self,
        tokens: Tokens,
        names: Sequence[BlockName],
        root: bytes,
        cache: SequenceCache,
        lengths: Sequence[int],
    ) -> list[BlockName]:
        """Puts the states that the cache keeps at these lengths into memory; the new ones' names."""
        fresh = []
        for length in lengths:
            name = state_after(tokens[:length], names, root)
            if self._memory.get(name.key) is None and (payload := cache.read_state(length)) is not None:
                self._memory.put(name.key, state_block(tokens[:length], names, root, payload))
                fresh.append(name)
        return fresh

    def discard_states(self, token_ids: Sequence[int], lengths: Sequence[int], group: str = "") -> None:
        """Forgets the states behind these lengths of a prompt; its blocks stay."""
        tokens = as_tokens(token_ids)
        names, root = self._names(tokens, group), self._root(group)
        self._forget([state_after(tokens[:length], names, root) for length in lengths])

    def _forget(self, names: Sequence[BlockName]) -> None:
        self._memory.drop(name.key for name in names)
        if self._files and self._writer:
            self._writer.call(partial(self._files.discard, names))

    def _is_saved(self, name: BlockName) -> bool:
        """Whether a block lies in memory, or on a disk that answers."""
        on_disk = self._files if self._disk_answers else None
        return self._memory.get(name.key) is not None or (on_disk is not None and on_disk.has(name))

    def names_from(self, token_ids: Sequence[int], start: int, group: str = "") -> list[BlockName]:
        """The whole blocks of a prompt that end behind its token `start`."""
        return self._names(as_tokens(token_ids), group)[start // BLOCK_TOKENS :]

    @staticmethod
    def end_of(name: BlockName) -> int:
        """Where a whole block ends."""
        return name.start + BLOCK_TOKENS

    def count_saved(self, token_ids: Sequence[int], group: str = "") -> int:
        """Tokens of this prompt that lie in memory, in whole blocks; the disk is not asked."""
        count = 0
        for name in self._names(as_tokens(token_ids), group):
            if self._memory.get(name.key) is None:
                break
            count += BLOCK_TOKENS
        return count

    def pin(self, token_ids: Sequence[int], is_pinned: bool = True, group: str = "") -> "Future[int]":
        """Keep the blocks of a prompt on disk, or no longer, whatever else wants their room; how many.

        It happens behind what waits to be written; blocks that are not there then are not pinned.
        """
        if not (self._files and self._writer):
            return _known(0)
        names = self._names(as_tokens(token_ids), group)
        return self._writer.call(partial(self._files.pin, names, is_pinned))

    def pins(self) -> "Future[tuple[PinnedChain, ...]]":
        """What is pinned, behind what waits to be written."""
        if not (self._files and self._writer):
            return _known(())
        return self._writer.call(partial(list_pins, self._files))

    def discard(self, token_ids: Sequence[int], group: str = "") -> None:
        """Forget the blocks of a prompt, its last part too, in memory at once and then on disk."""
        tokens = as_tokens(token_ids)
        names, root = self._names(tokens, group), self._root(group)
        end, parent = len(names) * BLOCK_TOKENS, _key_before(names, len(names), root)
        rest = tokens[end:]
        states = [state_name(name.key, self.end_of(name)) for name in names]
        names += [BlockName(chain_key(parent, rest[:size]), end) for size in range(1, rest.size + 1)]
        states += [
            state_name(name.key, end + i) for i, name in enumerate(names[end // BLOCK_TOKENS :], start=1)
        ]
        self._forget([*names, *states])

    def clear(self) -> "Future[int]":
        """Forget everything, in memory at once and then on disk, pinned or not; how many blocks that were."""
        self._memory.clear()
        if not (self._files and self._writer):
            return _known(0)
        self._writer.forget()
        return self._writer.call(self._files.clear)

    def close(self, timeout_s: float) -> None:
        """Writes what waits, for at most `timeout_s`, and ends the threads."""
        if self._writer:
            self._writer.close(timeout_s)
        for readers in (self._readers, self._tail_reader):
            readers.shutdown(cancel_futures=True)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was saved is on disk, or dropped; whether that came in time."""
        return self._writer.flush(timeout_s) if self._writer else True

    def check_integrity(self) -> None:
        """The books of memory balance."""
        self._memory.check_integrity()

    @property
    def memory_bytes(self) -> int:
        """Of the blocks in memory."""
        return self._memory.nbytes

    def statistics(self) -> dict[str, float]:
        """Counts since the start, and sizes now; names as in `server/api/admin/metrics.py`."""
        values: dict[str, float] = {
            "prefix_asked_tokens": self.num_asked_tokens,
            "prefix_restored_tokens": self.num_restored_tokens,
            "prefix_saved_tokens": self.num_saved_tokens,
            "prefix_memory_bytes": self._memory.nbytes,
            "used.prefix cache": self._memory.nbytes,
        }
        if self._files and self._writer:
            values |= {
                "prefix_disk_bytes": self._files.nbytes,
                "prefix_pinned_blocks": self._files.num_pinned,
                "prefix_bytes_written": self._files.bytes_written,
                "prefix_bytes_read": self._files.bytes_read,
                "prefix_evictions": self._files.num_evicted,
                "prefix_damaged": self._files.num_damaged,
                "prefix_errors": self._files.num_errors,
                "prefix_blocks_dropped": self._writer.num_dropped,
            }
        return values

    def _root(self, group: str) -> bytes:
        """The parent of a group's first blocks: no block of one group is named as one of another."""
        return root_key(self._fingerprint, group)

    def _names(self, tokens: Tokens, group: str) -> list[BlockName]:
        """The names of all whole blocks."""
        names, key = [], self._root(group)
        for start in range(0, tokens.size - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            key = chain_key(key, tokens[start : start + BLOCK_TOKENS])
            names.append(BlockName(key, start))
        return names

    @property
    def _disk_answers(self) -> bool:
        """Else each prompt would wait anew for a disk that is stuck."""
        return self._files is not None and (self._unanswered is None or self._unanswered.done())

    def _note_stuck(self, read: "Future[Block | None]") -> None:
        self._unanswered = read

    def _find_tail(self, tokens: Tokens, start: int, parent: bytes, asks_disk: bool) -> Block | None:
        """The longest short block there; looking for files that are not there takes a millisecond."""
        rest = tokens[start : start + BLOCK_TOKENS - 1]
        for size in range(rest.size, 0, -1):
            name = BlockName(chain_key(parent, rest[:size]), start)
            if block := self._memory.get(name.key) or (asks_disk and self._read(name)):
                return block
        return None

    def _look_up(self, name: BlockName) -> "Future[Block | None]":
        block = self._memory.get(name.key)
        if block is None and self._disk_answers:
            return self._readers.submit(self._read, name)
        return _known(block)

    def _read(self, name: BlockName) -> Block | None:
        assert self._files, "only a cache with a directory reads"
        block = self._files.read(name)
        if block:
            self._memory.put(name.key, block)
        return block

    def _keep(
        self,
        tokens: Tokens,
        names: Sequence[BlockName],
        root: bytes,
        cache: SequenceCache,
        first: int,
        stop: int,
    ) -> list[BlockName]:
        """Put those of the blocks `first` to `stop` into memory that are not there; which they were."""
        if all(self._memory.get(name.key) for name in names[first:stop]):
            return []
        payloads = read_blocks(cache, first * BLOCK_TOKENS, [BLOCK_TOKENS] * (stop - first))
        for index, payload in enumerate(payloads, start=first):
            start = index * BLOCK_TOKENS
            ids = tokens[start : start + BLOCK_TOKENS].copy()  # else it holds those of the whole conversation
            self._put(Block(_key_before(names, index, root), start, ids, payload))
        return list(names[first:stop])

    def _room_after(self, first: int, nbytes: int) -> int:
        """The block up to which those from `first` on fit beside what is still to be written, and a tail.

        More would drive out the beginning of their own chain, without which the rest is never found.
        """
        room = self._memory.max_bytes // nbytes - 1
        return first + room - self._writer.num_waiting if self._writer else room

    def _put(self, block: Block) -> None:
        self._memory.put(block.name.key, block)
        self.num_saved_tokens += block.tokens.size

    def _use(self, chain: Sequence[BlockName], fresh: Sequence[BlockName] = ()) -> None:
        self._memory.use(name.key for name in chain)
        if self._writer and chain:
            self._writer.write(fresh, chain)


def _key_before(names: Sequence[BlockName], index: int, root: bytes) -> bytes:
    return names[index - 1].key if index else root


def _known(value: Known) -> "Future[Known]":
    future: Future[Known] = Future()
    future.set_result(value)
    return future


def block_bytes(cache: SequenceCache) -> int:
    """Memory of one block."""
    return HEADER_BYTES + BLOCK_TOKENS * (4 + bytes_per_token(cache))

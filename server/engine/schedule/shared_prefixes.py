"""Saved prefixes in the engine: looked up on admission, saved after each part and at a sequence's end.

All calls come from the engine's thread, between steps. `SavedPrefixes` also sees to it that what several
prompts have in common is read once: the first reads it, the others go on behind it or wait for it.
"""

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from itertools import takewhile
from time import monotonic
from typing import Protocol, TypeVar

from server.engine.faults import Contained
from server.engine.prefix.lookup import PrefixCache
from server.engine.prefix.states import BLOCK_TOKENS
from server.engine.schedule.sequence import Sequence, State
from server.link.messages import Administer, Administered, Pin
from streaming.prefix.block_format import BlockName
from streaming.prefix.pins import PinnedChain

# How long blocks are copied between two steps: half a step of the target.
COPY_S = 0.2
# The same while no step waits: sequences that are restored in time share a pass, and a second pass takes 18 s
# on the target. On two virtual cores 20,000 of its tokens are copied in this time.
LONE_COPY_S = 2.0
# How long a disk is waited for then, before commands are looked at again.
DISK_WAIT_S = 0.05
# A state of GLM-5.3-Flash is worth 12,000 tokens of rows: such a grid costs less than the rows between.
STATE_GRID = 16_384

Given = TypeVar("Given")

log = logging.getLogger(__name__)


class Prefixes(Protocol):
    """Keeps rows of caches beyond the life of a sequence."""

    keeps_rows: bool  # whether a pass that nobody waits for is worth its end

    def restore(self, sequence: Sequence) -> None:
        """Begins to fill the empty cache with the longest saved prefix, short of the last token.

        The sequence is held until `settle` has come to its end. At least one token stays unread, so that
        there are logits to go on from.
        """

    def save(self, sequence: Sequence) -> None:
        """Keeps what is worth it of the rows that a pass has added, or of a sequence that ends."""

    def settle(self, sequences: Iterable[Sequence], is_alone: bool) -> list[Sequence]:
        """Lets sequences go on whose leader has read what they share, or has gone; restores more blocks.

        `is_alone`: no sequence decodes and no pass is under way, so there is time to wait for a disk. Returns
        the sequences that are restored completely: their `num_cached_tokens` are known.
        """

    def distrust(self, sequence: Sequence) -> None:
        """With what was restored of it the model computed NaN: forget that, and restore no more of it."""

    def note_followed(self, sequence: Sequence, length_before: int) -> None:
        """Counts what a sequence adopted in its leader's pass; it had held `length_before` tokens."""

    def administer(self, command: Administer) -> "Future[Administered]":
        """Forgets all saved prompts, pins one, or lists those that are pinned; what came of it."""


class NoPrefixes:
    """Every prompt is read from its start."""

    keeps_rows = False

    def restore(self, sequence: Sequence) -> None:
        """Nothing was saved."""

    def save(self, sequence: Sequence) -> None:
        """Nothing is kept."""

    def settle(self, sequences: Iterable[Sequence], is_alone: bool) -> list[Sequence]:
        """No sequence waits for another."""
        return []

    def distrust(self, sequence: Sequence) -> None:
        """Nothing was restored."""

    def note_followed(self, sequence: Sequence, length_before: int) -> None:
        """No sequence follows another."""

    def administer(self, command: Administer) -> "Future[Administered]":
        """There is nothing to change."""
        future: Future[Administered] = Future()
        future.set_result(Administered(command.request_id))
        return future


class SavedPrefixes:
    """Prefixes from a `PrefixCache`.

    A sequence that is admitted claims the blocks that it is about to read. One that comes later, and would
    read a block next that is claimed, gets a leader: the one that has claimed the last of the blocks in a row
    that others will have read. It waits until those are saved, or goes on behind the leader in the pass that
    reads them, and claims what comes after them.
    """

    keeps_rows = True

    def __init__(self, saved: PrefixCache) -> None:
        self._saved = saved
        self._claims: dict[BlockName, Sequence] = {}

    def restore(self, sequence: Sequence) -> None:
        """Begins to fill the cache with saved rows. They are copied in `settle`, some between two steps."""
        sequence.running_cache.want(_save_points(sequence))
        if not sequence.trusts_saved:
            return
        with Contained(partial(_read_anew, sequence)):
            tokens = sequence.tokens(0, sequence.num_tokens)
            group = sequence.cache_group
            sequence.restore(self._saved.restore(tokens, sequence.running_cache, group))

    def save(self, sequence: Sequence) -> None:
        """Keep whole blocks, and the last part of one where the sequence will not fill it soon."""
        cache = sequence.running_cache
        is_pausing = sequence.is_cancelled or sequence.num_unread <= 1
        tokens = sequence.tokens(0, cache.length)
        start, group = sequence.num_saved_tokens, sequence.cache_group
        is_ending = cache.keeps_state and is_pausing and bool(sequence.generated)
        sequence.num_saved_tokens = self._saved.save(tokens, cache, start, is_pausing, group, is_ending)
        if is_ending and sequence.num_saved_tokens == cache.length - cache.length % BLOCK_TOKENS:
            self._saved.discard_states(tokens, _superseded(sequence), group)

    def distrust(self, sequence: Sequence) -> None:
        """Forgets the blocks that were restored of it, and the one of which they may be a part."""
        tokens = sequence.tokens(0, sequence.num_restored_tokens + 1)
        self._saved.discard(tokens, sequence.cache_group)
        sequence.trusts_saved = False
        sequence.num_restored_tokens = sequence.num_saved_tokens = sequence.num_cached_tokens = 0

    def settle(self, sequences: Iterable[Sequence], is_alone: bool) -> list[Sequence]:
        """Look again for those whose leader is done with what they share; then restore, by admission.

        One after the other, because so much memory is set aside for blocks between disk and cache.
        """
        held = self._release(sequences)
        restored: list[Sequence] = []
        wait_s, copy_s = (DISK_WAIT_S, LONE_COPY_S) if is_alone else (0.0, COPY_S)
        until_s = monotonic() + copy_s
        while held and (restoring := held[0].restoring):
            is_ready = False
            with Contained(partial(_read_anew, held[0])) as attempt:
                is_ready = restoring.wait(wait_s)
                if is_ready and restoring.advance():
                    restored.append(held.pop(0))
                    self._complete(restored[-1], restoring.length_before)
            if attempt.failed or not is_ready or monotonic() > until_s:
                break  # commands are looked at, and sequences that are complete have steps now
        return restored

    def _release(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Sequences that are being restored, among them those whose leader is done."""
        restoring: list[Sequence] = []
        for sequence in sequences:
            leader = sequence.leader
            if leader and not (leader.is_before_decoding and leader.num_saved_tokens < sequence.follows_to):
                self.restore(sequence)
            if sequence.state is State.RESTORING:
                restoring.append(sequence)
        return restoring

    def administer(self, command: Administer) -> "Future[Administered]":
        """Forgets all saved prompts, pins one, or lists those that are pinned; what came of it."""
        name, ids, group = command.request_id, command.token_ids, command.cache_group
        match command.action:
            case "clear":
                return _then(self._saved.clear(), lambda count: Administered(name, count))
            case "pins":
                return _then(self._saved.pins(), lambda found: Administered(name, len(found), _told(found)))
            case action:
                pinned = self._saved.pin(ids, action == "pin", group)
                return _then(pinned, lambda count: Administered(name, count))

    def _complete(self, sequence: Sequence, length_before: int) -> None:
        """Ends the restoring; the sequence may follow one that reads on from there, or claims blocks."""
        sequence.read_on()
        after = sequence.running_cache.length
        self._note_cached(sequence, length_before, after)
        sequence.num_saved_tokens = after
        sequence.num_restored_tokens = after if after > length_before else 0
        self._claim(sequence)

    def note_followed(self, sequence: Sequence, length_before: int) -> None:
        """As far as the leader's part was saved, what is adopted need not be: memory may have had no room."""
        assert sequence.leader, "only those have followed that have a leader"
        self._note_cached(sequence, length_before, sequence.follows_to)
        sequence.num_restored_tokens = sequence.follows_to
        saved = min(sequence.leader.num_saved_tokens, sequence.follows_to)
        sequence.num_saved_tokens = max(sequence.num_saved_tokens, saved)

    def _note_cached(self, sequence: Sequence, before: int, after: int) -> None:
        tokens = sequence.tokens(0, sequence.num_tokens)
        self._saved.note_restored(tokens, before, after, sequence.cache_group)
        is_first_time = not sequence.generated and before >= sequence.num_saved_tokens
        if is_first_time:  # or nearly: what followed and was not saved may be adopted once more
            sequence.num_cached_tokens = min(sequence.num_cached_tokens + after - before, after)

    def _claim(self, sequence: Sequence) -> None:
        # Its own are of an earlier place, which it gave away: it would wait for itself.
        self._claims = {
            name: owner
            for name, owner in self._claims.items()
            if owner is not sequence
            and owner.is_before_decoding
            and self._saved.end_of(name) > owner.num_saved_tokens
        }
        prompt = sequence.tokens(0, sequence.num_tokens)
        names = self._saved.names_from(prompt, sequence.running_cache.length, sequence.cache_group)
        shared = list(takewhile(self._claims.__contains__, names))
        if shared:
            # At least one token stays unread, so that there are logits to go on from.
            follows_to = min(self._saved.end_of(shared[-1]), sequence.num_tokens - 1)
            follows_to -= follows_to % sequence.running_cache.grain
            if follows_to > sequence.running_cache.length:
                sequence.follow(self._claims[shared[-1]], follows_to)
        self._claims |= {name: sequence for name in names[len(shared) :] if name not in self._claims}


def _save_points(sequence: Sequence) -> list[int]:
    """Lengths at which a state is worth saving, all at the end of whole blocks.

    They are the end of the system prompt and its tools, the last turn's end, the prompt's, and a coarse grid.
    A turn begins with a token at which answers stop.
    """
    prompt, stops = sequence.request.token_ids, set(sequence.request.stop_token_ids)
    begins = [at for at, token in enumerate(prompt) if token in stops]
    ends = [*begins[:1], *begins[-1:], len(prompt) - 1, *range(STATE_GRID, len(prompt), STATE_GRID)]
    return sorted({end - end % BLOCK_TOKENS for end in ends} - {0})


def _superseded(sequence: Sequence) -> list[int]:
    """Lengths whose states the one at the sequence's end makes needless, if there are any."""
    length = sequence.running_cache.length
    ends = {sequence.num_restored_tokens, *range(BLOCK_TOKENS, length, BLOCK_TOKENS)}
    return sorted(ends - {0, length, *_save_points(sequence)})


def _read_anew(sequence: Sequence, error: Exception) -> None:
    """Lets a sequence compute the rows that could not be restored."""
    log.error("a saved prefix could not be restored; its prompt is read", exc_info=error)
    sequence.read_on()


def _then(before: "Future[Given]", make: Callable[[Given], Administered]) -> "Future[Administered]":
    """A future for what `make` makes of the result of another one."""
    after: Future[Administered] = Future()

    def settle(done: "Future[Given]") -> None:
        if error := done.exception():
            after.set_exception(error)
        else:
            after.set_result(make(done.result()))

    before.add_done_callback(settle)
    return after


def _told(chains: Iterable[PinnedChain]) -> tuple[Pin, ...]:
    return tuple(Pin(**vars(chain)) for chain in chains)

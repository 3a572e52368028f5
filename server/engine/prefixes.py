"""Where saved prefixes join the engine: after a sequence is admitted, after each part, and at its end.

All calls come from the engine's thread, between steps. `SavedPrefixes` also sees to it that what several
prompts have in common is read once: the first reads it, the others wait for it.
"""

from collections.abc import Iterable
from typing import Protocol

from models.cache import SequenceCache
from server.engine.messages import Administer
from server.engine.prefix import PrefixCache
from server.engine.sequence import Sequence
from streaming.prefix_format import BlockName


class Prefixes(Protocol):
    """Keeps rows of caches beyond the life of a sequence."""

    keeps_rows: bool  # whether a pass that nobody waits for is worth its end

    def restore(self, sequence: Sequence) -> None:
        """Fill the empty cache with the longest saved prefix, short of the last token; say how much it was.

        Sets `num_cached_tokens`. At least one token stays unread, so that there are logits to go on from.
        """

    def save(self, sequence: Sequence) -> None:
        """Rows were added by a part of a prompt, or the sequence is over: keep what is worth it."""

    def settle(self, sequences: Iterable[Sequence]) -> None:
        """Let those go on whose `leader` has read what they waited for, or has gone."""

    def administer(self, command: Administer) -> None:
        """Forget all, or keep a prompt whatever comes."""


class NoPrefixes:
    """Every prompt is read from its start."""

    keeps_rows = False

    def restore(self, sequence: Sequence) -> None:
        """Nothing was saved."""

    def save(self, sequence: Sequence) -> None:
        """Nothing is kept."""

    def settle(self, sequences: Iterable[Sequence]) -> None:
        """Nobody waits for another."""

    def administer(self, command: Administer) -> None:
        """There is nothing to change."""


class SavedPrefixes:
    """Prefixes from a `PrefixCache`.

    A sequence that is admitted claims the blocks that it is about to read. One that comes later, and would
    read a block next that is claimed, gets the claimant for its leader: it reads nothing until that block and
    all after it that both share are saved. Whoever has a leader claims nothing, so nobody waits in a circle.
    """

    keeps_rows = True

    def __init__(self, saved: PrefixCache) -> None:
        self._saved = saved
        self._claims: dict[BlockName, Sequence] = {}

    def restore(self, sequence: Sequence) -> None:
        """Fill the cache, then claim the rest of the prompt or follow the one that has."""
        cache = _cache_of(sequence)
        before = cache.length
        after = self._saved.restore(sequence.tokens(0, sequence.num_tokens), cache)
        is_first_time = not sequence.generated and before >= sequence.num_saved_tokens
        if is_first_time:
            sequence.num_cached_tokens += after - before
        sequence.num_saved_tokens = after
        self._claim(sequence)

    def save(self, sequence: Sequence) -> None:
        """Keep whole blocks, and the last part of one where the sequence will not fill it soon."""
        cache = _cache_of(sequence)
        is_pausing = sequence.is_cancelled or sequence.num_unread <= 1
        tokens = sequence.tokens(0, cache.length)
        sequence.num_saved_tokens = self._saved.save(tokens, cache, sequence.num_saved_tokens, is_pausing)

    def settle(self, sequences: Iterable[Sequence]) -> None:
        """Look again for those whose leader is done with what they share."""
        for sequence in sequences:
            leader = sequence.leader
            if leader and (leader.cache is None or leader.num_saved_tokens >= sequence.follows_to):
                sequence.leader = None
                self.restore(sequence)

    def administer(self, command: Administer) -> None:
        """Forget all, or keep a prompt whatever comes."""
        match command.action:
            case "clear":
                self._saved.clear()
            case "pin":
                self._saved.pin(command.token_ids)
            case "unpin":
                self._saved.pin(command.token_ids, is_pinned=False)

    def _claim(self, sequence: Sequence) -> None:
        self._claims = {name: owner for name, owner in self._claims.items() if _is_reading(owner, name)}
        prompt = sequence.tokens(0, sequence.num_tokens)
        names = self._saved.names_from(prompt, _cache_of(sequence).length)
        leader = self._claims.get(names[0]) if names else None
        if leader is None:
            self._claims |= {name: sequence for name in names if name not in self._claims}
            return
        shared = [name for name in names if self._claims.get(name) is leader]
        sequence.leader, sequence.follows_to = leader, self._saved.end_of(shared[-1])


def _is_reading(owner: Sequence, name: BlockName) -> bool:
    return owner.cache is not None and owner.num_saved_tokens <= name.start


def _cache_of(sequence: Sequence) -> SequenceCache:
    assert sequence.cache is not None, "only sequences that run have rows"
    return sequence.cache

"""Where saved prefixes join the engine: after a sequence is admitted, after each part, and at its end.

All calls come from the engine's thread, between steps.
"""

from typing import Protocol

from server.engine.sequence import Sequence


class Prefixes(Protocol):
    """Keeps rows of caches beyond the life of a sequence."""

    def restore(self, sequence: Sequence) -> None:
        """Fill the empty cache with the longest saved prefix, short of the last token; say how much it was.

        Sets `num_cached_tokens`. At least one token stays unread, so that there are logits to go on from.
        """

    def save(self, sequence: Sequence) -> None:
        """Rows were added by a part of a prompt, or the sequence is over: keep what is worth it."""


class NoPrefixes:
    """Every prompt is read from its start."""

    def restore(self, sequence: Sequence) -> None:
        """Nothing was saved."""

    def save(self, sequence: Sequence) -> None:
        """Nothing is kept."""

"""What the MoE layer asks of whoever holds its experts. Owns nothing.

Called by `models.experts.experts`; `streaming.store.ExpertStore` is a source, and tests have one in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from streaming.fills import Fetch
from streaming.sweep import Place


class ExpertSource(Protocol):
    """Where experts are: banks of slots, one bank a layer. `streaming.store.ExpertStore` is one."""

    @property
    def is_resident(self) -> bool:
        """True when expert i lies in slot i of every layer and never moves."""
        ...

    def num_slots(self, layer: int) -> int: ...

    def bank(self, layer: int) -> Mapping[str, mx.array]:
        """Part name, as in `gate_proj.weight`, -> array [slots, ...]."""
        ...

    def slot_table(self, layer: int) -> mx.array | None:
        """Each expert's slot, int32 [E] on the device, where all have one; else None."""
        ...

    def count_hits(self, num_pairs: int) -> None:
        """So many (row, expert) pairs were looked up in a slot table."""
        ...

    def watches_scores(self, layer: int) -> bool:
        """Whether `observe` is worth calling."""
        ...

    def looks_ahead(self, layer: int) -> bool:
        """Whether `expect` is worth calling."""
        ...

    def begin(self, layer: int, experts: Sequence[int]) -> Fetch:
        """Starts to bring these experts (unique, ascending, at most num_slots): a `Fetch` for `finish`.

        It is finished before the next call, until which they stay. The caller guarantees that no product
        which names a slot of this layer is still to be evaluated.
        """
        ...

    def finish(self, fetch: Fetch) -> None:
        """Waits until all experts of the fetch are in their slots."""
        ...

    def take_turns(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
        """The same for more than num_slots: some at a time, ascending, and their slots.

        The caller evaluates every product with them before it asks for the next.
        """
        ...

    def sweep(self, layer: int, rows_of: Mapping[int, int], at_once: int) -> Iterator[Sequence[Place]]:
        """All experts that many rows want, in ascending id, in groups of at most `at_once`.

        `rows_of`: how many rows want each. The caller evaluates every product with a group before it asks
        for the next, and has none with this layer pending when it asks for the first.
        """
        ...

    def anticipate_sweep(self, layer: int) -> None:
        """All experts of the layer will be wanted: what is not there may be read while others compute."""
        ...

    def observe(self, layer: int, scores: NDArray[np.float32]) -> None:
        """By what the router chose among all experts, [N, E]."""
        ...

    def expect(self, layer: int, ranks: Sequence[Sequence[int]]) -> None:
        """A guess at what is asked for next, `ranks[0]` likeliest; the same guarantee as for `begin`."""
        ...

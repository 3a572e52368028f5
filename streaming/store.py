"""The routed experts of all layers: which are resident, in which slot, and how the others get there.

Owns the layers, each with its bank and books, and the reader. Made and called on one thread, the engine's;
MLX arrays are bound to the thread that makes them. The reader's threads touch bytes only, under a ticket.

A caller that computes lazily with a layer's slots holds the layer's `Lease`, and releases it before it asks
for other experts of that layer.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from config.errors import CheckpointError, DiskError
from config.plan import MIN_RING_SLOTS
from streaming.banks import BankMaker
from streaming.disk.disk import DirectDisk, Disk
from streaming.disk.reader import NUM_THREADS, TIMEOUT_S
from streaming.eviction.policy import LeastRecentlyUsed, Policy
from streaming.files.index import ExpertIndex
from streaming.fills import Fetch, Filler
from streaming.layer import Lease, StoreLayer
from streaming.overflow import Turn, take_turns
from streaming.residency import Residency
from streaming.ring import Ring
from streaming.statistics import LayerHeat, StoreStatistics
from streaming.sweep import Place, Sweeper, resident_groups

# Experts that `load_all` asks for in one go: enough to keep every reader busy.
LOADED_AT_ONCE = 32


class ExpertStore:
    """Hands out slots that hold the experts asked for."""

    def __init__(
        self,
        index: ExpertIndex,
        slots_per_layer: int | Mapping[int, int],
        *,
        float_dtype: mx.Dtype,
        disk: Disk | None = None,
        make_policy: Callable[[], Policy] = LeastRecentlyUsed,
        num_threads: int = NUM_THREADS,
        timeout_s: float = TIMEOUT_S,
        shares_memory: bool | None = None,
        looks_ahead: bool = True,
        ring_slots: int = MIN_RING_SLOTS,
    ) -> None:
        if isinstance(slots_per_layer, int):
            slots_per_layer = dict.fromkeys(index.layers, slots_per_layer)
        num_slots = {layer: min(slots_per_layer[layer], len(index.experts)) for layer in index.layers}
        maker = BankMaker(float_dtype, is_shared=shares_memory)
        self._index = index
        self._is_loaded = False  # all experts have a slot for good
        self._looks_ahead = looks_ahead and maker.is_shared
        self.fills_in_place = maker.is_shared
        self._after = dict(zip(index.layers, [*index.layers[1:], None], strict=True))
        self._unfinished: Fetch | None = None
        self._turns: Generator[Turn] | None = None
        self._counts = StoreStatistics()
        try:
            self._filler = Filler(index, disk or DirectDisk(), num_threads=num_threads, timeout_s=timeout_s)
        except DiskError as error:
            raise CheckpointError(str(error)) from error
        self._layers = {
            layer: StoreLayer(
                layer,
                maker.make(index.parts(layer), count, index.leads(layer)),
                Residency(make_policy(), count, partial(self._filler.is_written, layer)),
                self._filler,
                index.expert_bytes(layer),
                self._counts,
            )
            for layer, count in num_slots.items()
        }
        self._ring = Ring(index, self._filler, maker.make, ring_slots)
        self._sweeper = Sweeper(index, self._ring, self._counts)

    @property
    def is_resident(self) -> bool:
        """Whether expert i lies in slot i of every layer, and stays there."""
        return self._is_loaded and len(self._index.experts) == self._index.num_experts

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that have experts, in order."""
        return self._index.layers

    def watches_scores(self, layer: int) -> bool:
        """Whether the policy wants the router's scores; not where every expert has a slot of its own."""
        books = self._layers[layer].books
        return books.watches_scores and books.num_slots < len(self._index.experts)

    def look_ahead(self, is_on: bool) -> None:
        """Reads experts that are probably wanted next, or does not; what is under way is used or dropped."""
        self._looks_ahead = is_on and self.fills_in_place

    def read_straight(self, is_on: bool) -> None:
        """Reads straight into slots where an expert's bytes lie aligned, or through the reader's buffers."""
        self._filler.reads_straight = is_on

    def looks_ahead(self, layer: int) -> bool:
        """Whether `expect` may lead to reads: there are experts that are not there."""
        return self._looks_ahead and len(self._layers[layer].books) < len(self._index.experts)

    def lease(self, layer: int) -> Lease:
        """What a caller holds while lazy products name slots of the layer."""
        return self._layers[layer].lease

    def slot_table(self, layer: int) -> mx.array | None:
        """Each expert's slot, int32 [experts], where all of the layer have one; else None."""
        return self._layers[layer].slot_table(self._index.num_experts)

    def count_hits(self, num_pairs: int) -> None:
        """Counts hits of (row, expert) pairs whose slots were found in a table."""
        self._counts.hits += num_pairs

    def heat(self) -> dict[int, LayerHeat]:
        """Returns for each layer what decode steps asked of it, expert by expert."""
        return {layer: state.heat(self._index.num_experts) for layer, state in self._layers.items()}

    def load_all(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Makes every expert resident, in ascending order; only for a store that was never used.

        `on_progress` hears how many layers are done, of how many.
        """
        experts = self._index.experts
        for number, (layer, state) in enumerate(self._layers.items(), start=1):
            assert state.books.num_slots == len(experts), "there are fewer slots than experts"
            assert not len(state.books), "experts that came one by one lie in slots of other numbers"
            for first in range(0, len(experts), LOADED_AT_ONCE):
                self.acquire(layer, experts[first : first + LOADED_AT_ONCE])
            on_progress(number, len(self._layers))
        self._is_loaded = True

    def bring_back(self, layer: int, experts: Sequence[int]) -> int:
        """Reads these experts, the most worth last, into slots that are free. Returns how many were read.

        For a time when nobody asks for any: counts neither hits nor misses. Raises as `acquire` does.
        """
        self._abandon_unfinished()
        wanted = [expert for expert in experts if expert in self._index.experts]
        return self._layers[layer].bring_back(list(dict.fromkeys(wanted)))

    def least_worth_first(self) -> dict[int, list[int]]:
        """The resident experts of each layer, as its policy would give them up."""
        return {
            layer: state.books.least_worth_first(state.books.residents)
            for layer, state in self._layers.items()
        }

    def num_slots(self, layer: int) -> int:
        return self._layers[layer].books.num_slots

    @property
    def ring_bytes(self) -> int:
        """What the ring takes in memory."""
        return self._ring.nbytes

    @property
    def total_slots(self) -> int:
        return sum(state.books.num_slots for state in self._layers.values())

    @property
    def slot_bytes(self) -> int:
        """Memory of all slots."""
        banks = (state.bank.arrays for state in self._layers.values())
        return sum(array.nbytes for arrays in banks for array in arrays.values())

    @property
    def reader_bytes(self) -> int:
        """Memory of the reader's buffers."""
        return self._filler.memory_bytes

    @property
    def num_resident(self) -> int:
        return sum(len(state.books) for state in self._layers.values())

    def bank(self, layer: int) -> Mapping[str, mx.array]:
        """The layer's live arrays by part name, `[slots, ...]`."""
        return self._layers[layer].bank.arrays

    def acquire(self, layer: int, experts: Sequence[int]) -> npt.NDArray[np.int32]:
        """The slots that hold these experts (unique, ascending), once all of them are resident.

        DiskError names what could not be read; the experts that did arrive stay, and asking again tries
        again.
        """
        fetch = self.begin(layer, experts)
        self.finish(fetch)
        return fetch.slots

    def begin(self, layer: int, experts: Sequence[int]) -> Fetch:
        """Starts to bring these experts (unique, ascending); what is here can be computed with at once.

        Where a bank is filled by scatter, everything is here when this returns.
        """
        state = self._released(layer)
        assert len(experts) <= state.books.num_slots, "more experts were asked for than the layer has slots"
        self._abandon_unfinished()
        fills = state.begin(experts)
        slot_of = {fill.expert: fill.slot for fill in fills}
        is_here = [expert not in slot_of for expert in experts]
        slots = [slot_of[e] if e in slot_of else state.books.slot(e) for e in experts]
        fetch = Fetch(layer, np.array(slots, np.int32), np.array(is_here), tuple(fills))
        self._unfinished = fetch if fills else None
        return fetch

    def finish(self, fetch: Fetch) -> None:
        """Returns when every expert of the fetch is in its slot. Raises as `acquire` does."""
        if not fetch.fills:
            return
        assert fetch is self._unfinished, "a fetch is finished once, before another begins"
        self._unfinished = None
        self._layers[fetch.layer].wait(fetch.fills)

    def take_turns(self, layer: int, experts: Sequence[int]) -> Iterator[Turn]:
        """More experts (unique, ascending) than the layer has slots, some at a time, with their slots.

        Every product with the last ones is evaluated before the next are asked for. Raises as `acquire` does.
        """
        self._abandon_unfinished()
        self._turns = take_turns(self._released(layer), experts)
        return self._turns

    def sweep(self, layer: int, rows_of: Mapping[int, int], at_once: int) -> Iterator[Sequence[Place]]:
        """All experts that a prompt wants, in ascending id, in groups of at most `at_once`, each read once.

        `rows_of`: how many rows want each. Every product with a group is evaluated before the next is asked
        for. Raises as `acquire` does.
        """
        self._abandon_unfinished()
        state = self._released(layer)
        if self._is_loaded:
            return resident_groups(state.bank.arrays, rows_of, at_once, state.books.slot)
        state.wait(list(state.join_ahead(tuple(rows_of)).values()))
        after = self._after[layer]
        following = None if after is None else self._layers[after]
        return self._sweeper.sweep(state, following, rows_of, at_once)

    def num_groups(self, num_experts: int, at_once: int) -> int:
        """In how many groups `sweep` brings so many experts."""
        return -(-num_experts // (at_once if self._is_loaded else self._sweeper.group_size(at_once)))

    def anticipate_sweep(self, layer: int) -> None:
        """A sweep will want all experts of the layer: the ring reads what it can hold, if it is free."""
        self._sweeper.anticipate(self._layers[layer])

    def observe(self, layer: int, scores: npt.NDArray[np.float32]) -> None:
        """Tells the policy the router's scores of all experts, `[tokens, experts]`."""
        self._layers[layer].books.observe(scores)

    def expect(self, layer: int, ranks: Sequence[Sequence[int]], distance: int = 1) -> None:
        """Starts to read experts that may be asked for next; `ranks[0]` is the likeliest of each row.

        `distance`: how many layers earlier that was guessed; guesses are judged by it.
        The reads give way to those that a step waits for. Their errors reach nobody: a step that needs the
        expert reads it again.
        """
        self._released(layer).expect(ranks, distance)

    def resize(self, layer: int, num_slots: int) -> None:
        """Moves a layer into a bank of `num_slots` slots; between passes, or between two layers of one.

        What is resident stays, but for those that the policy gives up first. Both banks are in memory
        meanwhile; then the old one goes back to the system. An error, of memory that is not there, leaves
        the old one. What a sweep has read ahead for this layer lies in the ring and is used as before.
        """
        assert not self._is_loaded, "where all experts have slots for good there is nothing to resize"
        self._abandon_unfinished()
        try:
            self._released(layer).resize(min(num_slots, len(self._index.experts)))
        finally:
            mx.clear_cache()

    def follow(self, make_policy: Callable[[], Policy]) -> None:
        """Gives each layer another policy, which takes over what is resident; between layers of a pass."""
        self._abandon_unfinished()
        for state in self._layers.values():
            state.books.follow(make_policy())

    def statistics(self) -> StoreStatistics:
        reads = self._filler.statistics
        return replace(
            self._counts,
            payload_bytes=self._counts.payload_bytes + self._ring.unused_bytes,
            evictions=sum(state.books.num_evictions for state in self._layers.values()),
            device_bytes=reads.device_bytes,
            read_s=reads.busy_s,
            num_reads=reads.num_reads,
            num_timeouts=reads.num_timeouts,
        )

    def check_integrity(self) -> None:
        """Balances the books; nobody writes into a slot that no fill has taken."""
        assert self._unfinished is None, "a fetch was begun and not finished"
        under_way = [fill for state in self._layers.values() for fill in state.under_way]
        is_reading = bool(under_way) or self._ring.is_reading or self._filler.is_reading_voided
        assert is_reading or self._filler.num_writers() == 0, "a thread is in a slot that nobody waits for"
        self._ring.check()
        for state in self._layers.values():
            state.check()

    def close(self) -> None:
        self._filler.close()

    def _released(self, layer: int) -> StoreLayer:
        state = self._layers[layer]
        assert state.lease.is_released, "products that read slots of the layer are not evaluated yet"
        return state

    def _abandon_unfinished(self) -> None:
        """Takes back slots of a fetch, or of turns, whose computation failed before it was finished."""
        if self._turns is not None:
            self._turns.close()
        if (fetch := self._unfinished) is not None:
            self._unfinished = None
            for fill in fetch.fills:
                self._layers[fetch.layer].give_up(fill)

"""The routed experts of all layers: which are resident, in which slot, and how the others get there.

Owns residency, the banks, the policies and the reader. Made and called on one thread, the engine's; MLX
arrays are bound to the thread that makes them. The reader's threads touch bytes only, under a ticket.

The caller promises that every gather that names a slot of a layer was evaluated before it calls `acquire`
for that layer again: a lazy gather reads the slot as it is when it is evaluated.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from config.errors import CheckpointError, DiskError
from streaming.banks import Bank, BankMaker
from streaming.disk import DirectDisk, Disk
from streaming.floats import Bytes
from streaming.index import ExpertIndex
from streaming.policy import LeastRecentlyUsed, Policy
from streaming.reader import NUM_THREADS, TIMEOUT_S, Read, ReadDropped, Reader
from streaming.runs import Run, largest_run_bytes, plan_runs
from streaming.tickets import Ticket, TicketOffice

# Experts that `load_all` asks for in one go: enough to keep every reader busy.
LOADED_AT_ONCE = 32


@dataclass(frozen=True)
class StoreStatistics:
    """Counts since start-up. `payload_bytes`: of experts that arrived; `device_bytes`: read for them."""

    hits: int
    misses: int
    evictions: int
    failures: int
    payload_bytes: int
    device_bytes: int
    read_s: float
    num_reads: int
    num_timeouts: int


@dataclass
class _Layer:
    bank: Bank
    policy: Policy
    slot_of: dict[int, int]
    expert_of: list[int | None]
    free: list[int]  # descending, so that the lowest slot is taken first

    @property
    def num_slots(self) -> int:
        return len(self.expert_of)


@dataclass
class _Fill:
    """One missed expert on its way into its slot."""

    expert: int
    ticket: Ticket
    reads: Sequence[Read]

    @property
    def error(self) -> Exception | None:
        errors = [read.error for read in self.reads if read.error is not None]
        return min(errors, key=lambda error: isinstance(error, ReadDropped), default=None)


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
    ) -> None:
        if isinstance(slots_per_layer, int):
            slots_per_layer = dict.fromkeys(index.layers, slots_per_layer)
        num_slots = {layer: min(slots_per_layer[layer], index.num_experts) for layer in index.layers}
        maker = BankMaker(float_dtype, is_shared=shares_memory)
        self._index = index
        self._is_resident = False
        self._layers = {
            layer: _make_layer(maker.make(index.parts(layer), count), make_policy(), count)
            for layer, count in num_slots.items()
        }
        self._tickets = TicketOffice(num_slots)
        self._hits = self._misses = self._evictions = self._failures = self._payload_bytes = 0
        try:
            self._reader = Reader(
                disk or DirectDisk(),
                index.stamps,
                max_read_bytes=largest_run_bytes(index),
                num_threads=num_threads,
                timeout_s=timeout_s,
            )
        except DiskError as error:
            raise CheckpointError(str(error)) from error

    @property
    def is_resident(self) -> bool:
        """Whether expert i lies in slot i of every layer, and stays there."""
        return self._is_resident

    def load_all(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Makes every expert resident, in the slot of its own number; only for a store that was never used.

        `on_progress` hears how many layers are done, of how many.
        """
        for number, (layer, state) in enumerate(self._layers.items(), start=1):
            assert state.num_slots == self._index.num_experts, "there are fewer slots than experts"
            assert not state.slot_of, "experts that came one by one lie in slots of other numbers"
            for first in range(0, state.num_slots, LOADED_AT_ONCE):
                self.acquire(layer, range(first, min(first + LOADED_AT_ONCE, state.num_slots)))
            on_progress(number, len(self._layers))
        self._is_resident = True

    def num_slots(self, layer: int) -> int:
        return self._layers[layer].num_slots

    def bank(self, layer: int) -> Mapping[str, mx.array]:
        """The layer's live arrays by part name, `[slots, ...]`."""
        return self._layers[layer].bank.arrays

    def acquire(self, layer: int, experts: Sequence[int]) -> npt.NDArray[np.int32]:
        """The slots that hold these experts (unique, ascending), once all of them are resident.

        DiskError names what could not be read; the experts that did arrive stay, and asking again tries
        again.
        """
        state = self._layers[layer]
        assert len(experts) <= state.num_slots, "more experts were asked for at once than the layer has slots"
        missed = [expert for expert in experts if expert not in state.slot_of]
        self._hits += len(experts) - len(missed)
        self._misses += len(missed)
        if missed:
            keep = frozenset(experts)
            for first in range(0, len(missed), state.bank.max_fill):
                self._load(layer, state, missed[first : first + state.bank.max_fill], keep)
        state.policy.use(experts)
        return np.array([state.slot_of[expert] for expert in experts], np.int32)

    def statistics(self) -> StoreStatistics:
        reads = self._reader.statistics
        return StoreStatistics(
            hits=self._hits,
            misses=self._misses,
            evictions=self._evictions,
            failures=self._failures,
            payload_bytes=self._payload_bytes,
            device_bytes=reads.device_bytes,
            read_s=reads.busy_s,
            num_reads=reads.num_reads,
            num_timeouts=reads.num_timeouts,
        )

    def check_integrity(self) -> None:
        """Balances the books: every slot is free or holds one expert, and nobody is writing."""
        assert self._tickets.num_writers() == 0, "a reader's thread is inside a slot that nobody waits for"
        for layer, state in self._layers.items():
            held = {expert: slot for slot, expert in enumerate(state.expert_of) if expert is not None}
            assert held == state.slot_of, f"layer {layer}: slots and experts disagree"
            assert sorted([*state.free, *held.values()]) == list(range(state.num_slots)), (
                f"layer {layer}: a slot is neither free nor held, or both"
            )

    def close(self) -> None:
        self._reader.close()

    def _load(self, layer: int, state: _Layer, missed: Sequence[int], keep: frozenset[int]) -> None:
        fills = [self._start_fill(layer, state, expert, keep) for expert in missed]
        state.bank.begin([fill.ticket.slot for fill in fills])
        self._reader.wait(self._reader.submit([read for fill in fills for read in fill.reads]))
        arrived = [fill for fill in fills if fill.error is None]
        for fill in fills:
            if fill.error is not None:
                self._tickets.revoke(layer, fill.ticket.slot)
                state.free.append(fill.ticket.slot)
        state.free.sort(reverse=True)
        state.bank.finish([fill.ticket.slot for fill in arrived])
        for fill in arrived:
            state.slot_of[fill.expert] = fill.ticket.slot
            state.expert_of[fill.ticket.slot] = fill.expert
        state.policy.use([fill.expert for fill in arrived])
        self._payload_bytes += len(arrived) * self._index.expert_bytes(layer)
        self._raise_failure(layer, fills)

    def _start_fill(self, layer: int, state: _Layer, expert: int, keep: frozenset[int]) -> _Fill:
        ticket = self._tickets.issue(layer, self._take_slot(state, keep))
        runs = plan_runs(self._index.pieces(layer, expert))
        reads = [
            Read(run.path, run.offset, run.nbytes, partial(self._commit, state.bank, ticket, run))
            for run in runs
        ]
        return _Fill(expert, ticket, reads)

    def _take_slot(self, state: _Layer, keep: frozenset[int]) -> int:
        if state.free:
            return state.free.pop()
        expert = state.policy.victim(keep)
        assert expert not in keep, "the policy gave up an expert that the same request needs"
        state.policy.forget(expert)
        slot = state.slot_of.pop(expert)
        state.expert_of[slot] = None
        self._evictions += 1
        return slot

    def _commit(self, bank: Bank, ticket: Ticket, run: Run, raw: Bytes) -> None:
        """On a reader's thread: puts a run's bytes into the slot, if the slot is still this ticket's."""
        if self._tickets.enter(ticket):
            try:
                for segment in run.segments:
                    bank.write(
                        ticket.slot,
                        segment.part,
                        segment.start,
                        raw[segment.at : segment.at + segment.nbytes],
                    )
            finally:
                self._tickets.leave(ticket)

    def _raise_failure(self, layer: int, fills: Sequence[_Fill]) -> None:
        failed = [fill for fill in fills if fill.error is not None]
        self._failures += len(failed)
        # A read dropped because of another's failure says less than that failure.
        failed.sort(key=lambda fill: isinstance(fill.error, ReadDropped))
        for fill in failed:
            if not isinstance(fill.error, DiskError):
                raise fill.error or AssertionError("a failed fill without its error")
            raise DiskError(f"layer {layer}, expert {fill.expert}: {fill.error}") from fill.error


def _make_layer(bank: Bank, policy: Policy, num_slots: int) -> _Layer:
    return _Layer(bank, policy, {}, [None] * num_slots, list(reversed(range(num_slots))))

"""The routed experts of one layer: gather, multiply, reduce. Called by the MoE block.

With few rows the layer synchronises once, to learn which experts to ask for. In that synchronisation ride a
guess at the next layer's experts, to be read while this layer computes, and the proof that no product still
reads a slot. What does not depend on the missing experts is computed while they are read.

Whether the experts are resident or streamed is the business of the `ExpertStore`; no other code of the
model knows. Outputs of a row's experts are added in ascending expert id in every mode, and a row's product
with an expert does not depend on the slot that holds it, so any budget gives the same bits.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from models.arithmetic import Arithmetic, Quantization
from models.experts.grouping import Indices, cut_pieces, cut_runs, lay_out, ranks_of, rows_by_expert
from streaming.eviction.policy import OBSERVED_ROWS
from streaming.files.index import PROJECTIONS
from streaming.fills import Fetch
from streaming.layer import Lease
from streaming.store import ExpertStore
from streaming.sweep import Place

# Rows of one expert that are computed together: bounds what its hidden rows take.
EXPERT_ROWS = 2048
# More rows together drive out what is guessed, or what was there, unless all that they may want has a slot.
# Of 64 uses by eight rows an eighth are of experts that another uses, too: of 256, 54 to 57 are wanted.
GUESSED_ROWS = 4
SHARED_USES = 1 / 8


@dataclass(frozen=True)
class BankWeight:
    """One projection of a bank, or of one of its slots, in the form `Arithmetic.product` takes."""

    parts: Mapping[str, mx.array]
    projection: str
    quantization: Quantization | None
    slot: int | None = None

    @property
    def weight(self) -> mx.array:
        weight = self.get("weight")
        assert weight is not None, "every projection has a weight"
        return weight

    def get(self, name: str, /) -> mx.array | None:
        array = self.parts.get(f"{self.projection}.{name}")
        return array if array is None or self.slot is None else array[self.slot]


class Experts:
    """Routed experts of one layer, wherever they lie."""

    def __init__(
        self,
        layer: int,
        source: ExpertStore,
        quantizations: Mapping[str, Quantization | None],
        arithmetic: Arithmetic,
    ) -> None:
        self._layer, self._source, self._arithmetic = layer, source, arithmetic
        self._quantizations = quantizations
        self._next: Experts | None = None

    @cached_property
    def _lease(self) -> Lease:
        """Held while the layer's last output is not evaluated."""
        return self._source.lease(self._layer)

    def are_resident_for(self, rows: int) -> bool:
        """Whether a call for so many rows depends on its arrays alone."""
        return self._source.is_resident and self._arithmetic.gathers(rows)

    def are_small_for(self, num_pairs: int) -> bool:
        """Whether many rows are computed pair by pair too, each reading its expert."""
        arrays = self._source.bank(self._layer).values()
        return sum(a.nbytes // a.shape[0] for a in arrays) * num_pairs <= self._arithmetic.max_gathered_bytes

    def precede(self, following: "Experts") -> None:
        """The layer whose experts are guessed in this one."""
        self._next = following

    def wants_guess(self, rows: int, top_k: int) -> bool:
        """Whether a guess at the next layer's experts would be used."""
        return self._next is not None and self._next.can_be_guessed(rows, top_k)

    def can_be_guessed(self, rows: int, top_k: int) -> bool:
        """Whether a guess at this layer's experts, `top_k` for each row, would be used."""
        num_wanted = (1 - SHARED_USES) * rows * top_k
        has_room = rows <= GUESSED_ROWS or num_wanted <= self._source.num_slots(self._layer)
        return has_room and self._source.looks_ahead(self._layer)

    def settle(self) -> None:
        """Evaluates whatever may still read a slot of this layer's bank."""
        Lease.release([self._lease])

    def anticipate(self, guess: mx.array) -> None:
        """Starts to read what is guessed, int32 [N, k]: for the first sparse layer, which none precedes."""
        Lease.release([self._lease], guess)
        self._source.expect(self._layer, self._guesses(np.array(guess)))

    def __call__(
        self,
        x: mx.array,
        ids: mx.array,
        weights: mx.array,
        scores: mx.array | None = None,
        *,
        guess: mx.array | None = None,
        added: Sequence[mx.array] = (),
    ) -> mx.array:
        """x [N, H], ids [N, k] ascending, weights float32 [N, k] -> [N, H].

        `scores` [N, E]: by what the ids were chosen. `guess` int32 [N, k]: the next layer's experts, each
        row's likeliest first. `added`, [N, H] each: what is added, and computed while experts are read.
        """
        if self._arithmetic.gathers(x.shape[0]):
            pairs = self._all_pairs(x, ids, scores, guess, added)
            return (self._compiled_sum if self._arithmetic.compiles else self._sum_of)(pairs, weights, added)
        out = run_through(self.sweep(lambda rows: x[rows], ids, weights, scores)).astype(x.dtype)
        return sum(added, out)

    @cached_property
    def _compiled_sum(self) -> Callable[..., mx.array]:
        return mx.compile(self._sum_of)

    def _sum_of(self, pairs: mx.array, weights: mx.array, added: Sequence[mx.array]) -> mx.array:
        return self._arithmetic.mixed(pairs, weights, added)

    def _all_pairs(
        self,
        x: mx.array,
        ids: mx.array,
        scores: mx.array | None,
        guess: mx.array | None,
        beside: Sequence[mx.array],
    ) -> mx.array:
        """Output of each expert for each row that wants it: [N, H], [N, k] -> [N, k, H]."""
        if self._source.is_resident:
            return self._gathered(x, ids)
        if guess is None and (table := self._table()) is not None:
            self._source.count_hits(ids.size)
            return self._remember(self._gathered(x, table[ids]))
        wanted, guessed = self._synchronise(ids, scores, guess, beside)
        return self._brought(x, wanted, guessed, beside)

    def _brought(
        self,
        x: mx.array,
        wanted: NDArray[np.int32],
        guessed: NDArray[np.int32] | None,
        beside: Sequence[mx.array],
    ) -> mx.array:
        """Outputs [N, k, H] for ids that have been read back; experts without a slot are read."""
        # One row's experts are unique and ascending as they are.
        experts = (wanted[0] if len(wanted) == 1 else np.unique(wanted)).tolist()
        if len(experts) > self._source.num_slots(self._layer):
            return self._pairs_in_turns(x, wanted, experts, guessed, beside)
        fetch = self._source.begin(self._layer, experts)
        self._expect_next(guessed)
        slots, is_here = fetch.slots[None], fetch.is_here[None]
        if len(wanted) > 1:
            places = np.searchsorted(experts, wanted)
            slots, is_here = fetch.slots[places], fetch.is_here[places]
        if is_here.all():
            pairs = self._gathered(x, self._arithmetic.sent(slots, self._source.num_slots(self._layer)))
            # Computed while the next layer's graph is built.
            mx.async_eval(pairs, *beside)
            return self._remember(pairs)
        return self._remember(self._pairs_as_they_come(x, fetch, slots, is_here, beside))

    def _table(self) -> mx.array | None:
        """Each expert's slot, where all have one and asking for them is spared."""
        return self._source.slot_table(self._layer) if self._arithmetic.slots_on_device else None

    def _expect_next(self, guessed: NDArray[np.int32] | None) -> None:
        """Starts to read what is guessed, once the reads for this layer have been started."""
        if guessed is not None and self._next is not None:
            self._source.expect(self._next._layer, self._next._guesses(guessed))

    def _guesses(self, guess: NDArray[np.int32]) -> list[list[int]]:
        """A guess [N, k] by ranks: each row's likeliest experts, then the next ones."""
        ranks: list[list[int]] = guess.T.tolist()
        return ranks

    def _synchronise(
        self,
        ids: mx.array,
        scores: mx.array | None,
        guess: mx.array | None,
        beside: Sequence[mx.array] = (),
    ) -> tuple[NDArray[np.int32], NDArray[np.int32] | None]:
        """The one synchronisation of the layer: ids, scores and guess, and an end to all pending products.

        What stands beside them is started, and not waited for.
        """
        readable = [ids] if scores is None else self._arithmetic.readable(ids, scores.shape[-1])
        if scores is not None and not self._source.watches_scores(self._layer):
            scores = None
        owners = [self] if guess is None or self._next is None else [self, self._next]
        if beside:
            mx.async_eval(*(array for array in (*readable, scores, guess) if array is not None))
            mx.async_eval(*beside)
        Lease.release([owner._lease for owner in owners], *readable, scores, guess)
        if scores is not None:
            self._source.observe(self._layer, np.array(scores))
        wanted = np.concatenate([np.array(rows) for rows in readable]).astype(np.int32)
        return wanted, None if guess is None else np.array(guess)

    def _pairs_as_they_come(
        self,
        x: mx.array,
        fetch: Fetch,
        slots: NDArray[np.int32],
        is_here: NDArray[np.bool_],
        beside: Sequence[mx.array],
    ) -> mx.array:
        """Pairs whose experts are here while the others are read; the result is in the order of the ids."""
        here, there = np.flatnonzero(is_here), np.flatnonzero(~is_here)
        first = [self._pairs(x, slots, here)] if here.size else []
        mx.async_eval(*first, *beside)
        self._source.finish(fetch)
        order = np.argsort(np.concatenate([here, there]))
        pairs = mx.concatenate([*first, self._pairs(x, slots, there)])[mx.array(order)]
        return pairs.reshape(*slots.shape, -1)

    def _pairs(self, x: mx.array, slots: NDArray[np.int32], pairs: NDArray[np.int64]) -> mx.array:
        """Outputs [P, H] of numbered (row, expert) pairs, each computed alone."""
        rows = mx.array(pairs // slots.shape[1])
        return self._gathered(x[rows], mx.array(slots.ravel()[pairs])[:, None])[:, 0]

    def _pairs_in_turns(
        self,
        x: mx.array,
        wanted: NDArray[np.int32],
        experts: list[int],
        guessed: NDArray[np.int32] | None,
        beside: Sequence[mx.array],
    ) -> mx.array:
        """More experts than slots: some at a time, each pair computed alone."""
        num_rows, k = wanted.shape
        out = mx.zeros((num_rows * k, x.shape[1]), dtype=x.dtype)
        mx.async_eval(*beside)
        for number, (turn, places) in enumerate(self._source.take_turns(self._layer, experts)):
            if number == 0:
                self._expect_next(guessed)
            pairs = np.flatnonzero(np.isin(wanted, turn))
            slots = np.array(places, np.int32)[np.searchsorted(turn, wanted.ravel()[pairs])]
            out[mx.array(pairs)] = self._gathered(x[mx.array(pairs // k)], mx.array(slots)[:, None])[:, 0]
            mx.eval(out)
        return out.reshape(num_rows, k, -1)

    def anticipate_sweep(self) -> None:
        """All experts will be wanted, once many rows have come so far."""
        if not self._source.is_resident:
            self._source.anticipate_sweep(self._layer)

    def sweep(
        self,
        take: Callable[[mx.array], mx.array],
        ids: mx.array,
        weights: mx.array,
        scores: mx.array | None = None,
    ) -> Generator[None, None, mx.array]:
        """Many rows: each expert multiplied once with all that want it, added up in ascending id.

        Pauses after each group of experts, when nothing pending refers to a bank.
        `take`: numbered rows of the input, [n] -> [n, H]; ids, weights, scores as above -> float32 [N, H].
        """
        if scores is not None:
            scores = None if self._source.is_resident else scores[-OBSERVED_ROWS:]
        if self.are_small_for(ids.size):
            pairs = self._all_pairs(take(mx.arange(ids.shape[0])), ids, scores, None, ())
            return self._sum_of(pairs, weights, ()).astype(mx.float32)
        wanted, _ = self._synchronise(ids, scores, None)
        return (yield from self._summed(take, wanted, ids, weights))

    def _summed(
        self,
        take: Callable[[mx.array], mx.array],
        wanted: NDArray[np.int32],
        ids: mx.array,
        weights: mx.array,
    ) -> Generator[None, None, mx.array]:
        """Sums [N, H] of many rows' weighted outputs, for ids that have been read back."""
        rows_of = rows_by_expert(wanted)
        counts = {expert: len(rows) for expert, (rows, _) in rows_of.items() if self._is_own(expert)}
        out = mx.zeros((weights.shape[0], take(mx.array([0])).shape[1]))
        ranks: mx.array | None = None
        for group in self._source.sweep(self._layer, counts, self._arithmetic.experts_at_once):
            for run, is_together in cut_runs(group, lambda place: self._can_group(place, counts)):
                if is_together:
                    ranks = mx.array(ranks_of(rows_of, wanted.shape)) if ranks is None else ranks
                    out = self._add_run(out, take, run, rows_of, weights, ids, ranks)
                else:
                    out = self._add_place(out, take, run[0], rows_of[run[0].expert], weights)
            mx.eval(out)
            yield
        return out

    def _is_own(self, expert: int) -> bool:
        """Whether a sweep computes the expert here."""
        return True

    def _weights(
        self, arrays: Mapping[str, mx.array], slot: int | None = None
    ) -> tuple[BankWeight, BankWeight, BankWeight]:
        """Gate, up and down of a bank, or of one of its slots."""
        gate, up, down = (BankWeight(arrays, name, self._quantizations[name], slot) for name in PROJECTIONS)
        return gate, up, down

    def _can_group(self, place: Place, counts: Mapping[int, int]) -> bool:
        return self._arithmetic.can_group(counts[place.expert], *self._weights(place.arrays))

    def _add_place(
        self,
        out: mx.array,
        take: Callable[[mx.array], mx.array],
        place: Place,
        pairs: tuple[Indices, Indices],
        weights: mx.array,
    ) -> mx.array:
        """out [N, H] with one expert's outputs for the rows that want it."""
        gate_up_down = self._weights(place.arrays, place.slot)
        for rows, columns in cut_pieces(*pairs, EXPERT_ROWS):
            chosen = mx.array(rows)
            y = self._arithmetic.mlp(take(chosen), *gate_up_down)
            y = y * weights[chosen, mx.array(columns), None]
            out = self._arithmetic.add_rows(out, rows, y)
            if len(rows) == EXPERT_ROWS:
                mx.eval(out)
        return out

    def _add_run(
        self,
        out: mx.array,
        take: Callable[[mx.array], mx.array],
        run: Sequence[Place],
        rows_of: Mapping[int, tuple[Indices, Indices]],
        weights: mx.array,
        ids: mx.array,
        ranks: mx.array,
    ) -> mx.array:
        """out [N, H] with the outputs of several experts, each multiplied with as many rows, some in vain."""
        chosen, bases = lay_out(run, rows_of)
        slots = np.array([place.slot for place in run], np.int32)
        sent = mx.array(np.concatenate([chosen.ravel(), bases, slots]))
        flat, bases_sent, slots_sent = mx.split(sent, [chosen.size, chosen.size + bases.size])
        x = take(flat).reshape(*chosen.shape, -1)
        y = self._arithmetic.grouped(x, *self._weights(run[0].arrays), slots=slots_sent)
        return self._arithmetic.add_experts(out, y.reshape(-1, out.shape[1]), weights, ids, ranks, bases_sent)

    def _gathered(self, x: mx.array, slots: mx.array) -> mx.array:
        """x [N, H] against slots [N, k] -> [N, k, H]."""
        bank = self._source.bank(self._layer)
        return (
            self._compiled(x, slots, dict(bank))
            if self._arithmetic.compiles and self._arithmetic.gathers(x.shape[0])
            else self._pairs_of(x, slots, bank)
        )

    @cached_property
    def _compiled(self) -> Callable[..., mx.array]:
        return mx.compile(self._pairs_of)

    def _pairs_of(self, x: mx.array, slots: mx.array, arrays: Mapping[str, mx.array]) -> mx.array:
        return self._arithmetic.pairs(x, *self._weights(arrays), slots=slots)

    def _remember(self, out: mx.array) -> mx.array:
        return out if self._source.is_resident else self._lease.hold(out)


def run_through(steps: Generator[object, None, mx.array]) -> mx.array:
    """What a computation that pauses comes to, without its pauses."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: mx.array = stop.value
            return result

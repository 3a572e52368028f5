"""The routed experts of one layer where the ranks of a cluster have divided them among each other.

Every rank computes the same routing for the same rows. Of few rows each (row, expert) pair is computed by the
rank that owns the expert, all pairs are gathered, and every rank adds them as one machine does: the same
bits. Of many rows each rank adds up its own experts, and the sums are added in the order of ranks.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from config.errors import DiskError
from models.arithmetic import Arithmetic, Quantization
from models.experts.exchange import Exchange
from models.experts.experts import Experts, run_through
from streaming.store import ExpertStore


class DividedExperts(Experts):
    """Reads and computes this rank's experts; the others' outputs come through the exchange."""

    def __init__(
        self,
        layer: int,
        source: ExpertStore,
        quantizations: Mapping[str, Quantization | None],
        arithmetic: Arithmetic,
        exchange: Exchange,
    ) -> None:
        super().__init__(layer, source, quantizations, arithmetic)
        self._exchange, self._placement = exchange, exchange.placement

    def _guesses(self, guess: NDArray[np.int32]) -> list[list[int]]:
        return [[e for e in experts if self._placement.owns(e)] for experts in super()._guesses(guess)]

    def _all_pairs(
        self,
        x: mx.array,
        ids: mx.array,
        scores: mx.array | None,
        guess: mx.array | None,
        beside: Sequence[mx.array],
    ) -> mx.array:
        wanted, guessed = self._synchronise(ids, scores, guess, beside)
        deal, failure = self._placement.deal(wanted), None
        own = mx.zeros((len(deal.mine), 1, x.shape[1]), x.dtype)
        try:
            chosen, rows = wanted.ravel()[deal.mine, None], mx.array(deal.mine // wanted.shape[1])
            if own.size:
                own = self._brought(x[rows], chosen, guessed, beside)
            else:
                self._source.begin(self._layer, [])
                self._expect_next(guessed)
        except DiskError as error:
            failure = error
        gathered = self._exchange.seal(self._layer, wanted).outputs(own[:, 0], deal.most, failure)
        return gathered[mx.array(deal.places)].reshape(*wanted.shape, -1)

    def _summed(
        self,
        take: Callable[[mx.array], mx.array],
        wanted: NDArray[np.int32],
        ids: mx.array,
        weights: mx.array,
    ) -> Generator[None, None, mx.array]:
        """As on one machine, with as many pauses on every rank, whatever it has to read."""
        num_own = sum(map(self._is_own, np.unique(wanted).tolist()))
        seal = self._exchange.seal(self._layer, wanted)
        num_groups = self._source.num_groups(num_own, self._arithmetic.experts_at_once)
        own, failure = mx.zeros((wanted.shape[0], take(mx.array([0])).shape[1])), None
        with closing(super()._summed(take, wanted, ids, weights)) as groups:
            for number in range(max(seal.notes(num_groups))):
                try:
                    if number < num_groups and failure is None:
                        next(groups)
                except DiskError as error:
                    failure = error
                yield
            if failure is None:
                own = run_through(groups)
        return seal.sums(own, failure)

    def _is_own(self, expert: int) -> bool:
        return self._placement.owns(expert)

"""Ranks of a cluster as threads of one process, and what each of them opens."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from models.experts.exchange import Gather

T = TypeVar("T")
LIMIT_S = 20.0


class Meeting:
    """Gathers what threads send, one for each rank. Each takes as much as it sends, as from MLX's ring."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._sent: list[NDArray[Any]] = [np.zeros(0)] * num_ranks
        self._barrier = Barrier(num_ranks, timeout=LIMIT_S)

    def gather(self, rank: int) -> Gather:
        def gather(words: mx.array) -> mx.array:
            self._sent[rank] = np.array(words)
            try:
                self._barrier.wait()
                heard = [sent[: words.size] for sent in self._sent]
                self._barrier.wait()
            except BrokenBarrierError:
                raise RuntimeError("another rank has ended") from None
            if any(part.size < words.size for part in heard):
                raise RuntimeError("another rank has ended and left this one waiting for more")
            return mx.array(np.stack(heard))

        return gather

    def run(self, work: Callable[[int], T]) -> list[T]:
        """What `work` returns for each rank; an error of one ends all."""

        def watched(rank: int) -> T:
            try:
                return work(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.num_ranks) as pool:
            return [done.result() for done in [pool.submit(watched, r) for r in range(self.num_ranks)]]

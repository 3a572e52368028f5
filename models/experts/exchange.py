"""What the ranks of a cluster tell each other in a sparse layer: outputs of experts, and that they agree.

Every rank calls the same methods in the same order. A message says first for which layer and which experts
of its rows it is, so that ranks that have come to differ (another chip, another build) fail in words.
"""

from collections.abc import Callable
from hashlib import blake2b

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from config.errors import ClusterError, DiskError
from streaming.placement import Placement

Gather = Callable[[mx.array], mx.array]  # uint32 [n] of this rank -> [ranks, n], the same on all
# Words before a message's payload: the seal's, and a note.
SEAL_WORDS = 2
FAILED = 2**32 - 1  # the note of a rank that could not read its experts
# Rows of a prompt whose sums cross at a time: 3 MB of GLM-5.2's.
SUMMED_ROWS = 128


def exchange_bytes(num_ranks: int, width: int) -> int:
    """Memory of a message: the rows of this rank, three times, and those of all, twice.

    The pairs of a decode step are fewer.
    """
    return (3 + 2 * num_ranks) * SUMMED_ROWS * width * mx.float32.size


def gather_over(group: mx.distributed.Group) -> Gather:
    """Gathers over MLX's own sockets or links, which have no time-out."""
    return lambda words: mx.distributed.all_gather(words[None], group=group)


class Exchange:
    """One rank's side. `placement`: who owns what."""

    def __init__(self, placement: Placement, gather: Gather) -> None:
        self.placement, self._gather = placement, gather

    def seal(self, layer: int, wanted: NDArray[np.int32]) -> "Seal":
        """What all ranks must have in common to add up what they send: the layer, and its rows' experts."""
        digest = blake2b(wanted.tobytes(), digest_size=4 * SEAL_WORDS, salt=layer.to_bytes(4)).digest()
        return Seal(self, layer, np.frombuffer(digest, np.uint32))


class Seal:
    """A layer's messages. Every method raises ClusterError where the ranks differ or one has ended.

    DiskError where a rank could not read its experts: all ranks hear of it in the same message.
    """

    def __init__(self, exchange: Exchange, layer: int, words: NDArray[np.uint32]) -> None:
        self._exchange, self._layer, self._words = exchange, layer, words

    def notes(self, note: int) -> list[int]:
        """Every rank's note, in the order of ranks."""
        return self._told(note, mx.zeros((0, 1)))[0]

    def outputs(self, own: mx.array, most: int, failure: DiskError | None) -> mx.array:
        """Outputs [ranks * most, H] of all ranks; this one's, [n, H], are fewer or as many as `most`."""
        missing = mx.zeros((most - own.shape[0], own.shape[1]), own.dtype)
        _, heard = self._told(0, mx.concatenate([own, missing]), failure)
        return heard.reshape(-1, own.shape[1])

    def sums(self, own: mx.array, failure: DiskError | None) -> mx.array:
        """All ranks' sums [N, H] added up, in the order of ranks; this one's are replaced part by part."""
        for first in range(0, own.shape[0], SUMMED_ROWS):
            rows = slice(first, first + SUMMED_ROWS)
            _, (total, *others) = self._told(0, own[rows], failure)
            own[rows] = sum(others, total)
            mx.eval(own)
        return own

    def _told(
        self, note: int, payload: mx.array, failure: DiskError | None = None
    ) -> tuple[list[int], mx.array]:
        """Sends [n, H] with a note; returns what all ranks sent, [ranks, n, H]."""
        head = mx.array(np.append(self._words, np.uint32(FAILED if failure else note)))
        try:
            heard = self._exchange._gather(mx.concatenate([head, payload.reshape(-1).view(mx.uint32)]))
            mx.eval(heard)
        except RuntimeError as error:
            raise ClusterError(f"layer {self._layer}: a rank of the cluster has ended: {error}") from error
        heads = np.array(heard[:, : SEAL_WORDS + 1])
        self._check(heads[:, :SEAL_WORDS], heads[:, SEAL_WORDS].tolist(), failure)
        body = heard[:, SEAL_WORDS + 1 :].view(payload.dtype)
        return heads[:, SEAL_WORDS].tolist(), body.reshape(len(heads), *payload.shape)

    def _check(self, seals: NDArray[np.uint32], notes: list[int], failure: DiskError | None) -> None:
        if odd := np.flatnonzero((seals != self._words).any(axis=1)).tolist():
            raise ClusterError(
                f"layer {self._layer}: rank {self._exchange.placement.rank} and rank {odd[0]} of the cluster "
                "want different experts for the same rows; machines of one kind and the same version agree"
            )
        if failure is not None:
            raise failure
        if FAILED in notes:
            rank = notes.index(FAILED)
            raise DiskError(f"layer {self._layer}: rank {rank} of the cluster could not read its experts")

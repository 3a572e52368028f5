"""What the model remembers of one sequence. Owned by the sequence; written by attention and indexer.

A layer's row is the normed latent followed by the rotated key that all heads share; a full layer also keeps
one row of index keys. Shared layers keep no index keys: they reuse a selection of positions.
"""

from collections.abc import Iterable, Sequence

import mlx.core as mx

from config.plan import cache_rows
from models.args import ModelArgs
from models.attention.cache_blocks import fill_blocks
from streaming.files.floats import Bytes


class RowCache:
    """Rows `[length, width]` of one kind in one layer, appended at the end, cut from the end."""

    stride = 1  # tokens that a row stands for

    def __init__(self, width: int, dtype: mx.Dtype) -> None:
        self._buffer = mx.zeros((0, width), dtype=dtype)
        self._expected = 0
        self.length = 0

    def expect(self, rows: int) -> None:
        """So many rows are appended soon, bit by bit: the next growth makes room for all of them."""
        self._expected = self.length + rows

    def append(self, rows: mx.array) -> mx.array:
        """Add rows [n, width]; returns all rows held, [length, width]."""
        end = self.length + rows.shape[0]
        self._reserve(end)
        self._buffer[self.length : end] = rows.astype(self._buffer.dtype)
        self.length = end
        return self._buffer[:end]

    def adopt(self, origin: "RowCache", stop: int) -> None:
        """Go on with another's rows up to `stop`; those that are held already are the same."""
        if self.length < stop:
            assert stop <= origin.length, "rows are adopted that nobody has written"
            self.append(origin.rows(self.length, stop))

    def rows(self, start: int, stop: int) -> mx.array:
        """Rows start to stop, [stop - start, width]."""
        return self._buffer[start:stop]

    def trim(self, length: int) -> None:
        """Forget everything behind the first `length` rows."""
        assert length <= self.length, "a cache is trimmed to a part of itself"
        self.length = length

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    @property
    def state(self) -> mx.array:
        return self._buffer

    def _reserve(self, rows: int) -> None:
        if rows <= self._buffer.shape[0]:
            return
        room = cache_rows(max(rows, self._expected))
        grown = mx.zeros((room, self._buffer.shape[1]), dtype=self._buffer.dtype)
        if self.length:
            grown[: self.length] = self._buffer[: self.length]
            mx.eval(grown)  # at once, or the old rows of all layers might lie beside the new ones
        self._buffer = grown


class SequenceCache:
    """All rows of one sequence: latents for each layer, index keys for each full layer.

    `grain`: other sequences go on, and passes pause, behind multiples of so many tokens. `keeps_state`: rows
    are not all that is remembered.
    """

    grain = 1
    keeps_state = False

    def __init__(self, args: ModelArgs, dtype: mx.Dtype) -> None:
        self.latents = [RowCache(args.latent_dim, dtype) for _ in range(args.num_hidden_layers)]
        self.index_keys = {layer: RowCache(args.index_head_dim, dtype) for layer in args.full_layers}

    @property
    def length(self) -> int:
        """Tokens held by every layer (between forwards all layers agree)."""
        return self.latents[-1].length

    @property
    def num_rows(self) -> int:
        """Tokens whose rows are there."""
        return self.length

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self.parts)

    def trim(self, length: int) -> None:
        """Forget all tokens behind the first `length`, in latents and index keys alike."""
        for rows in self.parts:
            rows.trim(min(length, rows.length))

    def expect(self, tokens: int) -> None:
        """A forward is about to append so many tokens."""
        for rows in self.parts:
            rows.expect(-(-tokens // rows.stride))

    def states(self, layer: int) -> list[mx.array]:
        """The arrays of one layer, for evaluation."""
        keys = self.index_keys.get(layer)
        return [self.latents[layer].state] + ([keys.state] if keys is not None else [])

    def check_integrity(self) -> None:
        """All layers hold the same number of tokens."""
        lengths = {rows.length for rows in self.parts}
        assert len(lengths) == 1, f"layers disagree about the length: {sorted(lengths)}"

    @property
    def parts(self) -> list[RowCache]:
        """All kinds of rows, in the order in which they are saved."""
        return [*self.latents, *self.index_keys.values()]

    def want(self, lengths: Iterable[int]) -> None:
        """Forwards to come keep the state at these lengths; there is none."""

    @property
    def kept_lengths(self) -> list[int]:
        """Lengths at which a state is kept because it was wanted, ascending."""
        return []

    def can_lend(self, length: int) -> bool:
        """Whether another sequence may go on behind the first `length` tokens."""
        return length <= self.length

    def read_state(self, length: int) -> Bytes | None:
        """What is kept of the first `length` tokens beside their rows, as bytes: nothing."""
        return None

    def fill_rows(self, blocks: Sequence[Bytes], sizes: Sequence[int]) -> None:
        """Appends the rows of saved blocks of so many tokens each, all or none."""
        fill_blocks(self, blocks, sizes)

    def fill_state(self, payload: Bytes, length: int) -> None:
        """Takes over what `read_state` gave."""


def cache_bytes_per_token(args: ModelArgs, itemsize: int) -> int:
    """Bytes that one token takes in all layers: 95,232 for GLM-5.2 in bfloat16."""
    latents = args.latent_dim * args.num_hidden_layers
    return (latents + args.index_head_dim * len(args.full_layers)) * itemsize

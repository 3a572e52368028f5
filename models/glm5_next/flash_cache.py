"""What a `glm5_next` model remembers of one sequence: rows of sparse layers, states of all layers.

A linear layer keeps one matrix for each head and the last inputs of its convolution, however long the
sequence is. A sparse layer keeps the raw keys of a pool that is not full. Such states cannot be cut, so the
cache keeps marks: the states as they were at some lengths. No array of a state is written into, so a mark
costs memory only once the sequence has gone on.
"""

from collections.abc import Iterable
from math import prod

import mlx.core as mx
import numpy as np

from models.attention.cache import RowCache, SequenceCache
from models.glm5_next.flash_args import GRAIN, FlashArgs
from streaming.files.floats import Bytes

State = tuple[mx.array, ...]


class LayerState:
    """One layer's state after `length` tokens, and at the lengths that are marked."""

    def __init__(self, empty: State) -> None:
        self.arrays, self.length = empty, 0
        self.empty = empty
        self._marks: dict[int, State] = {}

    def advance(self, arrays: State, rows: int) -> None:
        """Goes on to the state after so many more rows."""
        self.arrays = arrays
        self.length += rows

    def mark(self, length: int, arrays: State) -> None:
        """Keeps the state after `length` tokens."""
        self._marks[length] = arrays

    def at(self, length: int) -> State | None:
        """The state after so many tokens, or None if it was not kept."""
        return self.arrays if length == self.length else self._marks.get(length)

    def adopt(self, origin: "LayerState", length: int) -> None:
        """Goes on with another's state after `length` tokens."""
        if self.length < length:
            arrays = origin.at(length)
            assert arrays is not None, "a state is adopted that nobody has kept"
            self.set(arrays, length)

    def set(self, arrays: State, length: int) -> None:
        """Takes a state over."""
        self.arrays, self.length = arrays, length

    def trim(self, length: int) -> None:
        """Goes back to the last state that was kept at `length` or before; forgets all behind it."""
        if length >= self.length:
            return
        kept = [mark for mark in self._marks if mark <= length]
        at = max(kept, default=0)
        self.set(self._marks[at] if kept else self.empty, at)
        self.keep(kept)

    def keep(self, lengths: Iterable[int]) -> None:
        """Forgets the marks at all other lengths."""
        self._marks = {length: self._marks[length] for length in lengths if length in self._marks}

    @property
    def all_arrays(self) -> list[mx.array]:
        """The arrays of the state and of its marks; one that both hold stands here once."""
        states = [self.arrays, *self._marks.values()]
        return list({id(array): array for state in states for array in state}.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the state and its marks."""
        return sum(array.nbytes for array in self.all_arrays)


class PooledKeys(RowCache):
    """One row for each full pool of `stride` tokens."""

    def __init__(self, width: int, dtype: mx.Dtype, stride: int) -> None:
        super().__init__(width, dtype)
        self.stride = stride

    def adopt(self, origin: RowCache, stop: int) -> None:
        """Goes on with another's pools up to token `stop`."""
        super().adopt(origin, stop // self.stride)


class FlashCache(SequenceCache):
    """Latents and pooled keys of sparse layers, and states.

    `length` counts the tokens that rows and states agree on; while saved rows are restored there may be more
    rows than that.
    """

    grain = GRAIN
    keeps_state = True
    latents: dict[int, RowCache]  # type: ignore[assignment]
    index_keys: dict[int, PooledKeys]  # type: ignore[assignment]

    def __init__(self, args: FlashArgs, dtype: mx.Dtype) -> None:
        width = args.index_head_dim
        self.latents = {layer: RowCache(args.kv_lora_rank, dtype) for layer in args.sparse_layers}
        self.index_keys = {layer: PooledKeys(width, dtype, args.index_kpool) for layer in args.full_layers}
        heads, inputs = args.linear_num_heads, args.linear_conv_kernel_dim - 1
        linear = (
            mx.zeros((heads, args.linear_head_dim, args.linear_head_dim)),
            mx.zeros((inputs, 3 * args.linear_dim), dtype),
        )
        pool = (mx.zeros((0, 2 * width), dtype),)
        self.layer_states = {layer: LayerState(linear) for layer in args.linear_layers}
        self.layer_states |= {layer: LayerState(pool) for layer in args.full_layers}
        self._wanted: set[int] = set()
        self._lent: set[int] = set()  # in the forward that is under way

    @property
    def length(self) -> int:
        """Tokens held by every layer."""
        lengths = [rows.length for rows in self.latents.values()]
        return min(lengths + [state.length for state in self.layer_states.values()])

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(state.nbytes for state in self.layer_states.values())

    @property
    def parts(self) -> list[RowCache]:
        return [*self.latents.values(), *self.index_keys.values()]

    def trim(self, length: int) -> None:
        """Goes back to the first `length` tokens, or to the last mark before; rows are cut at `length`."""
        for rows in self.parts:
            rows.trim(min(length // rows.stride, rows.length))
        for state in self.layer_states.values():
            state.trim(length)

    def states(self, layer: int) -> list[mx.array]:
        """The arrays of one layer, for evaluation."""
        rows = [kind[layer].state for kind in (self.latents, self.index_keys) if layer in kind]
        return rows + (self.layer_states[layer].all_arrays if layer in self.layer_states else [])

    def begin(self, lent: Iterable[int]) -> None:
        """A forward begins, in which other sequences go on behind the lengths `lent`.

        The state that it may be taken back to is marked; marks of no use are dropped.
        """
        length = self.length
        self._lent = set(lent)
        self.trim(length)
        for state in self.layer_states.values():
            state.keep([*self._wanted, *self._lent, length])
            state.mark(length, state.arrays)

    def want(self, lengths: Iterable[int]) -> None:
        """Forwards to come keep the states at these lengths, instead of those wanted before."""
        self._wanted = set(lengths)

    def can_lend(self, length: int) -> bool:
        """Whether another sequence may go on behind the first `length` tokens."""
        return length <= self.length and all(state.at(length) for state in self.layer_states.values())

    def marks_between(self, start: int, stop: int) -> list[int]:
        """Lengths behind `start` and up to `stop` at which the state is to be kept, ascending."""
        return sorted(length for length in self._wanted | self._lent if start < length <= stop)

    @property
    def kept_lengths(self) -> list[int]:
        """Lengths at which a state is kept because it was wanted, ascending."""
        states = self.layer_states.values()
        return sorted(length for length in self._wanted if all(state.at(length) for state in states))

    @property
    def num_rows(self) -> int:
        """Tokens whose rows are there, perhaps without a state."""
        return min((rows.length for rows in self.latents.values()), default=self.length)

    def read_state(self, length: int) -> Bytes | None:
        """The states after `length` tokens as bytes, or None if they were not kept."""
        states = [state.at(length) for state in self.layer_states.values()]
        arrays = [array for state in states if state is not None for array in state]
        if any(state is None for state in states):
            return None
        pieces = [array.reshape(-1).view(mx.uint8) for array in arrays if array.size]
        mx.eval(pieces)
        return np.concatenate([np.array(piece) for piece in pieces])

    def fill_state(self, payload: Bytes, length: int) -> None:
        """Takes over the states after `length` tokens, of which all rows are there.

        Raises ValueError for bytes of another size; the cache stays as it was.
        """
        stride = next((rows.stride for rows in self.index_keys.values()), 1)
        taken: list[State] = []
        for state in self.layer_states.values():
            arrays = []
            for empty in state.empty:
                shape = empty.shape if empty.size else (length % stride, empty.shape[1])
                nbytes = prod(shape) * empty.dtype.size
                if nbytes > payload.size:
                    raise ValueError("a saved state is shorter than this model's")
                piece, payload = np.split(payload, [nbytes])
                arrays.append(mx.array(piece.copy()).view(empty.dtype).reshape(shape))
            taken.append(tuple(arrays))
        if payload.size:
            raise ValueError("a saved state is longer than this model's")
        mx.eval(taken)
        for state, arrays_of_layer in zip(self.layer_states.values(), taken, strict=True):
            state.set(arrays_of_layer, length)

    def check_integrity(self) -> None:
        """All layers hold the same number of tokens."""
        lengths = {rows.length for rows in self.latents.values()}
        lengths |= {state.length for state in self.layer_states.values()}
        assert len(lengths) == 1, f"layers disagree about the length: {sorted(lengths)}"
        pools = {rows.length for rows in self.index_keys.values()}
        assert pools <= {self.length // rows.stride for rows in self.index_keys.values()}, "a pool is missing"

"""Kimi Delta Attention: a linear layer, whose memory is a state for each head. Called by the decoder block.

Numerics follow transformers 5.24, `Glm5NextTextLinearAttention`: convolution, norms of queries and keys,
gates and state in float32. Several rows of a sequence go through chunks, a single one through one step; the
two differ in their last bits.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from models.arithmetic import Arithmetic
from models.attention.attention import RowPart, Span
from models.glm5_next.delta_rule import by_chunks, step
from models.glm5_next.flash_args import FlashArgs
from models.glm5_next.flash_cache import FlashCache, LayerState, State
from models.in_flight import InFlight
from models.linear import Linear

# Rows whose chunks are described together: each takes about ten arrays of all heads in float32.
SLICE_ROWS = 512
NORM_EPS = 1e-6


class Convolution(nn.Module):
    """A causal convolution of each channel by itself; its weight is [channels, 1, kernel]."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = mx.zeros((channels, 1, kernel))


class HeadNorm(nn.Module):
    """RMS norm of each head's output, times the sigmoid of a gate."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self._eps = eps
        self.weight = mx.ones((width,))

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        """x float32 [N, heads, D], gate [N, heads, D] -> float32 [N, heads, D]."""
        return mx.fast.rms_norm(x, self.weight, self._eps) * mx.sigmoid(gate.astype(mx.float32))


class DeltaAttention(nn.Module):
    """One linear layer."""

    def __init__(self, args: FlashArgs, layer: int, arithmetic: Arithmetic) -> None:
        super().__init__()
        self._args, self._layer, self._arithmetic = args, layer, arithmetic
        hidden, width, head = args.hidden_size, args.linear_dim, args.linear_head_dim
        self.q_proj = Linear(hidden, width, arithmetic)
        self.k_proj = Linear(hidden, width, arithmetic)
        self.v_proj = Linear(hidden, width, arithmetic)
        self.q_conv1d = Convolution(width, args.linear_conv_kernel_dim)
        self.k_conv1d = Convolution(width, args.linear_conv_kernel_dim)
        self.v_conv1d = Convolution(width, args.linear_conv_kernel_dim)
        self.f_a_proj = Linear(hidden, head, arithmetic)
        self.f_b_proj = Linear(head, width, arithmetic)
        self.dt_bias = mx.zeros((width,))
        self.A_log = mx.zeros((args.linear_num_heads,))
        self.b_proj = Linear(hidden, args.linear_num_heads, arithmetic)
        self.g_a_proj = Linear(hidden, head, arithmetic)
        self.g_b_proj = Linear(head, width, arithmetic)
        self.o_norm = HeadNorm(head, args.rms_norm_eps)
        self.o_proj = Linear(width, hidden, arithmetic)

    def attended(self, x: mx.array, part: RowPart) -> mx.array:
        """x [N, H] -> [N, H]; the states in the caches of the spans go on behind their rows."""
        is_compiled = self._arithmetic.compiles and not part.is_large
        project, finish, _ = self._compiled if is_compiled else (self._project, self._finish, None)
        mixed, gate, beta, output_gate = project(x)
        in_flight = InFlight(self._arithmetic.pieces_in_flight) if part.is_large else None
        outs = []
        for span in part.spans:
            cache, state = state_of(span, self._layer)
            marks = cache.marks_between(state.length, state.length + span.rows)
            rows = [span.cut(array) for array in (mixed, gate, beta)]
            for start, stop in pairwise(_cuts(state.length, span.rows, marks)):
                outs.append(self._advance(state, *(array[start:stop] for array in rows)))
                if state.length in marks:
                    state.mark(state.length, state.arrays)
                if in_flight:
                    in_flight.launch(outs[-1], *state.arrays)
        return finish(outs[0] if len(outs) == 1 else mx.concatenate(outs), output_gate)

    def steps(self, x: mx.array, part: RowPart) -> bool:
        """Whether each sequence has one row, for which `step` has kernels of our own."""
        weights = (self.q_proj, self.k_proj, self.v_proj, self.f_a_proj, self.b_proj, self.g_a_proj)
        is_decode = len(part.spans) == x.shape[0]
        return is_decode and self._arithmetic.can_step(x, self._args.linear_head_dim, *weights)

    def step(self, x: mx.array, states: Sequence[State]) -> tuple[mx.array, list[State]]:
        """One row of each of several sequences, [N, H]: what it attends to, [N, H], and the states behind it.

        A pure function whose arrays keep their shapes from step to step.
        """
        args, arithmetic = self._args, self._arithmetic
        q, k, v, forget, beta, gate = arithmetic.projected(
            x, self.q_proj, self.k_proj, self.v_proj, self.f_a_proj, self.b_proj, self.g_a_proj
        )
        rows = (q, k, v, self.f_b_proj(forget), beta, self.g_b_proj(gate))
        bounds = float(args.linear_lower_bound), args.rms_norm_eps, NORM_EPS
        outs, after = [], []
        for i, (matrix, before) in enumerate(states):
            row = [array[i : i + 1] for array in rows] if len(states) > 1 else rows
            out, *arrays = arithmetic.delta_step(self, (matrix, before), row, *bounds)
            outs.append(out)
            after.append(tuple(arrays))
        return self.o_proj(outs[0] if len(outs) == 1 else mx.concatenate(outs)), after

    def states(self, part: RowPart) -> list[State]:
        """The states of the sequences."""
        return [state_of(span, self._layer)[1].arrays for span in part.spans]

    def keep(self, part: RowPart, states: Sequence[State]) -> None:
        """Stores each sequence's state after this row."""
        for span, arrays in zip(part.spans, states, strict=True):
            cache, state = state_of(span, self._layer)
            state.advance(arrays, 1)
            if state.length in cache.marks_between(state.length - 1, state.length):
                state.mark(state.length, arrays)

    @cached_property
    def _compiled(self) -> tuple[Callable[..., Any], ...]:
        """What comes before the states are used, after, and between, for few rows."""
        return mx.compile(self._project), mx.compile(self._finish), mx.compile(self._recur)

    def _project(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """What rows x [N, H] bring: inputs to convolve [N, 3 width], gate, beta, and the output's gate."""
        mixed = mx.concatenate([self.q_proj(x), self.k_proj(x), self.v_proj(x)], axis=-1)
        return mixed, *self._gates(x), self.g_b_proj(self.g_a_proj(x))

    def _finish(self, out: mx.array, output_gate: mx.array) -> mx.array:
        """float32 [N, heads, D], [N, width] -> [N, H]."""
        normed = self.o_norm(out, output_gate.reshape(out.shape)).astype(output_gate.dtype)
        return self.o_proj(normed.reshape(out.shape[0], -1))

    def _gates(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The logarithm of each channel's decay, float32 [N, heads, D], and each head's beta, [N, heads].

        The bound is the value that a sigmoid tends to, not one at which values are cut off.
        """
        args = self._args
        raw = self.f_b_proj(self.f_a_proj(x)).astype(mx.float32) + self.dt_bias
        raw = raw.reshape(-1, args.linear_num_heads, args.linear_head_dim)
        gate = args.linear_lower_bound * mx.sigmoid(mx.exp(self.A_log)[:, None] * raw)
        return gate, mx.sigmoid(self.b_proj(x).astype(mx.float32))

    def _advance(self, state: LayerState, mixed: mx.array, gate: mx.array, beta: mx.array) -> mx.array:
        """The next rows of one sequence: [n, 3 width], ... -> float32 [n, heads, D]."""
        matrix, before = state.arrays
        rows, position = mixed.shape[0], state.length
        if rows == 1:
            one = self._compiled[2] if self._arithmetic.compiles else self._recur
            out, *arrays = one(matrix, before, mixed, gate, beta)
            state.advance(tuple(arrays), 1)
            return out
        inputs = mx.concatenate([before, mixed])
        q, k, v = self._prepared(inputs, rows)
        out, matrix = by_chunks(matrix, q, k, v, gate, beta, position)
        # A copy: a slice would keep all rows of the part in memory as long as the state is kept.
        state.advance((matrix, mx.contiguous(inputs[rows:])), rows)
        return out

    def _recur(
        self, matrix: mx.array, before: mx.array, mixed: mx.array, gate: mx.array, beta: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """A single row: what it reads [1, heads, D], and the two arrays of the state behind it."""
        inputs = mx.concatenate([before, mixed])
        row = [one.reshape(one.shape[1:]) for one in (*self._prepared(inputs, 1), gate, beta)]
        out, matrix = step(matrix, *row)
        return out[None], matrix, mx.contiguous(inputs[1:])

    def _prepared(self, inputs: mx.array, rows: int) -> tuple[mx.array, mx.array, mx.array]:
        """Queries and keys of length one, scaled, and values: float32 [n, heads, D] each."""
        q, k, v = self._convolved(inputs, rows)
        return _unit(q) * q.shape[-1] ** -0.5, _unit(k), v

    def _convolved(self, inputs: mx.array, rows: int) -> list[mx.array]:
        """inputs [kernel - 1 + n, 3 width] -> queries, keys and values, float32 [n, heads, D] each."""
        args = self._args
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        weight = mx.concatenate([one.weight[:, 0] for one in convolutions])
        exact = inputs.astype(mx.float32)
        taps = [exact[j : j + rows] * weight[:, j] for j in range(args.linear_conv_kernel_dim)]
        out = nn.silu(sum(taps[1:], taps[0]))
        shape = (rows, args.linear_num_heads, args.linear_head_dim)
        return [piece.reshape(shape) for piece in mx.split(out, 3, axis=-1)]


def state_of(span: Span, layer: int) -> tuple[FlashCache, LayerState]:
    """A span's cache, and its state in a layer: where another sequence lends its beginning, behind that."""
    cache, origin = cast(FlashCache, span.cache), cast(FlashCache | None, span.origin)
    state = cache.layer_states[layer]
    if origin:
        state.adopt(origin.layer_states[layer], span.num_shared)
    return cache, state


def _cuts(position: int, rows: int, marks: list[int]) -> list[int]:
    """Where rows from `position` on are cut: at marks, and into slices that end at multiples of a size."""
    ends = {mark - position for mark in marks}
    ends |= set(range(SLICE_ROWS - position % SLICE_ROWS, rows, SLICE_ROWS))
    return sorted({0, rows} | ends)


def _unit(x: mx.array) -> mx.array:
    """Each vector divided by its length."""
    return x / mx.sqrt((x * x).sum(axis=-1, keepdims=True) + NORM_EPS)

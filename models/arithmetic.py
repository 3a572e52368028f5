"""How products with weights are computed on the backend at hand. The one place that knows backends.

Everything else in `models/` asks an `Arithmetic` for a product and never looks at the device. Figures are
in benchmarks/notes.md; the command is `python -m benchmarks.arithmetic`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from models.attention.selection import kth_by_bits, kth_by_numpy, kth_by_partition
from models.cuda import choices, delta, few_rows, products, streams, sums
from models.cuda.delta import DeltaLayer
from models.cuda.fused_attention import AttentionLayer, FusedAttention
from models.cuda.products import parts_of

# What MLX packs in mode affine; the other modes have one size each.
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)
# Multiplications of queries with keys that take MLX's CPU wheel as long as evaluating them at once takes.
NUMPY_PRODUCTS = 2**16
# A packed weight that is larger when it is unpacked goes through NumPy's product by parts of its outputs:
# GLM-5.2's head, which is 3.8 GB, as much as all else of a step.
MAX_UNPACKED_BYTES = 2**29
# Of packed weights whose rows MLX's CUDA kernel multiplies in one order, however many there are.
GROUPED_BITS = (4, 8)


@dataclass(frozen=True)
class Quantization:
    """How one weight is packed: MLX's `mode`, bits and values per group."""

    group_size: int
    bits: int
    mode: str = "affine"


class Weight(Protocol):
    """A matrix `[..., out, in]`, dense (`quantization` None) or packed with `scales` and perhaps `biases`."""

    @property
    def weight(self) -> mx.array: ...

    @property
    def quantization(self) -> Quantization | None: ...

    def get(self, name: str, /) -> mx.array | None: ...


@dataclass(frozen=True)
class Dense:
    """A matrix that is not packed."""

    weight: mx.array
    quantization: None = None

    def get(self, name: str, /) -> mx.array | None:
        return None


def scales_of(w: Weight) -> mx.array:
    """The scales of a packed weight."""
    scales = w.get("scales")
    assert scales is not None, "a packed weight carries scales"
    return scales


@dataclass(frozen=True)
class Arithmetic:
    """The forms of arithmetic that one backend is fastest at.

    `dtype`: activations, caches and small floating-point weights.
    `max_packed_rows`: up to this many rows a packed weight is multiplied as it is. Above, the weight is
    unpacked once and the rows go through one matrix product. None: packed always.
    `max_alone_rows`: up to this many rows each is computed by itself, so that a row's result does not depend
    on its company. None: not even two.
    `max_gathered_rows`: up to this many rows each (row, expert) pair is computed by itself; above, each
    expert with all the rows that want it, `experts_at_once` of them between two evaluations.
    `max_gathered_bytes`: and of more rows, while the experts of all pairs come to no more than this together.
    `gather_from`: with more keys than this for each selected one, a prompt's rows gather the selected keys;
    with fewer they attend to all keys under a mask.
    `tile_elements`: of the largest intermediate of attention and indexer, within the bounds of
    `models.attention.tiles`.
    `pieces_in_flight`: so many of a prompt's tiles are computed or described at one time; with 1 each is
    evaluated before the next is described.
    `selects_by_bits`: the k-th best of many scores is found by counting, not by a partition that is a sort.
    `uses_numpy`: products of many rows, and attention and indexer scores where they are some work, are
    NumPy's, evaluated at once, in float32.
    `max_grouped_rows`: experts with up to so many of a prompt's rows are multiplied several in one product.
    `slots_on_device`: reading ids back costs more than looking slots up where every expert has one.
    `launches_early`: a layer of few rows is computed while the next one's graph is built.
    `pauses_steps`: it is computed before that, so that between two layers others can have the processor.
    `compiles`: what few rows go through between two uses of the cache is compiled once for their number.
    `has_kernels`: what `models.cuda` can compute is computed there.
    `swiglu_limit`: bound of what a gated MLP multiplies, of the model at hand: above for silu's argument,
    on both sides for the other factor.
    """

    name: str
    dtype: mx.Dtype
    max_packed_rows: int | None
    max_alone_rows: int | None = None
    max_gathered_rows: int = 32
    max_gathered_bytes: int = 0
    min_pairs: int = 1
    experts_at_once: int = 4
    gather_from: int = 6
    tile_elements: int = 2**24
    pieces_in_flight: int = 3
    selects_by_bits: bool = False
    uses_numpy: bool = False
    max_grouped_rows: int = 0
    slots_on_device: bool = True
    launches_early: bool = False
    pauses_steps: bool = False
    compiles: bool = False
    has_kernels: bool = False
    swiglu_limit: float = math.inf

    def launch(self, x: mx.array) -> None:
        """Computes what a layer of few rows comes to, or starts to, where that is not left to its reader."""
        if self.launches_early:
            mx.async_eval(x)
        elif self.pauses_steps:
            mx.eval(x)

    def is_few(self, rows: int) -> bool:
        """Whether so many rows are multiplied with the weights as they are packed."""
        return self.max_packed_rows is None or rows <= self.max_packed_rows

    def gathers(self, rows: int) -> bool:
        """Whether the experts of so many rows are computed pair by pair."""
        return rows <= self.max_gathered_rows

    def product(self, x: mx.array, w: Weight) -> mx.array:
        """x times the transpose of w. x [..., rows, in], w [..., out, in] -> [..., rows, out]."""
        q, rows = w.quantization, x.shape[-2]
        if self._goes_to_numpy(rows):
            return self._numpy_product(_floats(x), w)
        if q is None:
            return self._dense_product(x, w.weight.swapaxes(-1, -2))
        if rows <= products.TILE_ROWS and self._has_kernel(x, w):
            return products.multiply(x, [parts_of(w)], q.group_size)
        if not self.is_few(rows):
            return x @ self._unpack(w, q).swapaxes(-1, -2)
        return mx.quantized_matmul(
            x, w.weight, scales_of(w), w.get("biases"), True, q.group_size, q.bits, q.mode
        )

    def mlp(self, x: mx.array, gate: Weight, up: Weight, down: Weight) -> mx.array:
        """A gated MLP for many rows, its packed weights unpacked: x [rows, in] -> [rows, out]."""
        rows = x.shape[-2]
        if self._goes_to_numpy(rows):
            return self.product(self.gated_product(x, gate, up), down)
        gate, up, down = (self._unpacked(w, rows) for w in (gate, up, down))
        return self.product(self.gated(self.product(x, gate), self.product(x, up)), down)

    def gated_product(self, x: mx.array, gate: Weight, up: Weight) -> mx.array:
        """silu(x gate) * (x up): x [rows, in], weights [width, in] -> [rows, width]."""
        if self._goes_to_numpy(x.shape[-2]):
            values = _floats(x)
            out, factor = _delivered(values, self._transposed(gate)), values @ self._transposed(up)
            if self.swiglu_limit < math.inf:
                np.minimum(_view(out), self.swiglu_limit, out=_view(out))
                np.clip(factor, -self.swiglu_limit, self.swiglu_limit, out=factor)
            _silu(_view(out))
            np.multiply(_view(out), factor, out=_view(out))
            return out
        if x.shape[-2] <= products.TILE_ROWS and self._has_kernel(x, gate, up):
            return self._gated_by_kernel(x, gate, up)
        return self.gated(self.product(x, gate), self.product(x, up))

    def pairs(self, x: mx.array, gate: Weight, up: Weight, down: Weight, slots: mx.array) -> mx.array:
        """Each row through the gated MLPs in its slots: x [N, in], weights [slots, ...], slots [N, k] ->
        [N, k, out]."""
        if self._has_kernel(x, gate, up) and (q := down.quantization) is not None:
            hidden = self._gated_by_kernel(x, gate, up, slots)
            if self._has_kernel(hidden, down):
                return products.multiply(hidden, [parts_of(down)], q.group_size, slots=slots)
            return self._gathered_product(hidden[..., None, :], down, slots)[..., 0, :]
        rows = x[:, None, None, :]
        both = (self._gathered_product(rows, w, slots) for w in (gate, up))
        return self._gathered_product(self.gated(*both), down, slots)[..., 0, :]

    def mixed(self, pairs: mx.array, weights: mx.array, added: Sequence[mx.array] = ()) -> mx.array:
        """Sum of each row's pairs by weight, in order, and others: [N, k, H], float32 [N, k] -> [N, H]."""
        if self.has_kernels:
            return sums.mix(pairs, weights, added)
        return sum(added, (pairs * weights[..., None]).sum(axis=1).astype(pairs.dtype))

    def grouped(self, x: mx.array, gate: Weight, up: Weight, down: Weight, slots: mx.array) -> mx.array:
        """Rows of several experts, each through its own gated MLP: x [G, rows, in], slots [G]."""
        hidden = self.gated(self._gather(x, gate, slots), self._gather(x, up, slots))
        return self._gather(hidden, down, slots)

    def can_group(self, rows: int, *weights: Weight) -> bool:
        """Whether experts with so many of a prompt's rows each are best multiplied together."""
        return rows <= self.max_grouped_rows and all(
            w.quantization is not None and w.quantization.bits in GROUPED_BITS for w in weights
        )

    def add_experts(
        self, out: mx.array, y: mx.array, weights: mx.array, ids: mx.array, ranks: mx.array, bases: mx.array
    ) -> mx.array:
        """As `models.cuda.sums.add_experts`."""
        if self.has_kernels:
            return sums.add_experts(out, y, weights, ids, ranks, bases)
        starts = bases[ids]
        places = mx.maximum(starts + ranks, 0)
        for j in range(ids.shape[1]):
            added = out + y[places[:, j]] * weights[:, j, None]
            out = mx.where(starts[:, j, None] >= 0, added, out)
        return out

    def readable(self, ids: mx.array, bound: int) -> list[mx.array]:
        """Non-negative integers below `bound`, [N, k], as arrays of their rows that are read back fastest.

        MLX's CUDA backend keeps up to eight bytes where the host reads them; longer arrays are moved first.
        """
        if not self.has_kernels or bound > 256 or ids.shape[1] > 8 or ids.shape[0] > products.TILE_ROWS:
            return [ids]
        return [ids[i : i + 1].astype(mx.uint8) for i in range(ids.shape[0])]

    def sent(self, values: NDArray[np.int32], bound: int) -> mx.array:
        """Non-negative integers below `bound`, [N, k], on the device, the fastest way."""
        rows, width = values.shape
        if not self.has_kernels or bound > 256 or width > 8 or rows > products.TILE_ROWS:
            return mx.array(values)
        small = [mx.array(row[None]) for row in values.astype(np.uint8)]
        return small[0] if rows == 1 else mx.concatenate(small)

    def exact_product(self, x: mx.array, w: Weight) -> mx.array:
        """As `product`, in float32 whatever the rows are; w is a dense float32 matrix."""
        if self.has_kernels and x.dtype == mx.bfloat16 and x.shape[0] <= products.TILE_ROWS:
            return choices.logits(x, w.weight)
        return self.product(x.astype(mx.float32), w)

    def can_route(self, num_experts: int, k: int) -> bool:
        """Whether `route` is the fastest way to choose k experts."""
        return self.has_kernels and choices.can_route(num_experts, k)

    def route(
        self, logits: mx.array, bias: mx.array, k: int, is_normed: bool, factor: float
    ) -> list[mx.array]:
        """As `choices.route`, where `can_route` says so."""
        return choices.route(logits, bias, k, is_normed, factor)

    def kth_best(self, scores: mx.array, k: int) -> mx.array:
        """The k-th best score of each row, float32 [N, T] -> [N, 1], the fastest way; any gives the same."""
        if self.uses_numpy:
            return kth_by_numpy(scores, k)
        return kth_by_bits(scores, k) if self.selects_by_bits else kth_by_partition(scores, k)

    def best_positions(self, scores: mx.array, k: int) -> mx.array | None:
        """As `choices.best_positions`; None where that is not the fastest way."""
        return choices.best_positions(scores, k) if self.has_kernels else None

    def best_mask(self, scores: mx.array, k: int) -> mx.array | None:
        """As `choices.best_mask`; None where that is not the fastest way."""
        return choices.best_mask(scores, k) if self.has_kernels else None

    def collapses(self, x: mx.array, count: int) -> bool:
        """Whether so many streams of few rows are mixed by kernels of our own."""
        few = x.shape[0] <= products.TILE_ROWS and x.dtype == mx.bfloat16
        return self.has_kernels and few and count == streams.STREAMS

    def collapse(
        self,
        x: mx.array,
        weights: tuple[mx.array, mx.array, mx.array],
        norm: mx.array,
        rounds: int,
        eps: float,
        norm_eps: float,
    ) -> list[mx.array]:
        """As `streams.collapse`, where `collapses` says so."""
        return streams.collapse(x, weights, norm, rounds, eps, norm_eps)

    def join(self, x: mx.array, added: mx.array, post: mx.array, among: mx.array) -> mx.array:
        """As `streams.join`, where `collapses` says so."""
        return streams.join(x, added, post, among)

    def can_step(self, x: mx.array, width: int, *weights: Weight) -> bool:
        """Whether `projected` and `delta_step` take these rows and weights, of heads of this width."""
        few = x.shape[0] <= products.TILE_ROWS and x.dtype == mx.bfloat16
        return few and delta.can_step(width) and self._has_kernel(x, *weights)

    def projected(self, x: mx.array, *weights: Weight) -> list[mx.array]:
        """The rows' products with each of these weights, where `can_step` says so."""
        assert weights[0].quantization is not None, "a kernel multiplies packed weights"
        parts = [parts_of(w) for w in weights]
        return products.multiply_each(x, parts, weights[0].quantization.group_size, [x.dtype] * len(parts))

    def delta_step(
        self,
        layer: DeltaLayer,
        state: tuple[mx.array, mx.array],
        row: Sequence[mx.array],
        bound: float,
        norm_eps: float,
        unit_eps: float,
    ) -> list[mx.array]:
        """As `delta.step`, where `can_step` says so."""
        return delta.step(layer, state, row, bound, norm_eps, unit_eps)

    def fused_attention(self, layer: AttentionLayer, top_k: int, scale: float) -> FusedAttention | None:
        """Attention of few rows in the fewest kernels, where all weights of the layer are packed for them."""
        weights: list[Any] = [layer.q_a_proj, layer.q_b_proj, layer.kv_a_proj_with_mqa, layer.embed_q]
        weights += [layer.unembed_out, layer.o_proj]
        can_score = True
        if "indexer" in layer:
            indexer = layer["indexer"]
            weights += [indexer.wq_b, indexer.wk, indexer.weights_proj]
            can_score = few_rows.can_score(indexer.num_heads, indexer.head_dim)
        if not can_score or not self._has_kernel(mx.zeros(1, self.dtype), *weights):
            return None
        values = layer.embed_q.weight.shape[1]
        if not few_rows.can_attend(values + 2 * layer.periods.size, values, top_k):
            return None
        return FusedAttention(layer, weights[0].quantization.group_size, top_k, scale)

    def fuses(self, rows: int) -> bool:
        """Whether `fused_attention` is for so many rows."""
        return self.has_kernels and rows <= products.TILE_ROWS

    def _gathered_product(self, x: mx.array, w: Weight, slots: mx.array) -> mx.array:
        """Each row with the matrix in its own slot. x [..., 1, in], w [slots, out, in], slots [...]."""
        num_pairs = slots.size
        if num_pairs >= self.min_pairs:
            return self._gather(x, w, slots)
        x = mx.broadcast_to(x, (*slots.shape, *x.shape[-2:])).reshape(-1, *x.shape[-2:])
        order = mx.minimum(mx.arange(self.min_pairs), num_pairs - 1)
        out = self._gather(x[order], w, slots.reshape(-1)[order])
        return out[:num_pairs].reshape(*slots.shape, 1, -1)

    def _has_kernel(self, x: mx.array, *weights: Weight) -> bool:
        """Whether all these are packed alike, as the kernels take it."""
        if not self.has_kernels or (q := weights[0].quantization) is None:
            return False
        return all(w.quantization == q for w in weights) and products.supports(
            x, weights[0].weight, scales_of(weights[0]), q.mode, q.bits, q.group_size
        )

    def _gather(self, x: mx.array, w: Weight, slots: mx.array) -> mx.array:
        q = w.quantization
        if q is None:
            return mx.gather_mm(x, w.weight.swapaxes(-1, -2), rhs_indices=slots)
        return mx.gather_qmm(
            x, w.weight, scales_of(w), w.get("biases"), rhs_indices=slots,
            transpose=True, group_size=q.group_size, bits=q.bits, mode=q.mode,
        )  # fmt: skip

    def attended(self, q: mx.array, keys: mx.array, values: mx.array, visible: mx.array | None) -> mx.array:
        """softmax(q keys^T) values, the softmax in float32; keys that are not visible count for nothing.

        q [..., n, D], keys [..., T, D], values [..., T, V], visible bool [..., n, T] or None for all ->
        [..., n, V].
        """
        if not self._is_worth_numpy(q, keys):
            scores = q @ keys.swapaxes(-1, -2)
            seen = scores if visible is None else mx.where(visible, scores, -mx.inf)
            return mx.softmax(seen, axis=-1, precise=True).astype(self.dtype) @ values
        weights = _times(_floats(q), _floats(keys).swapaxes(-1, -2))
        if visible is not None:
            np.copyto(weights, -np.inf, where=~_view(visible))
        weights -= weights.max(axis=-1, keepdims=True)
        np.exp(weights, out=weights)
        out = _delivered(weights, _floats(values))
        _view(out)[...] /= weights.sum(axis=-1, keepdims=True)
        return out

    def index_scores(self, queries: mx.array, weights: mx.array, keys: mx.array) -> mx.array:
        """sum over heads of w_h relu(q_h . k): [N, heads, D], [N, heads], [T, D] -> float32 [N, T].

        The sum is a product with the weights, not `mx.sum` over a strided axis, which returned zeros above
        2^31 elements (mlx #3784).
        """
        if not self._is_worth_numpy(queries, keys):
            of_heads = mx.maximum(queries @ keys.astype(mx.float32).T, 0)  # [N, heads, T]
            return (weights[:, None, :] @ of_heads)[:, 0, :]
        scores = _times(_floats(queries), _floats(keys).T)
        np.maximum(scores, 0, out=scores)
        return _delivered(_floats(weights)[:, None, :], scores)[:, 0, :]

    def gated(self, gate: mx.array, up: mx.array) -> mx.array:
        """silu(gate) * up, [..., rows, width]."""
        if self.swiglu_limit < math.inf:
            gate = mx.minimum(gate, self.swiglu_limit)
            up = mx.clip(up, -self.swiglu_limit, self.swiglu_limit)
        return nn.silu(gate) * up

    def _gated_by_kernel(
        self, x: mx.array, gate: Weight, up: Weight, slots: mx.array | None = None
    ) -> mx.array:
        """The same of x gate and x up, in one kernel."""
        assert gate.quantization is not None, "a kernel multiplies packed weights"
        size, parts = gate.quantization.group_size, [parts_of(gate), parts_of(up)]
        return products.multiply(x, parts, size, slots=slots, limit=self.swiglu_limit)

    def add_rows(self, out: mx.array, rows: NDArray[np.int64], added: mx.array) -> mx.array:
        """out [N, H] with added [n, H] on top of these rows, each named once; nobody else refers to out."""
        if not self.uses_numpy:
            return out.at[mx.array(rows)].add(added)
        mx.eval(out, added)
        _view(out)[rows] += _view(added)
        return out

    def _is_worth_numpy(self, queries: mx.array, keys: mx.array) -> bool:
        """Whether so many queries and keys are multiplied at once; else they stay lazy."""
        return self.uses_numpy and queries.size * keys.shape[-2] >= NUMPY_PRODUCTS

    def _goes_to_numpy(self, rows: int) -> bool:
        return self.uses_numpy and not self.is_few(rows)

    def outputs_at_once(self, num_outputs: int, width: int) -> int:
        """Of a packed matrix [outputs, width]: how many are unpacked together."""
        return min(num_outputs, MAX_UNPACKED_BYTES // (4 * width)) if self.uses_numpy else num_outputs

    def _numpy_product(self, x: NDArray[np.float32], w: Weight) -> mx.array:
        """As `product`; a large packed weight is unpacked part by part."""
        num_outputs = w.weight.shape[0]
        at_once = self.outputs_at_once(num_outputs, x.shape[-1])
        if (q := w.quantization) is None or w.weight.ndim > 2 or at_once == num_outputs:
            return _delivered(x, self._transposed(w))
        out = mx.zeros((*x.shape[:-1], num_outputs))
        for first in range(0, num_outputs, at_once):
            part = slice(first, first + at_once)
            _view(out)[..., part] = _times(x, _floats(self._unpack(w, q, part)).T)
        return out

    def _transposed(self, w: Weight) -> NDArray[np.float32]:
        """The unpacked weight [..., in, out]."""
        q = w.quantization
        return _floats(w.weight if q is None else self._unpack(w, q)).swapaxes(-1, -2)

    def _unpacked(self, w: Weight, rows: int) -> Weight:
        """The weight in the form that so many rows are multiplied with."""
        q = w.quantization
        return w if q is None or self.is_few(rows) else Dense(self._unpack(w, q))

    def _unpack(self, w: Weight, q: Quantization, outputs: slice | None = None) -> mx.array:
        """The weight as the activations are, or these outputs of it."""
        weight, scales, biases = w.weight, scales_of(w), w.get("biases")
        if outputs:
            weight, scales = weight[outputs], scales[outputs]
            biases = biases if biases is None else biases[outputs]
        return mx.dequantize(weight, scales, biases, q.group_size, q.bits, q.mode, dtype=self.dtype)

    def _dense_product(self, x: mx.array, dense: mx.array) -> mx.array:
        """BLAS rounds differently for one row and for several; few rows are computed as if each was alone."""
        rows = x.shape[-2]
        if rows == 1 or rows > (self.max_alone_rows or 1):
            return x @ dense
        return mx.concatenate([x[..., i : i + 1, :] @ dense for i in range(rows)], axis=-2)


def _view(array: mx.array) -> NDArray[Any]:
    """The array's own memory, once it is evaluated."""
    mx.eval(array)
    return np.array(array, copy=False)


def _floats(array: mx.array) -> NDArray[np.float32]:
    """The array's own memory, or a copy where it is not float32: NumPy knows no bfloat16."""
    return _view(array.astype(mx.float32))


def _times(
    a: NDArray[np.float32], b: NDArray[np.float32], out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """a times b, [..., n, m] and [..., m, k]; one matrix for all of a is multiplied in one call."""
    if b.ndim > 2 or a.ndim == 2:
        return np.matmul(a, b, out=out)
    flat = None if out is None else out.reshape(-1, b.shape[1])
    return np.matmul(a.reshape(-1, a.shape[-1]), b, out=flat).reshape(*a.shape[:-1], b.shape[1])


def _silu(values: NDArray[np.float32]) -> None:
    """silu of the values, in place."""
    with np.errstate(over="ignore"):  # of a large negative one: nothing is left of it
        inverse = np.exp(-values)
    inverse += 1
    values /= inverse


def _delivered(a: NDArray[np.float32], b: NDArray[np.float32]) -> mx.array:
    """a times b in memory of MLX's."""
    out = mx.zeros((*a.shape[:-1], b.shape[-1]))
    _times(a, b, _view(out))
    return out


# bfloat16 products are 8 times slower than float32 ones in MLX's CPU kernels, and one packed product costs
# as much as unpacking the weight and a BLAS call at 4 to 8 rows (2 cores, AMD EPYC). 8 keeps a batch of
# eight agents exact.
# Unpacked experts lie in memory until they are evaluated: one at a time. Tiles that fit its caches are twice
# as fast as large ones. An exponential takes 25 ns and NumPy's 3, a sum over chosen rows 11 ns and NumPy's 1
# (python -m benchmarks.arithmetic). Gathering wins from twice as many keys as are selected.
CPU = Arithmetic(
    "cpu",
    mx.float32,
    max_packed_rows=8,
    max_alone_rows=8,
    max_gathered_rows=8,
    experts_at_once=1,
    gather_from=2,
    tile_elements=2**20,
    pieces_in_flight=1,
    uses_numpy=True,
    slots_on_device=False,
    pauses_steps=True,
)
# The defaults; not measured on Metal. There `mx.partition` is a full sort in several blocks, by MLX's source.
METAL = Arithmetic("metal", mx.bfloat16, max_packed_rows=None, selects_by_bits=True)
# On one H100 gathering selected keys won from 12,288 keys for 2,048, unpacked weights from about 32 rows. MLX
# 0.32 multiplies fewer than eight gathered pairs by another kernel than eight and more; one kernel for all
# gives streamed experts the bits of resident ones. Eight pairs in one call are also faster than in two.
CUDA = Arithmetic(
    "cuda",
    mx.bfloat16,
    max_packed_rows=32,
    max_gathered_bytes=2**29,
    min_pairs=8,
    experts_at_once=16,
    max_grouped_rows=512,
    tile_elements=2**26,
    launches_early=True,
    compiles=True,
    has_kernels=True,
)


def choose_arithmetic() -> Arithmetic:
    """The arithmetic of MLX's default device."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return CPU
    return CUDA if mx.cuda.is_available() else METAL

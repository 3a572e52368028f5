"""Kernels of our own for CUDA, where MLX launches many small ones. Called by arithmetic only.

Products of few rows with 4-bit weights, the router's choice, the choice of keys, sums of experts' outputs.
Each result depends on its own row alone, and a product with an expert not on the slot that holds it. What
these kernels do not take, MLX's own operations do; `supports` and `can_route` say which.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import mlx.core as mx

Kernel = Callable[..., list[mx.array]]
# Rows that one block multiplies with the weights it has read; a tensor core's tile has so many columns.
TILE_ROWS = 8
# Outputs of one block: the rows of a tensor core's tile.
TILE_OUTPUTS = 16
WARP = 32
MOST_WARPS = 8
# Groups of packed values that a warp has on their way from memory at a time.
GROUPS_AT_ONCE = 4

_HEADER = r"""
#include <cuda_bf16.h>
using Bf16 = __nv_bfloat16;

// Adds A[16, 16] B[16, 8] to d; the four words of A and two of B are this lane's.
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Values i and i + 4 of a word's eight: as bfloat16, affine ones with 128 added.
template <bool AFFINE>
__device__ __forceinline__ unsigned pair_of(unsigned word, int i) {
  const unsigned shifted = word >> (4 * i);
  if (AFFINE) return (shifted & 0x000F000Fu) | 0x43004300u;
  const unsigned small = ((shifted << 12) & 0x80008000u) | ((shifted << 6) & 0x01C001C0u);
  const __nv_bfloat162 unit = __bfloat162bfloat162(__ushort_as_bfloat16(0x7E80));
  const __nv_bfloat162 scaled = __hmul2(reinterpret_cast<const __nv_bfloat162&>(small), unit);
  return reinterpret_cast<const unsigned&>(scaled);
}

__device__ __forceinline__ float scale_of(Bf16 scale) { return __bfloat162float(scale); }
__device__ __forceinline__ float scale_of(unsigned char power) {
  return power ? __uint_as_float(static_cast<unsigned>(power) << 23) : __uint_as_float(0x00400000u);
}

// One warp's share of 16 outputs for 8 rows: groups `first` to `last` of rows lane / 4 and lane / 4 + 8.
template <bool AFFINE, int GROUP, typename S>
__device__ __forceinline__ void dot(
    float (&sum)[4], const Bf16* x, bool has_row, const unsigned* w, const S* scales, const S* biases,
    int first, int last, int groups) {
  constexpr int WORDS = GROUP / 32, AT_ONCE = GROUPS_AT_ONCE;
  const int t = threadIdx.x & 3;
  const long next_w = 8L * groups * (GROUP / 8), next_s = 8L * groups;
  const unsigned ones[4] = {0x3F803F80u, 0x3F803F80u, 0x3F803F80u, 0x3F803F80u};
  for (int at = first; at < last; at += AT_ONCE) {
    unsigned words[AT_ONCE][2][WORDS];
    uint4 xs[AT_ONCE][WORDS];
    float s[AT_ONCE][2], b[AT_ONCE][2];
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) {
      const bool is_in = at + u < last;
      const int group = is_in ? at + u : first;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned* from = w + half * next_w + group * (GROUP / 8) + t * WORDS;
        unsigned(&to)[WORDS] = words[u][half];
        if constexpr (WORDS == 4) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
        if constexpr (WORDS == 2) *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(from);
        if constexpr (WORDS == 1) to[0] = *from;
        s[u][half] = is_in ? scale_of(scales[half * next_s + group]) : 0.0f;
        b[u][half] = AFFINE && is_in ? scale_of(biases[half * next_s + group]) - 128.0f * s[u][half] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < WORDS; ++i)
        xs[u][i] = has_row ? *reinterpret_cast<const uint4*>(x + group * GROUP + (t * WORDS + i) * 8)
                           : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int u = 0; u < AT_ONCE; ++u) {
      float d[4] = {0, 0, 0, 0}, total[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < WORDS; ++i) {
        const uint4 v = xs[u][i];
        const unsigned p0 = __byte_perm(v.x, v.z, 0x5410), p1 = __byte_perm(v.x, v.z, 0x7632);
        const unsigned p2 = __byte_perm(v.y, v.w, 0x5410), p3 = __byte_perm(v.y, v.w, 0x7632);
        const unsigned low = words[u][0][i], high = words[u][1][i];
        const unsigned a[4] = {pair_of<AFFINE>(low, 0), pair_of<AFFINE>(high, 0),
                               pair_of<AFFINE>(low, 1), pair_of<AFFINE>(high, 1)};
        const unsigned c[4] = {pair_of<AFFINE>(low, 2), pair_of<AFFINE>(high, 2),
                               pair_of<AFFINE>(low, 3), pair_of<AFFINE>(high, 3)};
        mma(d, a, p0, p1);
        mma(d, c, p2, p3);
        if (AFFINE) {
          mma(total, ones, p0, p1);
          mma(total, ones, p2, p3);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sum[i] += s[u][i / 2] * d[i] + (AFFINE ? b[u][i / 2] * total[i] : 0.0f);
    }
  }
}

// Adds up what the warps have, in their order: [8 rows][16 outputs] in `out`.
__device__ __forceinline__ void add_warps(float* shared, const float (&sum)[4], float* out) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  float* mine = shared + warp * 128;
#pragma unroll
  for (int i = 0; i < 4; ++i) mine[(2 * (lane & 3) + (i & 1)) * 16 + lane / 4 + 8 * (i / 2)] = sum[i];
  __syncthreads();
  for (int i = threadIdx.x; i < 128; i += blockDim.x) {
    float all = 0;
    for (int one = 0; one < warps; ++one) all += shared[one * 128 + i];
    out[i] = all;
  }
  __syncthreads();
}
""".replace("GROUPS_AT_ONCE;", f"{GROUPS_AT_ONCE};")

# Which matrix, and which rows of x with it: up to eight with one matrix, the same for each of several, or one
# with the matrix in its slot.
_PLACE = {
    "one": """
  const int all_rows = x_shape[0], start = blockIdx.y * 8, N = w_shape[0], K = w_shape[1] * 8;
  const long matrix = 0, row = start, to = row;
  const int rows = min(8, all_rows - start);
""",
    "each": """
  const int all_rows = x_shape[1], tiles = (all_rows + 7) / 8, start = blockIdx.y % tiles * 8;
  const int N = w_shape[1], K = w_shape[2] * 8;
  const long matrix = blockIdx.y / tiles, row = matrix * all_rows + start, to = row;
  const int rows = min(8, all_rows - start);
""",
    "slots": """
  const int N = w_shape[1], K = w_shape[2] * 8;
  const long matrix = slots[blockIdx.y], row = blockIdx.y / pairs_per_row, to = blockIdx.y;
  constexpr int rows = 1;
""",
}
_BEGIN = """
  const int groups = K / GROUP;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4;
  const long output = blockIdx.x * 16L + g;
  const int each = (groups + warps - 1) / warps, first = warp * each, last = min(groups, first + each);
  const Bf16* mine = reinterpret_cast<const Bf16*>(x) + (row + (g < rows ? g : 0)) * K;
  __shared__ float shared[8 * 128], result[2][128];
"""
_DOT = """
  {
    float sum[4] = {0, 0, 0, 0};
    const long scale_at = (matrix * N + output) * groups;
    dot<AFFINE, GROUP>(sum, mine, g < rows, WEIGHT + scale_at * (GROUP / 8), SCALES + scale_at,
                       BIASES + scale_at, first, last, groups);
    add_warps(shared, sum, result[WHICH]);
  }
"""
_STORE = """
  for (int i = threadIdx.x; i < rows * 16; i += blockDim.x)
    out[(to + i / 16) * N + blockIdx.x * 16L + i % 16] = static_cast<T>(VALUE);
"""
_GATED = """__bfloat162float(__float2bfloat16(silu(__bfloat162float(__float2bfloat16(result[0][i]))))) *
        __bfloat162float(__float2bfloat16(result[1][i]))"""
_SILU = "\n__device__ __forceinline__ float silu(float v) { return v / (1.0f + __expf(-v)); }\n"


def _compiled(
    name: str, input_names: list[str], output_names: list[str], source: str, header: str = ""
) -> Kernel:
    """The kernel; it is compiled when it is first evaluated."""
    return cast(Kernel, mx.fast.cuda_kernel(name, input_names, output_names, source, header))


@cache
def _product_kernel(is_affine: bool, group_size: int, place: str, is_gated: bool) -> Kernel:
    """x with packed weights; gated: silu(x gate) * (x up)."""
    names, source = ["x"], _PLACE[place] + _BEGIN
    for which, name in enumerate("wv" if is_gated else "w"):
        names += [name, f"{name}s"] + ([f"{name}b"] if is_affine else [])
        dot = _DOT.replace("WEIGHT", name).replace("SCALES", f"{name}s").replace("WHICH", str(which))
        source += dot.replace("BIASES", f"{name}b" if is_affine else f"{name}s")
    source += _STORE.replace("VALUE", _GATED if is_gated else "result[0][i]")
    source = source.replace("AFFINE", str(is_affine).lower()).replace("GROUP", str(group_size))
    return _compiled(
        f"{'gated' if is_gated else 'product'}_{place}_{'affine' if is_affine else 'mxfp4'}{group_size}",
        input_names=[*names, *(["slots"] if place == "slots" else [])],
        output_names=["out"],
        source=source,
        header=_HEADER + _SILU,
    )


def supports(x: mx.array, weight: mx.array, scales: mx.array, mode: str, bits: int, group_size: int) -> bool:
    """Whether `multiply` takes these: bfloat16 rows and 4-bit weights of even sizes."""
    is_format = (mode == "affine" and scales.dtype == mx.bfloat16) or mode == "mxfp4"
    fits = x.shape[-1] % group_size == 0 and weight.shape[-2] % TILE_OUTPUTS == 0
    return bits == 4 and is_format and x.dtype == mx.bfloat16 and fits


def multiply(
    x: mx.array,
    weights: Sequence[Sequence[mx.array]],
    group_size: int,
    *,
    slots: mx.array | None = None,
    dtype: mx.Dtype = mx.bfloat16,
) -> mx.array:
    """Rows with packed matrices, each given as weight [..., N, words], scales and, if affine, biases.

    x [rows, K] with one matrix, or [M, rows, K] with M of them -> [..., rows, N]. With slots, any integers
    [rows, k]: x [rows, K], or [rows, k, K], -> [rows, k, N]. Two weights: silu of the product with the first
    times that with the second.
    """
    matrix = weights[0][0]
    outputs = matrix.shape[-2]
    warps = min(MOST_WARPS, max(1, x.shape[-1] // group_size // GROUPS_AT_ONCE))
    inputs = [x, *(part for weight in weights for part in weight)]
    template: list[tuple[str, Any]] = [("T", dtype)]
    if slots is not None:
        place, count, shape = "slots", slots.size, (*slots.shape, outputs)
        inputs.append(slots)
        template.append(("pairs_per_row", slots.size * x.shape[-1] // x.size))
    else:
        place, shape = ("one" if matrix.ndim == 2 else "each"), (*x.shape[:-1], outputs)
        count = x.size // (x.shape[-2] * x.shape[-1]) * -(-x.shape[-2] // TILE_ROWS)
    return _product_kernel(len(weights[0]) == 3, group_size, place, len(weights) == 2)(
        inputs=inputs,
        template=template,
        grid=(outputs // TILE_OUTPUTS * WARP * warps, count, 1),
        threadgroup=(WARP * warps, 1, 1),
        output_shapes=[shape],
        output_dtypes=[dtype],
    )[0]


_ORDER = r"""
// Floats as unsigned numbers of the same order.
__device__ __forceinline__ unsigned ordered(float v) {
  const unsigned bits = __float_as_uint(v + 0.0f);
  return bits ^ ((bits >> 31) ? 0xFFFFFFFFu : 0x80000000u);
}
"""
_ROUTE = r"""
  const int E = logits_shape[1], k = ids_of, e = threadIdx.x;
  const long row = blockIdx.x;
  __shared__ unsigned keys[1024];
  __shared__ float kept[64];
  __shared__ int counts[32];
  float score = 0, by = 0;
  unsigned key = 0;
  if (e < E) {
    score = 1.0f / (1.0f + expf(-logits[row * E + e]));
    by = score + bias[e];
    choice[row * E + e] = by;
    key = ordered(by);
    keys[e] = key;
  }
  __syncthreads();
  int rank = 0;
  for (int j = 0; j < E; ++j) rank += keys[j] > key || (keys[j] == key && j < e);
  const bool is_chosen = e < E && rank < k;
  const unsigned chosen = __ballot_sync(0xFFFFFFFFu, is_chosen);
  if (e % 32 == 0) counts[e / 32] = __popc(chosen);
  __syncthreads();
  int place = __popc(chosen & ((1u << (e % 32)) - 1));
  for (int w = 0; w < e / 32; ++w) place += counts[w];
  if (is_chosen) {
    ids[row * k + place] = e;
    ranked[row * k + rank] = e;
    kept[place] = score;
  }
  __syncthreads();
  if (e < k) {
    float sum = 0;
    for (int j = 0; j < k; ++j) sum += kept[j];
    weights[row * k + e] = kept[e] / (is_normed ? sum + 1e-20f : 1.0f) * FACTOR;
  }
"""


@cache
def _route_kernel(factor: float) -> Kernel:
    source = _ROUTE.replace("FACTOR", f"static_cast<float>({factor!r})")
    return _compiled("route", ["logits", "bias"], ["ids", "weights", "choice", "ranked"], source, _ORDER)


def can_route(num_experts: int, k: int) -> bool:
    """Whether `route` takes so many experts."""
    return k <= min(64, num_experts) and num_experts <= 1024


def route(logits: mx.array, bias: mx.array, k: int, is_normed: bool, factor: float) -> list[mx.array]:
    """The k best experts of each row by sigmoid(logits) + bias, float32 [N, E], [E].

    Returns ids int32 [N, k] ascending, weights float32 [N, k] (the sigmoids, normed, times factor), by what
    they were chosen [N, E], and the ids again, likeliest first. Of equal experts the lower one wins.
    """
    rows, experts = logits.shape
    threads = -(-experts // WARP) * WARP
    return _route_kernel(factor)(
        inputs=[logits, bias],
        template=[("ids_of", k), ("is_normed", is_normed)],
        grid=(rows * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows, k), (rows, k), (rows, experts), (rows, k)],
        output_dtypes=[mx.int32, mx.float32, mx.float32, mx.int32],
    )


_MIX = r"""
  const int k = pairs_shape[1], H = pairs_shape[2];
  const long row = blockIdx.y, h = blockIdx.x * blockDim.x + threadIdx.x;
  if (h >= H) return;
  float sum = 0;
  for (int j = 0; j < k; ++j) sum += static_cast<float>(pairs[(row * k + j) * H + h]) * weights[row * k + j];
  out[row * H + h] = static_cast<T>(sum);
"""


@cache
def _mix_kernel() -> Kernel:
    return _compiled("mix", ["pairs", "weights"], ["out"], _MIX)


def mix(pairs: mx.array, weights: mx.array) -> mx.array:
    """Sum of each row's pairs by weight, added in order in float32: [N, k, H], [N, k] -> [N, H]."""
    rows, _, width = pairs.shape
    return _mix_kernel()(
        inputs=[pairs, weights],
        template=[("T", pairs.dtype)],
        grid=(-(-width // 256) * 256, rows, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(rows, width)],
        output_dtypes=[pairs.dtype],
    )[0]


_ADD = r"""
  const int k = ids_shape[1], H = y_shape[1];
  const long row = blockIdx.y, h = blockIdx.x * blockDim.x + threadIdx.x;
  if (h >= H) return;
  float sum = before[row * H + h];
  for (int j = 0; j < k; ++j) {
    const int base = bases[ids[row * k + j]];
    if (base >= 0)
      sum += static_cast<float>(y[(base + ranks[row * k + j]) * 1L * H + h]) * weights[row * k + j];
  }
  out[row * H + h] = sum;
"""


@cache
def _add_kernel() -> Kernel:
    names = ["before", "y", "weights", "ids", "ranks", "bases"]
    return _compiled("add_experts", names, ["out"], _ADD)


def add_experts(
    before: mx.array, y: mx.array, weights: mx.array, ids: mx.array, ranks: mx.array, bases: mx.array
) -> mx.array:
    """before float32 [N, H] with some experts' outputs y [rows, H] on top, by weight, in order of the ids.

    ids, ranks int32 and weights float32 [N, k]; bases int32 [E]: where each expert's rows begin in y, or -1.
    A pair's output is row bases[id] + rank.
    """
    rows, width = before.shape
    return _add_kernel()(
        inputs=[before, y, weights, ids, ranks, bases],
        grid=(-(-width // 256) * 256, rows, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[(rows, width)],
        output_dtypes=[mx.float32],
    )[0]


_POSITIONS = r"""
  const int T = scores_shape[1], n = gridDim.x, me = threadIdx.x, lane = me % 32, warp = me / 32;
  const int seen = T - n + static_cast<int>(blockIdx.x) + 1;
  const float* mine = scores + static_cast<long>(blockIdx.x) * T;
  int* to = out + static_cast<long>(blockIdx.x) * k;
  __shared__ unsigned counts[256];
  __shared__ unsigned sums[32], ties[32];
  __shared__ unsigned bin, left;
  unsigned prefix = 0, wanted = min(k, seen);
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (me < 256) counts[me] = 0;
    __syncthreads();
    for (int i = me; i < seen; i += 1024) {
      const unsigned key = ordered(mine[i]);
      if (shift == 24 || key >> (shift + 8) == prefix) atomicAdd(&counts[key >> shift & 255], 1u);
    }
    __syncthreads();
    unsigned above = 0;  // of this bin and those after it
    if (me < 256) {
      const int which = 255 - me;
      above = counts[which];
      for (int d = 1; d < 32; d *= 2) {
        const unsigned other = __shfl_up_sync(0xFFFFFFFFu, above, d);
        if (lane >= d) above += other;
      }
      if (lane == 31) sums[warp] = above;
    }
    __syncthreads();
    if (me < 256) {
      for (int w = 0; w < warp; ++w) above += sums[w];
      const unsigned here = counts[255 - me];
      if (above >= wanted && above - here < wanted) {
        bin = 255 - me;
        left = wanted - (above - here);
      }
    }
    __syncthreads();
    prefix = prefix << 8 | bin;
    wanted = left;
    __syncthreads();
  }
  unsigned num_before = 0, ties_before = 0;
  for (int start = 0; start < seen; start += 1024) {
    const int i = start + me;
    const unsigned key = i < seen ? ordered(mine[i]) : 0;
    const bool is_above = i < seen && key > prefix, is_tie = i < seen && key == prefix;
    const unsigned a = __ballot_sync(0xFFFFFFFFu, is_above), b = __ballot_sync(0xFFFFFFFFu, is_tie);
    if (lane == 0) {
      sums[warp] = __popc(a);
      ties[warp] = __popc(b);
    }
    __syncthreads();
    const unsigned under = (1u << lane) - 1;
    unsigned my_above = num_before + __popc(a & under), my_ties = ties_before + __popc(b & under);
    for (int w = 0; w < 32; ++w) {
      if (w < warp) {
        my_above += sums[w];
        my_ties += ties[w];
      }
      num_before += sums[w];
      ties_before += ties[w];
    }
    if (is_above || (is_tie && my_ties < wanted)) to[my_above + min(my_ties, wanted)] = i;
    __syncthreads();
  }
  for (int i = seen + me; i < k; i += 1024) to[i] = T;
"""


@cache
def _positions_kernel() -> Kernel:
    return _compiled("best_positions", ["scores"], ["out"], _POSITIONS, _ORDER)


def best_positions(scores: mx.array, k: int) -> mx.array:
    """Positions of the k best keys of each row, ascending: float32 [n, T] -> int32 [n, k].

    The rows are the last of the T keys, so row i sees T - n + i + 1 of them. Ties go to the lower position; T
    stands where a row sees fewer than k.
    """
    rows = scores.shape[0]
    return _positions_kernel()(
        inputs=[scores],
        template=[("k", k)],
        grid=(rows * 1024, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(rows, k)],
        output_dtypes=[mx.int32],
    )[0]

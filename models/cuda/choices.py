"""The router's choice of experts, and the indexer's of keys. Called by `models.arithmetic`."""

from functools import cache

import mlx.core as mx

from models.cuda.kernel import WARP, Kernel, make_kernel

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


# One expert a block: its row of weights stays in registers for all rows.
_LOGITS = r"""
  const int H = x_shape[1], rows = x_shape[0], me = threadIdx.x;
  const float* mine = weight + static_cast<long>(blockIdx.x) * H;
  __shared__ float sums[4];
  for (int row = 0; row < rows; ++row) {
    float sum = 0;
    for (int i = 4 * me; i < H; i += 512) {
      const float4 w = *reinterpret_cast<const float4*>(mine + i);
      const uint2 v = *reinterpret_cast<const uint2*>(x + static_cast<long>(row) * H + i);
      sum += __uint_as_float(v.x << 16) * w.x + __uint_as_float(v.x & 0xFFFF0000u) * w.y +
             __uint_as_float(v.y << 16) * w.z + __uint_as_float(v.y & 0xFFFF0000u) * w.w;
    }
    for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, d);
    if (me % 32 == 0) sums[me / 32] = sum;
    __syncthreads();
    if (me == 0) out[row * gridDim.x + blockIdx.x] = sums[0] + sums[1] + sums[2] + sums[3];
    __syncthreads();
  }
"""


@cache
def _logits_kernel() -> Kernel:
    return make_kernel("logits", ["x", "weight"], ["out"], _LOGITS)


def logits(x: mx.array, weight: mx.array) -> mx.array:
    """Few rows times a float32 matrix, in float32: bfloat16 [N, H], [E, H] -> [N, E]; H a multiple of 4."""
    shape = (x.shape[0], weight.shape[0])
    return _logits_kernel()(
        inputs=[x, weight],
        grid=(weight.shape[0] * 128, 1, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[shape],
        output_dtypes=[mx.float32],
    )[0]


@cache
def _route_kernel(factor: float) -> Kernel:
    source = _ROUTE.replace("FACTOR", f"static_cast<float>({factor!r})")
    return make_kernel("route", ["logits", "bias"], ["ids", "weights", "choice", "ranked"], source, _ORDER)


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


# Radix select: digits of 11, 11 and 10 bits find the k-th best; then each warp counts and writes its share.
_POSITIONS = r"""
  const int T = scores_shape[1], me = threadIdx.x, lane = me % 32, warp = me / 32;
  const int seen = SEEN;
  const float* mine = scores + static_cast<long>(blockIdx.x) * T;
  auto* to = out + static_cast<long>(blockIdx.x) * WIDTH;
  __shared__ unsigned counts[2048], sums[32], ties[32], bin, left;
  unsigned prefix = 0, wanted = min(k, seen);
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, bits = pass == 2 ? 10 : 11;
    counts[me] = counts[me + 1024] = 0;
    __syncthreads();
    for (int i = me; i < seen; i += 1024) {
      const unsigned key = ordered(mine[i]);
      const bool counts_here = pass == 0 || key >> (shift + bits) == prefix;
      if (counts_here) atomicAdd(&counts[key >> shift & ((1 << bits) - 1)], 1u);
    }
    __syncthreads();
    const unsigned high = counts[2047 - 2 * me], both = high + counts[2046 - 2 * me];
    unsigned above = both;  // of these two bins and those after them
    for (int d = 1; d < 32; d *= 2) {
      const unsigned other = __shfl_up_sync(0xFFFFFFFFu, above, d);
      if (lane >= d) above += other;
    }
    if (lane == 31) sums[warp] = above;
    __syncthreads();
    for (int w = 0; w < warp; ++w) above += sums[w];
    const unsigned before = above - both;
    if (before < wanted && above >= wanted) {
      const bool is_high = before + high >= wanted;
      bin = is_high ? 2047 - 2 * me : 2046 - 2 * me;
      left = wanted - before - (is_high ? 0 : high);
    }
    __syncthreads();
    prefix = prefix << bits | bin;
    wanted = left;
    __syncthreads();
  }
  const int share = (seen + 1023) / 1024 * 32, begin = warp * share, end = min(seen, begin + share);
  unsigned num_before = 0, ties_before = 0;
  for (int start = begin; start < end; start += 32) {
    const unsigned key = start + lane < end ? ordered(mine[start + lane]) : 0;
    num_before += __popc(__ballot_sync(0xFFFFFFFFu, start + lane < end && key > prefix));
    ties_before += __popc(__ballot_sync(0xFFFFFFFFu, start + lane < end && key == prefix));
  }
  if (lane == 0) {
    sums[warp] = num_before;
    ties[warp] = ties_before;
  }
  __syncthreads();
  num_before = ties_before = 0;
  for (int w = 0; w < warp; ++w) {
    num_before += sums[w];
    ties_before += ties[w];
  }
  for (int start = begin; start < end; start += 32) {
    const int i = start + lane;
    const unsigned key = i < end ? ordered(mine[i]) : 0;
    const bool is_above = i < end && key > prefix, is_tie = i < end && key == prefix;
    const unsigned a = __ballot_sync(0xFFFFFFFFu, is_above), b = __ballot_sync(0xFFFFFFFFu, is_tie);
    const unsigned under = (1u << lane) - 1;
    const unsigned my_above = num_before + __popc(a & under), my_ties = ties_before + __popc(b & under);
    const bool is_chosen = is_above || (is_tie && my_ties < wanted);
    WRITE
    num_before += __popc(a);
    ties_before += __popc(b);
  }
  FILL
"""
_AS_POSITIONS = {
    "WIDTH": "k",
    "WRITE": "if (is_chosen) to[my_above + min(my_ties, wanted)] = i;",
    "FILL": "for (int i = seen + me; i < k; i += 1024) to[i] = T;",
}
_AS_MASK = {
    "WIDTH": "T",
    "WRITE": "if (i < end) to[i] = is_chosen;",
    "FILL": "for (int i = seen + me; i < T; i += 1024) to[i] = false;",
}


@cache
def _best_kernel(is_mask: bool, has_last: bool) -> Kernel:
    last = "min(T, last[blockIdx.x] + 1)" if has_last else "T - static_cast<int>(gridDim.x - blockIdx.x) + 1"
    source = _POSITIONS.replace("SEEN", last)
    for name, text in (_AS_MASK if is_mask else _AS_POSITIONS).items():
        source = source.replace(name, text)
    names = ["scores", *(["last"] if has_last else [])]
    return make_kernel("best_mask" if is_mask else "best_positions", names, ["out"], source, _ORDER)


def best_positions(scores: mx.array, k: int, last: mx.array | None = None) -> mx.array:
    """Positions of the k best keys of each row, ascending: float32 [n, T] -> int32 [n, k].

    A row sees the keys up to its position in `last`, int32 [n]; without it the rows are the last of the T
    keys. Ties go to the lower position; T stands where a row sees fewer than k.
    """
    return _best(scores, k, last, mx.int32, k)


def best_mask(scores: mx.array, k: int) -> mx.array:
    """The same choice as a mask, bool [n, T]; the rows are the last of the T keys."""
    return _best(scores, k, None, mx.bool_, scores.shape[1])


def _best(scores: mx.array, k: int, last: mx.array | None, dtype: mx.Dtype, width: int) -> mx.array:
    rows = scores.shape[0]
    return _best_kernel(dtype == mx.bool_, last is not None)(
        inputs=[scores, *([] if last is None else [last])],
        template=[("k", k)],
        grid=(rows * 1024, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(rows, width)],
        output_dtypes=[dtype],
    )[0]

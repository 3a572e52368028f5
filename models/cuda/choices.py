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
    return make_kernel("best_positions", ["scores"], ["out"], _POSITIONS, _ORDER)


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

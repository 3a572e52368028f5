"""Mixed streams, for few rows. Called by `models.arithmetic`."""

from functools import cache

import mlx.core as mx

from models.cuda.kernel import WARP, Kernel, make_kernel

STREAMS = 4  # of all public models
THREADS = 1024

_SUM = r"""
// The sum of a value over all threads of the block, in every thread.
__device__ __forceinline__ float block_sum(float v, float* shared) {
  for (int d = 16; d; d /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, d);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0;
  for (int w = 0; w < blockDim.x / 32; ++w) sum += shared[w];
  return sum;
}
"""
# One block for each weight of a row: a product with the normed streams.
_RAW = r"""
  const int width = x_shape[1], outputs = fn_shape[0];
  const long row = blockIdx.y;
  __shared__ float sums[32];
  float dot = 0, square = 0;
  for (int i = threadIdx.x; i < width; i += blockDim.x) {
    const float v = static_cast<float>(x[row * width + i]);
    dot += v * fn[blockIdx.x * 1L * width + i];
    square += v * v;
  }
  dot = block_sum(dot, sums);
  square = block_sum(square, sums);
  if (threadIdx.x == 0) raw[row * outputs + blockIdx.x] = dot * rsqrtf(square / width + NORM_EPS);
"""
# One block a row: 16 threads make the weights, one for each pair of streams, then all collapse and norm.
_COLLAPSE = r"""
  const int S = 4, hidden = x_shape[1] / S, me = threadIdx.x;
  const long row = blockIdx.x;
  __shared__ float pre[S], sums[32];
  const float* in = raw + row * S * (S + 2);
  if (me < S) {
    pre[me] = 1.0f / (1.0f + expf(-(in[me] * scale[0] + base[me]))) + EPS;
    post[row * S + me] = 2.0f / (1.0f + expf(-(in[S + me] * scale[1] + base[S + me])));
  }
  if (me < 32) {
    const int pair = me % 16;
    float m = in[2 * S + pair] * scale[2] + base[2 * S + pair];
    float most = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, 1));
    most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 2));
    m = expf(m - most);
    float sum = m + __shfl_xor_sync(0xFFFFFFFFu, m, 1);
    m = m / (sum + __shfl_xor_sync(0xFFFFFFFFu, sum, 2)) + EPS;
    for (int round = 0; round < 2 * ROUNDS - 1; ++round) {
      const int step = round % 2 ? 1 : S;
      sum = m + __shfl_xor_sync(0xFFFFFFFFu, m, step);
      m = m / (sum + __shfl_xor_sync(0xFFFFFFFFu, sum, 2 * step) + EPS);
    }
    if (me < 16) among[row * S * S + pair] = m;
  }
  __syncthreads();
  float square = 0;
  for (int h = threadIdx.x; h < hidden; h += blockDim.x) {
    float v = 0;
    for (int s = 0; s < S; ++s) v += pre[s] * static_cast<float>(x[(row * S + s) * hidden + h]);
    v = static_cast<float>(static_cast<T>(v));
    square += v * v;
  }
  const float factor = rsqrtf(block_sum(square, sums) / hidden + NORM_EPS);
  for (int h = threadIdx.x; h < hidden; h += blockDim.x) {
    float v = 0;
    for (int s = 0; s < S; ++s) v += pre[s] * static_cast<float>(x[(row * S + s) * hidden + h]);
    v = static_cast<float>(static_cast<T>(v));
    out[row * hidden + h] = static_cast<T>(v * factor * static_cast<float>(norm[h]));
  }
"""
_JOIN = r"""
  const int S = 4, hidden = added_shape[1];
  const long row = blockIdx.y, h = blockIdx.x * blockDim.x + threadIdx.x;
  if (h >= hidden) return;
  float stream[S];
  for (int s = 0; s < S; ++s) stream[s] = static_cast<float>(x[(row * S + s) * hidden + h]);
  const float v = static_cast<float>(added[row * hidden + h]);
  for (int s = 0; s < S; ++s) {
    float sum = post[row * S + s] * v;
    for (int i = 0; i < S; ++i) sum += among[row * S * S + i * S + s] * stream[i];
    out[(row * S + s) * hidden + h] = static_cast<T>(sum);
  }
"""


@cache
def _raw_kernel(eps: float) -> Kernel:
    source = _RAW.replace("NORM_EPS", f"static_cast<float>({eps!r})")
    return make_kernel("streams_raw", ["x", "fn"], ["raw"], source, _SUM)


@cache
def _collapse_kernel(rounds: int, eps: float, norm_eps: float) -> Kernel:
    source = _COLLAPSE.replace("NORM_EPS", f"static_cast<float>({norm_eps!r})").replace("ROUNDS", str(rounds))
    names = ["x", "raw", "base", "scale", "norm"]
    source = source.replace("EPS", f"static_cast<float>({eps!r})")
    return make_kernel(f"streams_collapse_{rounds}", names, ["out", "post", "among"], source, _SUM)


@cache
def _join_kernel() -> Kernel:
    return make_kernel("streams_join", ["x", "added", "post", "among"], ["out"], _JOIN)


def collapse(
    x: mx.array,
    weights: tuple[mx.array, mx.array, mx.array],
    norm: mx.array,
    rounds: int,
    eps: float,
    norm_eps: float,
) -> list[mx.array]:
    """What a block sees of four streams x [N, 4 H], normed: [N, H].

    Returns also how its output comes back, [N, 4], and how the streams mix, [N, 4, 4]. The weights are a
    matrix [24, 4 H], its biases [24] and three scales.
    """
    fn, base, scale = weights
    rows, width = x.shape
    raw = _raw_kernel(norm_eps)(
        inputs=[x, fn],
        grid=(fn.shape[0] * THREADS, rows, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(rows, fn.shape[0])],
        output_dtypes=[mx.float32],
    )[0]
    return _collapse_kernel(rounds, eps, norm_eps)(
        inputs=[x, raw, base, scale, norm],
        template=[("T", x.dtype)],
        grid=(rows * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(rows, width // STREAMS), (rows, STREAMS), (rows, STREAMS, STREAMS)],
        output_dtypes=[x.dtype, mx.float32, mx.float32],
    )


def join(x: mx.array, added: mx.array, post: mx.array, among: mx.array) -> mx.array:
    """Streams [N, 4 H] mixed, with a block's output [N, H] added to each."""
    rows, hidden = added.shape
    return _join_kernel()(
        inputs=[x, added, post, among],
        template=[("T", x.dtype)],
        grid=(-(-hidden // 8 // WARP) * 8 * WARP, rows, 1),
        threadgroup=(8 * WARP, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )[0]

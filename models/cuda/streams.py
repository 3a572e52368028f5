"""Mixed streams and the delta rule's step, for few rows. Called by `models.arithmetic`."""

from functools import cache

import mlx.core as mx

from models.cuda.kernel import WARP, Kernel, make_kernel

MOST_STREAMS = 4
MOST_CHANNELS = 256

# One thread a row: the mixing matrix stays in its registers through all rounds.
_MIX = r"""
  const int S = STREAMS, row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= raw_shape[0]) return;
  const float* in = raw + row * 1L * S * (S + 2);
  for (int i = 0; i < S; ++i) {
    pre[row * S + i] = 1.0f / (1.0f + expf(-(in[i] * scale[0] + base[i]))) + EPS;
    post[row * S + i] = 2.0f / (1.0f + expf(-(in[S + i] * scale[1] + base[S + i])));
  }
  float m[S * S];
  for (int i = 0; i < S; ++i) {
    float most = -INFINITY, sum = 0;
    for (int j = 0; j < S; ++j) {
      m[i * S + j] = in[2 * S + i * S + j] * scale[2] + base[2 * S + i * S + j];
      most = fmaxf(most, m[i * S + j]);
    }
    for (int j = 0; j < S; ++j) sum += m[i * S + j] = expf(m[i * S + j] - most);
    for (int j = 0; j < S; ++j) m[i * S + j] = m[i * S + j] / sum + EPS;
  }
  for (int round = 0; round < 2 * ROUNDS - 1; ++round) {
    for (int i = 0; i < S; ++i) {
      float sum = EPS;
      for (int j = 0; j < S; ++j) sum += round % 2 ? m[i * S + j] : m[j * S + i];
      for (int j = 0; j < S; ++j) (round % 2 ? m[i * S + j] : m[j * S + i]) /= sum;
    }
  }
  for (int i = 0; i < S * S; ++i) among[row * S * S + i] = m[i];
"""

# One block a head, one thread a column of its state.
_STEP = r"""
  const int D = state_shape[1], V = state_shape[2], head = blockIdx.x, me = threadIdx.x;
  __shared__ float keys[256], queries[256], decays[256];
  for (int i = me; i < D; i += blockDim.x) {
    keys[i] = k[head * D + i];
    queries[i] = q[head * D + i];
    decays[i] = expf(gate[head * D + i]);
  }
  __syncthreads();
  if (me >= V) return;
  const long first = head * 1L * D * V + me;
  float held = 0, read = 0;
  for (int d = 0; d < D; ++d) held += keys[d] * (state[first + d * V] * decays[d]);
  const float change = (v[head * V + me] - held) * beta[head];
  for (int d = 0; d < D; ++d) {
    const float now = state[first + d * V] * decays[d] + keys[d] * change;
    after[first + d * V] = now;
    read += queries[d] * now;
  }
  out[head * V + me] = read;
"""


@cache
def _mix_kernel(streams: int, rounds: int, eps: float) -> Kernel:
    source = _MIX.replace("STREAMS", str(streams)).replace("ROUNDS", str(rounds))
    source = source.replace("EPS", f"static_cast<float>({eps!r})")
    return make_kernel(
        f"streams{streams}_{rounds}", ["raw", "base", "scale"], ["pre", "post", "among"], source
    )


def mix_weights(
    raw: mx.array, base: mx.array, scale: mx.array, streams: int, rounds: int, eps: float
) -> list[mx.array]:
    """Weights that collapse [N, S], expand [N, S] and mix [N, S, S] streams, from float32 [N, S (S + 2)]."""
    rows = raw.shape[0]
    return _mix_kernel(streams, rounds, eps)(
        inputs=[raw, base, scale],
        grid=(-(-rows // WARP) * WARP, 1, 1),
        threadgroup=(WARP, 1, 1),
        output_shapes=[(rows, streams), (rows, streams), (rows, streams, streams)],
        output_dtypes=[mx.float32] * 3,
    )


@cache
def _step_kernel() -> Kernel:
    return make_kernel("delta_step", ["state", "q", "k", "v", "gate", "beta"], ["out", "after"], _STEP)


def delta_step(
    state: mx.array, q: mx.array, k: mx.array, v: mx.array, gate: mx.array, beta: mx.array
) -> list[mx.array]:
    """As `models.glm5_next.delta_rule.step`: what is read [heads, V], and the state behind the row."""
    heads, _, width = state.shape
    threads = -(-width // WARP) * WARP
    return _step_kernel()(
        inputs=[state, q, k, v, gate, beta],
        grid=(heads * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(heads, width), state.shape],
        output_dtypes=[mx.float32, mx.float32],
    )

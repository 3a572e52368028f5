"""A linear layer's step for one row, between its projections. Called by `models.arithmetic`."""

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import mlx.core as mx

from models.cuda.kernel import WARP, Kernel, make_kernel
from models.cuda.streams import _SUM as BLOCK_SUM

MOST_CHANNELS = 256

# One block a head. A thread has a quarter of a column of the state, in its registers; those of the first
# quarter have a channel of the convolution each.
_STEP = r"""
  const int D = WIDTH, Q = D / 4, K = qw_shape[2], head = blockIdx.x, me = threadIdx.x % D;
  const int quarter = threadIdx.x / D;
  const long W = query_shape[1], c = head * 1L * D + me, first = head * 1L * D * D + me;
  __shared__ float keys[D], queries[D], decays[D], values[D], parts[4][D], sums[32];
  float made[3] = {0, 0, 0}, mine[Q];
  #pragma unroll
  for (int i = 0; i < Q; ++i) mine[i] = state[first + (quarter * Q + i) * D];
  if (quarter == 0) {
    for (int part = 0; part < 3; ++part) {
      const float* w = (part == 0 ? qw : part == 1 ? kw : vw) + c * K;
      const long at = part * W + c;
      const auto now = (part == 0 ? query : part == 1 ? key : value)[c];
      float sum = static_cast<float>(now) * w[K - 1];
      for (int j = 0; j < K - 1; ++j) {
        sum += static_cast<float>(before[j * 3 * W + at]) * w[j];
        inputs[j * 3 * W + at] = j < K - 2 ? before[(j + 1) * 3 * W + at] : now;
      }
      made[part] = sum / (1.0f + expf(-sum));
    }
    const float rate = expf(a_log[head]) * (static_cast<float>(forget[c]) + dt_bias[c]);
    decays[me] = expf(BOUND / (1.0f + expf(-rate)));
    values[me] = made[2];
  }
  const float q_square = block_sum(made[0] * made[0], sums), k_square = block_sum(made[1] * made[1], sums);
  if (quarter == 0) {
    queries[me] = made[0] / sqrtf(q_square + UNIT_EPS) * rsqrtf(static_cast<float>(D));
    keys[me] = made[1] / sqrtf(k_square + UNIT_EPS);
  }
  const float strength = 1.0f / (1.0f + expf(-static_cast<float>(beta[head])));
  __syncthreads();
  float held = 0, read = 0;
  #pragma unroll
  for (int i = 0; i < Q; ++i) {
    mine[i] *= decays[quarter * Q + i];
    held += keys[quarter * Q + i] * mine[i];
  }
  parts[quarter][me] = held;
  __syncthreads();
  held = parts[0][me] + parts[1][me] + parts[2][me] + parts[3][me];
  const float change = (values[me] - held) * strength;
  #pragma unroll
  for (int i = 0; i < Q; ++i) {
    mine[i] += keys[quarter * Q + i] * change;
    after[first + (quarter * Q + i) * D] = mine[i];
    read += queries[quarter * Q + i] * mine[i];
  }
  __syncthreads();
  parts[quarter][me] = read;
  __syncthreads();
  read = parts[0][me] + parts[1][me] + parts[2][me] + parts[3][me];
  const float factor = rsqrtf(block_sum(quarter ? 0.0f : read * read, sums) / D + NORM_EPS);
  const float open = 1.0f / (1.0f + expf(-static_cast<float>(gate[c])));
  if (quarter == 0) out[c] = static_cast<T>(read * factor * norm[me] * open);
"""
_NAMES = [
    "state", "before", "query", "key", "value", "forget", "beta", "gate", "qw", "kw", "vw", "dt_bias",
    "a_log", "norm",
]  # fmt: skip


class DeltaLayer(Protocol):
    """The small parameters of a linear layer, under the checkpoint's names."""

    q_conv1d: Any
    k_conv1d: Any
    v_conv1d: Any
    dt_bias: mx.array
    A_log: mx.array
    o_norm: Any


@cache
def _step_kernel(width: int, bound: float, norm_eps: float, unit_eps: float) -> Kernel:
    source = _STEP.replace("WIDTH", str(width))
    for name, value in (("BOUND", bound), ("NORM_EPS", norm_eps), ("UNIT_EPS", unit_eps)):
        source = source.replace(name, f"static_cast<float>({value!r})")
    return make_kernel(f"delta_step{width}", _NAMES, ["out", "after", "inputs"], source, BLOCK_SUM)


def can_step(width: int) -> bool:
    """Whether `step` takes heads of this width."""
    return width % WARP == 0 and width <= MOST_CHANNELS


def step(
    layer: DeltaLayer,
    state: tuple[mx.array, mx.array],
    projected: Sequence[mx.array],
    bound: float,
    norm_eps: float,
    unit_eps: float,
) -> list[mx.array]:
    """One row: what goes into the output's projection [1, width], and the two arrays of the state behind it.

    `projected`: the row's query, key and value to convolve and its forget gate, [1, width] each, beta
    [1, heads] and output gate [1, width], as they come out of their projections.
    """
    matrix, before = state
    heads, width, _ = matrix.shape
    small = [layer.q_conv1d.weight, layer.k_conv1d.weight, layer.v_conv1d.weight]
    return _step_kernel(width, bound, norm_eps, unit_eps)(
        inputs=[matrix, before, *projected, *small, layer.dt_bias, layer.A_log, layer.o_norm.weight],
        template=[("T", before.dtype)],
        grid=(heads * 4 * width, 1, 1),
        threadgroup=(4 * width, 1, 1),
        output_shapes=[(1, heads * width), matrix.shape, before.shape],
        output_dtypes=[before.dtype, mx.float32, before.dtype],
    )

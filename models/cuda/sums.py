"""Sums of experts' outputs, in the order of the experts. Called by `models.arithmetic`."""

from collections.abc import Sequence
from functools import cache

import mlx.core as mx

from models.cuda.kernel import Kernel, make_kernel

_MIX = r"""
  const int k = pairs_shape[1], H = pairs_shape[2];
  const long row = blockIdx.y, h = blockIdx.x * blockDim.x + threadIdx.x;
  if (h >= H) return;
  float sum = 0;
  for (int j = 0; j < k; ++j) sum += static_cast<float>(pairs[(row * k + j) * H + h]) * weights[row * k + j];
  ADD
  out[row * H + h] = static_cast<T>(sum);
"""


@cache
def _mix_kernel(count: int) -> Kernel:
    others = [f"added{i}" for i in range(count)]
    source = _MIX.replace(
        "ADD", " ".join(f"sum += static_cast<float>({name}[row * H + h]);" for name in others)
    )
    return make_kernel(f"mix{count}", ["pairs", "weights", *others], ["out"], source)


def mix(pairs: mx.array, weights: mx.array, added: Sequence[mx.array] = ()) -> mx.array:
    """Sum of each row's pairs by weight, added in order in float32, then others: [N, k, H], [N, k] -> [N, H].

    It is rounded once, to the type of the pairs.
    """
    rows, _, width = pairs.shape
    return _mix_kernel(len(added))(
        inputs=[pairs, weights, *added],
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
    return make_kernel("add_experts", names, ["out"], _ADD)


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

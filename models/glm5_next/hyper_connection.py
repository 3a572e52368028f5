"""Manifold-constrained hyper-connections: several residual streams, mixed around each block.

Numerics follow transformers 5.24, `Glm5NextTextHyperConnection`: float32, and a mixing matrix whose rows and
columns are brought to a sum of one by turns (Sinkhorn).
"""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from models.arithmetic import Arithmetic
from models.glm5_next.flash_args import FlashArgs


class Mix(NamedTuple):
    """How a block's output joins the streams: weights float32 [N, S] and [N, S, S]."""

    post: mx.array
    among: mx.array


class HyperConnection(nn.Module):
    """What goes from the streams into one block, and how its output comes back."""

    def __init__(self, args: FlashArgs, arithmetic: Arithmetic) -> None:
        super().__init__()
        self._args, self._arithmetic = args, arithmetic
        self.quantization = None
        streams = args.hc_mult
        self.fn = mx.zeros(((2 + streams) * streams, streams * args.hidden_size))
        self.base = mx.zeros(((2 + streams) * streams,))
        self.scale = mx.zeros((3,))

    @property
    def weight(self) -> mx.array:
        """The matrix that makes the weights, float32 [S (2 + S), S H]."""
        return self.fn

    def __call__(self, x: mx.array, norm: nn.RMSNorm) -> tuple[mx.array, Mix]:
        """Streams x [N, S H] -> the block's input, normed, [N, H], and the mix for `join`."""
        args = self._args
        if self._arithmetic.collapses(x, args.hc_mult):
            weights, rounds = (self.fn, self.base, self.scale), args.hc_sinkhorn_iters
            normed, *mix = self._arithmetic.collapse(
                x, weights, norm.weight, rounds, args.hc_eps, args.rms_norm_eps
            )
            return normed, Mix(*mix)
        exact = x.astype(mx.float32)
        raw = self._arithmetic.product(mx.fast.rms_norm(exact, None, args.rms_norm_eps), self)
        pre, mixed = self._weights(raw)
        streams = exact.reshape(-1, args.hc_mult, args.hidden_size)
        return norm((pre[..., None] * streams).sum(axis=1).astype(x.dtype)), mixed

    def _weights(self, raw: mx.array) -> tuple[mx.array, Mix]:
        """Weights that collapse the streams, [N, S], and the mix, from float32 [N, S (S + 2)]."""
        args, count = self._args, self._args.hc_mult
        pre, post, among = mx.split(raw, [count, 2 * count], axis=-1)
        pre_base, post_base, among_base = mx.split(self.base, [count, 2 * count])
        pre = mx.sigmoid(pre * self.scale[0] + pre_base) + args.hc_eps
        post = 2 * mx.sigmoid(post * self.scale[1] + post_base)
        among = (among * self.scale[2] + among_base).reshape(-1, count, count)
        return pre, Mix(post, self._doubly_stochastic(among))

    def _doubly_stochastic(self, logits: mx.array) -> mx.array:
        """[N, S, S] with rows and columns that sum to one, nearly."""
        eps = self._args.hc_eps
        among = mx.softmax(logits, axis=-1) + eps
        among = among / (among.sum(axis=-2, keepdims=True) + eps)
        for _ in range(self._args.hc_sinkhorn_iters - 1):
            among = among / (among.sum(axis=-1, keepdims=True) + eps)
            among = among / (among.sum(axis=-2, keepdims=True) + eps)
        return among

    def join(self, x: mx.array, out: mx.array, mix: Mix) -> mx.array:
        """Streams x [N, S H] mixed among themselves, and a block's output [N, H] added to each."""
        if self._arithmetic.collapses(x, self._args.hc_mult):
            return self._arithmetic.join(x, out, mix.post, mix.among)
        streams = x.reshape(x.shape[0], self._args.hc_mult, -1).astype(mx.float32)
        mixed = (mix.among[..., None] * streams[:, :, None, :]).sum(axis=1)
        joined = mix.post[..., None] * out[:, None, :].astype(mx.float32) + mixed
        return joined.astype(x.dtype).reshape(x.shape)

"""The router of a sparse layer: which experts a row goes to and with what weight. Called by the MoE block.

Numerics follow transformers 5.24, `GlmMoeDsaTopkRouter`: float32 throughout, the correction bias chooses
but does not weigh.
"""

import mlx.core as mx
import mlx.nn as nn

from models.args import ModelArgs
from models.arithmetic import Arithmetic


class Router(nn.Module):
    """Scores all experts in float32 and picks the best `num_experts_per_tok`."""

    def __init__(self, args: ModelArgs, arithmetic: Arithmetic) -> None:
        super().__init__()
        self._args, self._arithmetic = args, arithmetic
        self.quantization = None
        self.weight = mx.zeros((args.n_routed_experts, args.hidden_size))
        self.e_score_correction_bias = mx.zeros((args.n_routed_experts,))

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """x [N, H] -> expert ids int32 [N, k], ascending in each row; their weights float32 [N, k]; and by
        what they were chosen, float32 [N, E]."""
        if self._has_kernel:
            ids, weights, choice, _ = self._routed(x)
            return ids, weights, choice
        scores, choice = self._scores(x)
        ids = best_experts(choice, self._args.num_experts_per_tok)
        return ids, expert_weights(scores, ids, self._args), choice

    def ranked(self, x: mx.array) -> mx.array:
        """The same experts, int32 [N, k], the likeliest of each row first."""
        if self._has_kernel:
            return self._routed(x)[3]
        _, choice = self._scores(x)
        return mx.argsort(-choice, axis=-1)[:, : self._args.num_experts_per_tok].astype(mx.int32)

    @property
    def _has_kernel(self) -> bool:
        args = self._args
        return args.n_group == 1 and self._arithmetic.can_route(
            args.n_routed_experts, args.num_experts_per_tok
        )

    def _routed(self, x: mx.array) -> list[mx.array]:
        args, bias = self._args, self.e_score_correction_bias
        logits = self._arithmetic.exact_product(x, self)
        return self._arithmetic.route(
            logits, bias, args.num_experts_per_tok, args.norm_topk_prob, args.routed_scaling_factor
        )

    def _scores(self, x: mx.array) -> tuple[mx.array, mx.array]:
        args = self._args
        scores = mx.sigmoid(self._arithmetic.exact_product(x, self))
        return scores, limit_to_groups(scores + self.e_score_correction_bias, args.n_group, args.topk_group)


def limit_to_groups(choice: mx.array, num_groups: int, kept_groups: int) -> mx.array:
    """Put experts outside the best groups at -inf; a group counts as its two best experts together."""
    if num_groups == 1:
        return choice
    grouped = choice.reshape(choice.shape[0], num_groups, -1)  # [N, groups, experts]
    group_scores = mx.topk(grouped, 2, axis=-1).sum(axis=-1)
    order = mx.argsort(-group_scores, axis=-1)
    rank = mx.argsort(order, axis=-1)
    return mx.where((rank < kept_groups)[..., None], grouped, -mx.inf).reshape(choice.shape)


def best_experts(choice: mx.array, k: int) -> mx.array:
    """Ids of the k best of each row, ascending, so that their outputs are always added in one order."""
    return mx.sort(mx.argpartition(-choice, k - 1, axis=-1)[:, :k].astype(mx.int32), axis=-1)


def expert_weights(scores: mx.array, ids: mx.array, args: ModelArgs) -> mx.array:
    """Weights of the chosen experts: their scores without bias, normed, scaled. [N, E], [N, k] -> [N, k]."""
    weights = mx.take_along_axis(scores, ids, axis=-1)
    if args.norm_topk_prob:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return weights * args.routed_scaling_factor

"""What config.json says about a `glm5_next` model, parsed once into a type. Called by loading and the model.

Names and defaults are those of transformers 5.24, `configuration_glm5_next.py`. Pure, and without MLX.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from config.errors import CheckpointError
from models.args import (
    FULL,
    ModelArgs,
    check_routing,
    check_sizes,
    first_sparse_layer,
    indexer_schedule,
    refuse_unsupported,
    words_of,
)

LINEAR, SPARSE = "linear_attention", "indexed_attention"
MOST_GATE = 5.0  # the delta rule's exponents are float32 up to it
GRAIN = 64  # tokens: a multiple of the delta rule's chunks, and of every pool that is computed
_ONLY = {
    "qk_rope_head_dim": (0, None), "index_kpool_always_select_tail": (True, None),
}  # fmt: skip
_DERIVED = {
    "qk_rope_head_dim", "rope_theta", "first_k_dense_replace", "layer_types", "indexer_types",
}  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "swiglu_limit": 10.0, "linear_head_dim": 128, "linear_num_heads": 64, "linear_conv_kernel_dim": 4,
    "linear_lower_bound": -5.0, "hc_mult": 4, "hc_eps": 1e-6, "hc_sinkhorn_iters": 20, "index_kpool": 16,
    "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
}  # fmt: skip
_LINEAR_NAMES = {
    "linear_head_dim": "head_dim", "linear_num_heads": "num_heads",
    "linear_conv_kernel_dim": "short_conv_kernel_size", "linear_lower_bound": "gate_lower_bound",
}  # fmt: skip


@dataclass(frozen=True)
class FlashArgs(ModelArgs):
    """Geometry of one `glm5_next` language model. Nothing is rotated: `qk_rope_head_dim` is 0."""

    layer_types: tuple[str, ...]
    linear_head_dim: int
    linear_num_heads: int
    linear_conv_kernel_dim: int
    linear_lower_bound: float
    hc_mult: int
    hc_eps: float
    hc_sinkhorn_iters: int
    index_kpool: int
    swiglu_limit: float

    @property
    def model_type(self) -> str:
        """The architecture's name in config.json."""
        return "glm5_next"

    @property
    def gate_limit(self) -> float:
        """Bound of what a gated MLP multiplies."""
        return float(self.swiglu_limit)

    @property
    def inner_norm_eps(self) -> float:
        """Epsilon of the norms of the query residual and the latent."""
        return self.rms_norm_eps

    @property
    def linear_dim(self) -> int:
        """Width of a linear layer's queries, keys or values, all heads together."""
        return self.linear_head_dim * self.linear_num_heads

    @property
    def linear_layers(self) -> tuple[int, ...]:
        """Layers that keep a state instead of rows."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == LINEAR)

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Layers that keep rows."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == SPARSE)

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Sparse layers that own an indexer."""
        return tuple(i for i in self.sparse_layers if self.indexer_types[i] == FULL)

    @property
    def topk_pools(self) -> int:
        """Pools that a row may select."""
        return self.index_topk // self.index_kpool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "FlashArgs":
        """Parses config.json. Raises CheckpointError for what this implementation does not compute."""
        refuse_unsupported(config, _ONLY)
        given = _DEFAULTS | {k: v for k, v in config.items() if v is not None} | _linear_config(config)
        names = cls.__dataclass_fields__.keys() - _DERIVED
        if missing := sorted(name for name in names if name not in given):
            raise CheckpointError(f"config.json lacks {', '.join(missing)}")
        values = {name: given[name] for name in names}
        check_sizes(values)
        derived: dict[str, Any] = {
            "qk_rope_head_dim": 0,
            "rope_theta": 1.0,
            "first_k_dense_replace": first_sparse_layer(config),
            "layer_types": _layer_types(config),
            "indexer_types": indexer_schedule(config, needs_first=False),
        }
        args = cls(**values, **derived)
        check_routing(args)
        _check_flash(args)
        return args


def _linear_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the older `linear_attn_config` says."""
    inner = config.get("linear_attn_config")
    if inner is None:
        return {}
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"config.json: linear_attn_config is {inner!r} instead of an object")
    said = {name: inner[old] for name, old in _LINEAR_NAMES.items() if inner.get(old) is not None}
    if inner.get("safe_gate", True) is not True and inner.get("gate_lower_bound") is None:
        raise CheckpointError("config.json: safe_gate false is not supported, only a gate_lower_bound")
    return said


def _layer_types(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Which layers are linear and which sparse: `layer_types`, else every fourth is sparse."""
    count: int = config["num_hidden_layers"]
    kinds = words_of(config, "layer_types")
    if kinds is None:
        return tuple(SPARSE if layer % 4 == 3 else LINEAR for layer in range(count))
    named = tuple(SPARSE if kind == "full_attention" else kind for kind in kinds[:count])
    if len(named) < count or set(named) - {LINEAR, SPARSE}:
        raise CheckpointError(f"config.json: layer_types must name {count} layers {LINEAR} or {SPARSE}")
    return named


def _check_flash(args: FlashArgs) -> None:
    if args.index_topk % args.index_kpool:
        raise CheckpointError(
            f"config.json: index_topk {args.index_topk} is no multiple of index_kpool {args.index_kpool}"
        )
    if GRAIN % args.index_kpool:
        raise CheckpointError(f"config.json: index_kpool {args.index_kpool} does not divide {GRAIN}")
    bound = args.linear_lower_bound
    if type(bound) not in (int, float) or not -MOST_GATE <= bound < 0:
        raise CheckpointError(
            f"config.json: linear_lower_bound {bound!r} is not supported, only -{MOST_GATE:g} to 0"
        )
    for layer in args.sparse_layers:
        if args.indexer_types[layer] != FULL and layer - 1 not in args.full_layers:
            before = args.layer_types[layer - 1] if layer else "no"
            raise CheckpointError(
                f"config.json: layer {layer} has a 'shared' indexer behind a layer of {before!r} that hands "
                "no selection on; a shared one must follow a full one at once"
            )

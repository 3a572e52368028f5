"""What config.json says about the architecture, parsed once into a type. Called by loading and the model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from config.errors import CheckpointError

# GLM-5, 5.1, 5.2 and 5.3. Relatives that share much of the name compute something else.
MODEL_TYPE = "glm_moe_dsa"
FULL, SHARED = "full", "shared"
_REALS = ("routed_scaling_factor", "rope_theta", "rms_norm_eps", "swiglu_limit", "hc_eps")
_MAY_BE_ZERO = ("n_shared_experts", "first_k_dense_replace")
_PARSED = ("indexer_types", "layer_types", "linear_lower_bound")
_COMPUTED: dict[str, tuple[Any, ...]] = {
    "scoring_func": ("sigmoid", None),
    "topk_method": ("noaux_tc", None),
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "moe_layer_freq": (1, None),
    "tie_word_embeddings": (False, None),
}
_ROTATION = {"rope_interleave": (True, None), "indexer_rope_interleave": (True, None)}
_MOST = {"num_hidden_layers": 10_000}  # lists are made of them; of other sizes what an int32 holds


@dataclass(frozen=True)
class ModelArgs:
    """Geometry of one `glm_moe_dsa` model; the names are those of config.json.

    `head_dim` of config.json is left out on purpose: it is not the rotary width (that is
    `qk_rope_head_dim`) and nothing else needs it.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    moe_intermediate_size: int
    first_k_dense_replace: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    indexer_types: tuple[str, ...]  # "full" or "shared", one for each layer
    rope_theta: float
    rms_norm_eps: float
    max_position_embeddings: int

    @property
    def model_type(self) -> str:
        """The architecture's name in config.json."""
        return MODEL_TYPE

    @property
    def gate_limit(self) -> float:
        """Bound of what a gated MLP multiplies."""
        return math.inf

    @property
    def inner_norm_eps(self) -> float:
        """Epsilon of the norms of the query residual and the latent: fixed in the reference."""
        return 1e-6

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of one cached row: the latent and the rotated key that all heads share."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Layers that own an indexer; the others reuse the selection of the last of these."""
        return tuple(i for i, kind in enumerate(self.indexer_types) if kind == FULL)

    @property
    def moe_layers(self) -> range:
        return range(self.first_k_dense_replace, self.num_hidden_layers)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelArgs":
        """Parse config.json. Raises CheckpointError for what this implementation does not compute."""
        refuse_unsupported(config, _ROTATION)
        derived_names = {"indexer_types", "rope_theta", "first_k_dense_replace", "n_group", "topk_group"}
        names = cls.__dataclass_fields__.keys() - derived_names
        missing = sorted(name for name in names if config.get(name) is None)
        if missing:
            raise CheckpointError(f"config.json lacks {', '.join(missing)}")
        check_sizes({name: config[name] for name in names})
        derived: dict[str, Any] = {
            "indexer_types": indexer_schedule(config),
            "rope_theta": _rope_theta(config),
            "first_k_dense_replace": first_sparse_layer(config),
            "n_group": config.get("n_group") or 1,
            "topk_group": config.get("topk_group") or 1,
        }
        check_sizes(derived)
        derived["rope_theta"] = float(derived["rope_theta"])
        args = cls(**{name: config[name] for name in names}, **derived)
        if args.index_head_dim < args.qk_rope_head_dim:
            raise CheckpointError("config.json: index_head_dim is smaller than qk_rope_head_dim")
        check_routing(args)
        return args


def indexer_schedule(config: Mapping[str, Any], needs_first: bool = True) -> tuple[str, ...]:
    """Which layers own an indexer: `indexer_types`, else `index_topk_pattern`, else frequency and offset.

    The formula and its defaults (1 and 2: every layer full) are those of transformers 5.24,
    `configuration_glm_moe_dsa.py`.
    """
    num_layers: int = config["num_hidden_layers"]
    types: Sequence[str] | None = words_of(config, "indexer_types")
    pattern: Sequence[str] | None = words_of(config, "index_topk_pattern")
    if types is None and pattern is not None:
        types = [{"F": FULL, "S": SHARED}.get(letter, letter) for letter in pattern]
    if types is None:
        frequency = config.get("index_topk_freq") or 1
        offset = config.get("index_skip_topk_offset")
        offset = 2 if offset is None else offset
        if type(frequency) is not int or frequency < 0 or type(offset) is not int:
            raise CheckpointError(
                f"config.json: index_topk_freq {frequency!r} and index_skip_topk_offset {offset!r} "
                "are no layer counts"
            )
        types = [FULL if max(i - offset + 1, 0) % frequency == 0 else SHARED for i in range(num_layers)]
    types = types[:num_layers]
    if len(types) < num_layers or set(types) - {FULL, SHARED}:
        raise CheckpointError(
            f"config.json: the indexer schedule must name {num_layers} layers full or shared"
        )
    if needs_first and types[0] != FULL:
        raise CheckpointError("config.json: layer 0 is 'shared', but no full layer comes before it")
    return tuple(types)


def first_sparse_layer(config: Mapping[str, Any]) -> int:
    """Number of leading dense layers; `mlp_layer_types`, when given, must be dense ones, then sparse ones."""
    num_layers: int = config["num_hidden_layers"]
    kinds = words_of(config, "mlp_layer_types")
    if kinds is None:
        first_k = config.get("first_k_dense_replace")
        return min(3, num_layers) if first_k is None else first_k  # 3 as in transformers
    first = kinds.index("sparse") if "sparse" in kinds else num_layers
    if list(kinds[:num_layers]) != ["dense"] * first + ["sparse"] * (num_layers - first):
        raise CheckpointError("config.json: mlp_layer_types must be dense layers followed by sparse ones")
    return int(first)


def words_of(config: Mapping[str, Any], name: str) -> Sequence[str] | None:
    words = config.get(name)
    is_list = isinstance(words, list) and all(isinstance(word, str) for word in words)
    if words is not None and not isinstance(words, str) and not is_list:
        raise CheckpointError(f"config.json: {name} {words!r} is no list of words")
    return words


def check_sizes(values: Mapping[str, Any]) -> None:
    """Every number of a kind and size that can be computed with; config.json is somebody else's."""
    for name, value in values.items():
        if name in _REALS:
            fits = type(value) in (int, float) and 0 < value < 2**63  # no NaN, no infinity
        elif name == "norm_topk_prob":
            fits = type(value) is bool
        elif name in _PARSED:
            fits = True  # its own parser said so
        else:
            fits = type(value) is int and (name not in _MAY_BE_ZERO) <= value <= _MOST.get(name, 2**31 - 1)
        if not fits:
            raise CheckpointError(f"config.json: {name} {value!r} makes no sense")


def check_routing(args: ModelArgs) -> None:
    group_size, rest = divmod(args.n_routed_experts, args.n_group)
    if rest or args.topk_group > args.n_group or (args.n_group > 1 and group_size < 2):
        raise CheckpointError(
            f"config.json: {args.n_routed_experts} experts do not make {args.n_group} groups "
            f"of which {args.topk_group} are kept"
        )
    if args.num_experts_per_tok > args.n_routed_experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok {args.num_experts_per_tok} of {args.n_routed_experts} experts"
        )
    if args.num_experts_per_tok > (kept := args.topk_group * group_size):
        raise CheckpointError(
            f"config.json: num_experts_per_tok {args.num_experts_per_tok}, but the {args.topk_group} groups "
            f"that are kept hold {kept} experts"
        )


def _rope_theta(config: Mapping[str, Any]) -> float:
    """`rope_theta` in any of its places; CheckpointError for rotations that are not the plain one.

    Places and default are those of transformers 5.24, `RotaryEmbeddingConfigMixin`: `rope_scaling` and `type`
    are the old spelling. The default is only for a config that says nothing at all of the rotation: one that
    describes it in words that are not understood means another base, and 10000 would compute nonsense.
    """
    theta: Any = None
    described: list[str] = []
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise CheckpointError(f"config.json: {name} is {rope!r} instead of an object")
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind != "default":
            raise CheckpointError(f"rope_type {kind!r} is not supported; GLM-5 uses 'default'")
        described.append(name)
        theta = rope.get("rope_theta") if theta is None else theta
    theta = config.get("rope_theta") if theta is None else theta
    if theta is None and described:
        raise CheckpointError(
            f"config.json: {described[-1]} {config[described[-1]]!r} names no rope_theta; add the base that "
            "the model was trained with"
        )
    return 10000.0 if theta is None else theta


def refuse_unsupported(config: Mapping[str, Any], others: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises CheckpointError for a value that would change the numbers silently if it were ignored.

    `others`: an architecture's own names, each with the values that are computed.
    """
    for name, allowed in (_COMPUTED | dict(others)).items():
        if config.get(name) not in allowed:
            raise CheckpointError(
                f"config.json: {name} {config[name]!r} is not supported, only {allowed[0]!r}"
            )

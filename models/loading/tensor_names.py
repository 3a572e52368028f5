"""Names of tensors: which of a checkpoint's tensors make the trunk, and under what name. Called by loading.

Known layouts are MLX's (experts stacked under `switch_mlp`, `kv_b_proj` split into `embed_q` and
`unembed_out`) and what transformers saves (experts one by one or fused, `kv_b_proj` whole).
"""

from collections.abc import Iterable, Mapping

import mlx.core as mx

from config.errors import CheckpointError
from models.args import ModelArgs
from models.loading.checkpoint_names import is_unused as is_unused
from streaming.files.index import ExpertIndex


def trunk_names(names: Iterable[str], args: ModelArgs) -> list[str]:
    """The tensors to load. Raises CheckpointError for FP8 scales: those are for the converter."""
    kept = [name for name in names if not is_unused(name, args) and not ExpertIndex.is_expert_tensor(name)]
    for name in kept:
        if name.endswith("weight_scale_inv"):
            raise CheckpointError(
                "this is an FP8 checkpoint; make it loadable with: glmserve convert SRC DST"
            )
    return kept


def to_model_names(tensors: Mapping[str, mx.array], args: ModelArgs) -> dict[str, mx.array]:
    """The same tensors under the names of `Model`'s parameters; a whole `kv_b_proj` is split."""
    out: dict[str, mx.array] = {}
    for name, tensor in tensors.items():
        prefix, kv_b, rest = name.partition("kv_b_proj.")
        if not kv_b:
            out[name] = tensor
        elif rest != "weight" or not mx.issubdtype(tensor.dtype, mx.floating):
            raise CheckpointError(
                f"{name}: a packed kv_b_proj cannot be split by head; take a checkpoint with embed_q and "
                "unembed_out, or make one of the BF16 or FP8 original with: glmserve convert SRC DST"
            )
        elif tensor.shape != (shape := kv_b_shape(args)):
            raise CheckpointError(f"{name} is {tensor.shape}, not {shape} as config.json describes")
        else:
            out[prefix + "embed_q.weight"], out[prefix + "unembed_out.weight"] = split_kv_b(tensor, args)
    return out


def kv_b_shape(args: ModelArgs) -> tuple[int, int]:
    return args.num_attention_heads * (args.qk_nope_head_dim + args.v_head_dim), args.kv_lora_rank


def split_kv_b(kv_b: mx.array, args: ModelArgs) -> tuple[mx.array, mx.array]:
    """kv_b [heads * (nope + v), latent] -> embed_q [heads, latent, nope], unembed_out [heads, v, latent]."""
    nope = args.qk_nope_head_dim
    by_head = kv_b.reshape(args.num_attention_heads, nope + args.v_head_dim, args.kv_lora_rank)
    return mx.contiguous(by_head[:, :nope].swapaxes(-1, -2)), mx.contiguous(by_head[:, nope:])

"""GLM-5 to 5.3 as a family: the half that computes."""

from models.args import ModelArgs
from models.attention.cache import cache_bytes_per_token
from models.computing import CacheBytes, Computing
from models.glm_moe_dsa import Model
from models.loading.tensor_names import to_model_names
from models.workspace import sweep_row_bytes, workspace_bytes

# Control paths stay in float32 whatever the activations are (reference, section 0, point 4).
FLOAT32 = (".gate.weight", ".e_score_correction_bias", ".k_norm.weight", ".k_norm.bias")


def cache_bytes(args: ModelArgs, itemsize: int) -> CacheBytes:
    """What a token takes in all layers."""
    index_keys = args.index_head_dim * len(args.full_layers) * itemsize
    return CacheBytes(cache_bytes_per_token(args, itemsize) - index_keys, index_keys)


COMPUTING = Computing(Model, to_model_names, FLOAT32, cache_bytes, workspace_bytes, sweep_row_bytes)

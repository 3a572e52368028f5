"""GLM-5 to 5.3 as a family: config, names of tensors and ids. Pure, and without MLX."""

from collections.abc import Iterator, Mapping
from typing import Any

from models.args import MODEL_TYPE, ModelArgs
from models.family import Family, Layouts

_ATTENTION = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "o_proj")
_INDEXER = ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")


def parse(config: Mapping[str, Any]) -> ModelArgs:
    """Parses config.json. Raises CheckpointError for what this implementation does not compute."""
    return ModelArgs.from_config(config)


def layer_names(path: str, layer: int, args: ModelArgs) -> Iterator[Layouts]:
    """The tensors of a layer at `model.layers.N.` but those of its MLP."""
    yield ([f"{path}input_layernorm.weight", f"{path}post_attention_layernorm.weight"],)
    yield from attention_names(f"{path}self_attn.", layer, args)


def attention_names(path: str, layer: int, args: ModelArgs) -> Iterator[Layouts]:
    """The tensors of latent attention, with the indexer of a layer that owns one."""
    yield ([f"{path}{module}.weight" for module in _ATTENTION],)
    yield [f"{path}kv_b_proj.weight"], [f"{path}embed_q.weight", f"{path}unembed_out.weight"]
    if layer in args.full_layers:
        yield ([f"{path}indexer.{tensor}" for tensor in _INDEXER],)


GLM_MOE_DSA = Family(
    model_types=(MODEL_TYPE,),
    title="GLM-5, 5.1, 5.2 and 5.3",
    served_id="z-ai/glm-5.2",
    hugging_face_id="zai-org/GLM-5.2",
    parse=parse,
    layer_names=layer_names,
    computing="models.dsa_computing",
)

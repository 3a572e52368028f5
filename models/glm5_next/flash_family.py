"""GLM-5.3-Flash as a family: config, names of tensors and ids. Pure, and without MLX."""

import re
from collections.abc import Iterator
from typing import cast

from models.args import ModelArgs
from models.dsa_family import attention_names
from models.family import Family, Layouts
from models.glm5_next.flash_args import FlashArgs

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "f_a_proj", "f_b_proj", "b_proj", "g_a_proj", "g_b_proj")
_CONVOLUTIONS = ("q_conv1d", "k_conv1d", "v_conv1d")
_MIXES = ("fn", "base", "scale")
_OLD_MIX = re.compile(r"\.hc_(attn|ffn)_(fn|base|scale)$")


def plain_name(name: str) -> str:
    """The name of a tensor as the model has it: hyper-connections and gates bear two names in checkpoints."""
    return _OLD_MIX.sub(r".\1_hc.\2", name.replace(".self_attn.forget_gate.", ".self_attn."))


def layer_names(path: str, layer: int, args: ModelArgs) -> Iterator[Layouts]:
    """The tensors of a layer at `model.layers.N.` but those of its MLP."""
    flash, attention = cast(FlashArgs, args), f"{path}self_attn."
    yield ([f"{path}input_layernorm.weight", f"{path}post_attention_layernorm.weight"],)
    yield ([f"{path}{kind}_hc.{mix}" for kind in ("attn", "ffn") for mix in _MIXES],)
    if layer in flash.linear_layers:
        yield ([f"{attention}{module}.weight" for module in (*_PROJECTIONS, "o_norm", "o_proj")],)
        yield ([f"{attention}dt_bias", f"{attention}A_log"],)
        yield [f"{attention}{module}.weight" for module in _CONVOLUTIONS], [f"{attention}conv1d.weight"]
        return
    yield from attention_names(attention, layer, args)
    if layer in flash.full_layers:
        yield ([f"{attention}indexer.index_kpool_compress_{part}" for part in ("ape", "gate")],)


GLM5_NEXT = Family(
    model_types=("glm5_next", "glm5_next_text"),
    title="GLM-5.3-Flash",
    served_id="z-ai/glm-5.3-flash",
    hugging_face_id="zai-org/GLM-5.3-Flash",
    parse=FlashArgs.from_config,
    layer_names=layer_names,
    plain_name=plain_name,
    computing="models.glm5_next.flash_computing",
    always_thinks=True,
)

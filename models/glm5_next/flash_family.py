"""GLM-5.3-Flash as a family: config, names of tensors and ids. Pure, and without MLX."""

import re
from collections.abc import Iterator
from typing import cast

from models.args import ModelArgs
from models.dsa_family import attention_names
from models.family import Family, Layouts
from models.glm5_next.flash_args import FlashArgs

# Modules that a converter may put into one, in the order of its rows.
_LINEAR = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "fbg_a_proj": ("f_a_proj", "b_proj", "g_a_proj"),
    "conv1d": ("q_conv1d", "k_conv1d", "v_conv1d"),
}
_SPARSE = {"qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa")}
_MIXES = ("fn", "base", "scale")
_OLD_MIX = re.compile(r"\.hc_(attn|ffn)_(fn|base|scale)$")
_MLX_CONVOLUTION = re.compile(r"\.(?:([qkv])|qkv)_conv\.conv\.weight$")


def plain_name(name: str) -> str:
    """The name of a tensor as the model has it: mixes, gates and convolutions bear several in checkpoints."""
    name = _OLD_MIX.sub(r".\1_hc.\2", name.replace(".self_attn.forget_gate.", ".self_attn."))
    return _MLX_CONVOLUTION.sub(lambda m: f".{m[1]}_conv1d.weight" if m[1] else ".conv1d.weight", name)


def layer_names(path: str, layer: int, args: ModelArgs) -> Iterator[Layouts]:
    """The tensors of a layer at `model.layers.N.` but those of its MLP."""
    flash, attention = cast(FlashArgs, args), f"{path}self_attn."
    yield ([f"{path}input_layernorm.weight", f"{path}post_attention_layernorm.weight"],)
    yield ([f"{path}{kind}_hc.{mix}" for kind in ("attn", "ffn") for mix in _MIXES],)
    is_linear = layer in flash.linear_layers
    for joined, parts in (_LINEAR if is_linear else _SPARSE).items():
        yield [f"{attention}{part}.weight" for part in parts], [f"{attention}{joined}.weight"]
    if is_linear:
        yield ([f"{attention}{part}.weight" for part in ("f_b_proj", "g_b_proj", "o_norm", "o_proj")],)
        yield ([f"{attention}dt_bias", f"{attention}A_log"],)
        return
    apart = {f"{attention}{part}.weight" for part in _SPARSE["qkv_a_proj"]}
    for layouts in attention_names(attention, layer, args):
        yield tuple([name for name in layout if name not in apart] for layout in layouts)
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
    computing_files=("glm5_next/*.py",),
    always_thinks=True,
    fails_on=("cuda",),  # nearly all tokens are routed alike on an H200; benchmarks/notes.md
)

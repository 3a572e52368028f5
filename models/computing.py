"""The half of an architecture that computes: the model, its tensors and what it takes in memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx

from models.args import ModelArgs
from models.arithmetic import Arithmetic
from models.experts.experts import Experts
from models.glm_moe_dsa import Model
from streaming.files.headers import TensorEntry
from streaming.files.index import ExpertIndex

MakeExperts = Callable[[int], Experts]


@dataclass(frozen=True)
class CacheBytes:
    """What the cache of one sequence takes: by token, and once."""

    latents_per_token: int
    index_keys_per_token: int
    state: int = 0


@dataclass(frozen=True)
class Computing:
    """Functions of the arguments that the architecture's own `parse` made.

    `make_model`: a model of placeholders. `to_model_names`: a checkpoint's tensors under the names of its
    parameters. `float32`: last words of the names of tensors that are held in float32 whatever they were
    stored in. `workspace_bytes`: the largest transients of a step; `sweep_row_bytes`: each row of a prompt on
    its way through the layers.
    """

    make_model: Callable[[ModelArgs, Arithmetic, MakeExperts], Model]
    to_model_names: Callable[[Mapping[str, mx.array], ModelArgs], dict[str, mx.array]]
    float32: tuple[str, ...]
    cache_bytes: Callable[[ModelArgs, int], CacheBytes]
    workspace_bytes: Callable[[ModelArgs, Arithmetic, Mapping[str, TensorEntry], ExpertIndex, int], int]
    sweep_row_bytes: Callable[[ModelArgs, Arithmetic, int], int]

"""Greedy decoding of Pocket in this process, in MLX, through the model that the server computes.

Owns opening the checkpoint and the loop over tokens. Used where a server would be in the way: to watch the
router, and to count what a planted fault costs. Batching and sampling are the engine's business.
"""

import json
from collections.abc import Callable, Collection
from pathlib import Path

import mlx.core as mx

from models.arithmetic import choose_arithmetic
from models.attention.attention import Span
from models.attention.cache import SequenceCache
from models.glm_moe_dsa import Model
from models.loading.loading import load_model, open_checkpoint
from streaming.store import ExpertStore


def open_pocket(folder: Path) -> Model:
    """The model with all experts in memory."""
    checkpoint, arithmetic = open_checkpoint(folder), choose_arithmetic()
    store = ExpertStore(checkpoint.experts, checkpoint.args.n_routed_experts, float_dtype=arithmetic.dtype)
    store.load_all()
    return load_model(checkpoint, arithmetic, store)


def end_ids(folder: Path) -> set[int]:
    """The ids that end a turn."""
    return set(json.loads((folder / "generation_config.json").read_text())["eos_token_id"])


def step(model: Model, cache: SequenceCache, ids: list[int]) -> int:
    """Reads some tokens of a sequence; gives the likeliest next one."""
    hidden = model(mx.array(ids), [Span(cache, 0, len(ids))])
    return int(mx.argmax(model.logits(hidden[-1:])))


def greedy(
    model: Model,
    prompt: list[int],
    ends: Collection[int],
    max_new: int,
    on_decode: Callable[[], None] = lambda: None,
) -> list[int]:
    """The likeliest tokens after the prompt, up to and with one of `ends`, `max_new` at most.

    `on_decode` is called after each pass over a written token, not after those over the prompt.
    """
    cache = model.make_cache()
    token = step(model, cache, prompt)
    written = [token]
    while written[-1] not in ends and len(written) < max_new:
        written.append(step(model, cache, written[-1:]))
        on_decode()
    return written

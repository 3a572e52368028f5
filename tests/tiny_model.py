"""The tiny checkpoints of tests/tiny_glm.py as models in memory, without files."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np

from models.args import ModelArgs
from models.arithmetic import CPU, Arithmetic
from models.attention.attention import Span
from models.attention.cache import SequenceCache
from models.families import parse_args
from models.glm_moe_dsa import Model
from models.loading.building import as_held, build_model
from models.loading.tensor_names import trunk_names
from streaming.files.index import PROJECTIONS
from streaming.fills import Fetch
from streaming.layer import Lease
from streaming.store import ExpertStore
from streaming.sweep import Place, resident_groups
from tests.tiny_glm import Array


class MemoryExperts:
    """All experts of all layers, resident: the smallest store."""

    is_resident = True

    def __init__(self, args: ModelArgs, weights: Mapping[str, Array]) -> None:
        self._num_experts = args.n_routed_experts
        self._leases = {layer: Lease() for layer in args.moe_layers}
        self._banks = {layer: self._make_bank(layer, weights) for layer in args.moe_layers}

    def _make_bank(self, layer: int, weights: Mapping[str, Array]) -> dict[str, mx.array]:
        prefix = f"model.layers.{layer}.mlp.experts."
        experts = range(self._num_experts)
        return {
            f"{p}.weight": mx.array(np.stack([weights[f"{prefix}{e}.{p}.weight"] for e in experts]))
            for p in PROJECTIONS
        }

    def lease(self, layer: int) -> Lease:
        return self._leases[layer]

    def slot_table(self, layer: int) -> mx.array | None:
        return None

    def count_hits(self, num_pairs: int) -> None:
        raise NotImplementedError

    def watches_scores(self, layer: int) -> bool:
        return False

    def looks_ahead(self, layer: int) -> bool:
        return False

    def num_slots(self, layer: int) -> int:
        return self._num_experts

    def bank(self, layer: int) -> Mapping[str, mx.array]:
        return self._banks[layer]

    def begin(self, layer: int, experts: Sequence[int]) -> Fetch:
        raise AssertionError("resident experts are never fetched")

    def finish(self, fetch: Fetch) -> None:
        raise AssertionError("resident experts are never fetched")

    def take_turns(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
        raise AssertionError("resident experts take no turns")

    def sweep(self, layer: int, rows_of: Mapping[int, int], at_once: int) -> Iterator[Sequence[Place]]:
        return resident_groups(self._banks[layer], rows_of, at_once, lambda expert: expert)

    def anticipate_sweep(self, layer: int) -> None:
        raise AssertionError("resident experts are not read")

    def observe(self, layer: int, scores: Array) -> None:
        raise AssertionError("resident experts need no policy")

    def expect(self, layer: int, ranks: Sequence[Sequence[int]]) -> None:
        raise AssertionError("resident experts are never guessed")


def make_model(
    config: Mapping[str, Any], weights: Mapping[str, Array], arithmetic: Arithmetic = CPU
) -> Model:
    args = parse_args(config)
    tensors = {name: mx.array(weights[name]) for name in trunk_names(weights, args)}
    source = cast(ExpertStore, MemoryExperts(args, weights))
    return build_model(args, arithmetic, source, as_held(tensors, args, arithmetic))


def logits(model: Model, ids: Sequence[int], chunk: int | None = None) -> Array:
    """Logits [T, V] of a prompt given in chunks (None: at once)."""
    cache = model.make_cache()
    size = chunk or len(ids)
    parts = [run(model, ids[i : i + size], cache) for i in range(0, len(ids), size)]
    cache.check_integrity()
    return np.concatenate(parts)


def run(model: Model, ids: Sequence[int], cache: SequenceCache) -> Array:
    """Logits [n, V] of the next n tokens of one sequence."""
    hidden = model(mx.array(list(ids), dtype=mx.int32), [Span(cache, 0, len(ids))])
    return np.array(model.logits(hidden))


def distance(a: mx.array, b: mx.array) -> float:
    """How far a lies from b, of the length of b, float32."""
    return float(mx.linalg.norm(a.astype(mx.float32) - b) / mx.linalg.norm(b))

"""Attention as the context grows: `python -m benchmarks.growth [--keys 8192 65536] [--rows 64]`.

GLM-5.2's attention at its true shapes, random weights, caches filled with random rows: a prompt's last
`--rows` rows. The time of a layer without an indexer, what an indexer adds, and the mean layer of GLM-5.2's
schedule (21 indexers in 78 layers: multiply-adds of the indexer are 0.063 of attention's at 8,192 keys).
Beside it mlx-lm's attention of the same shapes, which has an indexer in each layer; and the two forms of
attention to selected keys, masked and gathered, from whose times `Arithmetic.gather_from` follows.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models import deepseek_v32
from mlx_lm.models.cache import CacheList, KVCache

from models.args import ModelArgs
from models.arithmetic import choose_arithmetic
from models.attention.attention import Attention, RowPart, Span, make_parts
from models.attention.cache import SequenceCache
from models.attention.tiles import select_tiles
from tests.glm52 import GLM52

CONFIG: dict[str, Any] = GLM52 | {
    "num_hidden_layers": 4, "mlp_layer_types": ["dense"] * 4, "first_k_dense_replace": 4,
}  # fmt: skip
FULL_LAYER, SHARED_LAYER = 2, 3
INDEXERS, LAYERS = 21, 78  # of GLM-5.2
Run = Callable[[], None]


def _fill(module: nn.Module) -> Any:
    module.update(tree_map(lambda a: mx.random.normal(a.shape, dtype=a.dtype) * a.shape[-1] ** -0.5,
                           module.parameters()))  # fmt: skip
    mx.eval(module.parameters())
    return module


def _milliseconds(layer: Attention, x: mx.array, part: RowPart) -> float:
    start_s = time.perf_counter()
    mx.eval(layer(x, part, x))
    return (time.perf_counter() - start_s) * 1e3


class Ours:
    """One full and one shared layer over a cache of so many random rows."""

    def __init__(self, gather_from: int | None = None) -> None:
        self._args = ModelArgs.from_config(CONFIG)
        arithmetic = choose_arithmetic()
        if gather_from is not None:
            arithmetic = replace(arithmetic, gather_from=gather_from)
        self._dtype = arithmetic.dtype
        self._full = _fill(Attention(self._args, FULL_LAYER, arithmetic))
        self._shared = _fill(Attention(self._args, SHARED_LAYER, arithmetic))

    def measure(self, keys: int, rows: int) -> tuple[float, float]:
        """Milliseconds of the shared layer, and what the indexer adds."""
        cache = SequenceCache(self._args, self._dtype)
        for store in [*cache.latents, *cache.index_keys.values()]:
            store.append(mx.random.normal((keys - rows, store.state.shape[1])))
            mx.eval(store.state)
        x = mx.random.normal((rows, self._args.hidden_size)).astype(self._dtype)
        cache.expect(rows)
        [part] = make_parts([Span(cache, 0, rows)])
        full_ms, shared_ms = (_milliseconds(layer, x, part) for layer in (self._full, self._shared))
        return shared_ms, full_ms - shared_ms


class Scoring:
    """Scores and selection of GLM-5.2's indexer alone, over random index keys."""

    def __init__(self, keys: int, rows: int) -> None:
        args = self._args = ModelArgs.from_config(CONFIG)
        self._arithmetic = choose_arithmetic()
        self._queries = mx.random.normal((rows, args.index_n_heads, args.index_head_dim))
        self._weights = mx.random.normal((rows, args.index_n_heads))
        self._keys = mx.random.normal((keys, args.index_head_dim)).astype(self._arithmetic.dtype)
        mx.eval(self._queries, self._weights, self._keys)

    def nanoseconds(self, pairs: int) -> float:
        """Of a (query, key), over at least so many of them."""
        count = self._queries.shape[0] * self._keys.shape[0]
        repeats = -(-pairs // count)
        start_s = time.perf_counter()
        for _ in range(repeats):
            tiles = select_tiles(
                self._queries, self._weights, self._keys, self._args.index_topk,
                heads=self._args.num_attention_heads, arithmetic=self._arithmetic,
            )  # fmt: skip
            mx.eval([tile.keys for tile in tiles if tile.keys is not None])
        return (time.perf_counter() - start_s) / (repeats * count) * 1e9


class MlxLm:
    """mlx-lm's layer: attention and indexer together."""

    def __init__(self) -> None:
        args = ModelArgs.from_config(CONFIG)
        names = set(deepseek_v32.ModelArgs.__dataclass_fields__) & set(args.__dataclass_fields__)
        given = {name: getattr(args, name) for name in names}
        self._dtype = choose_arithmetic().dtype
        self._layer = deepseek_v32.DeepseekV32Attention(deepseek_v32.ModelArgs(**given))
        self._layer.set_dtype(self._dtype)
        _fill(self._layer)
        self._args = args

    def measure(self, keys: int, rows: int) -> float:
        args, past = self._args, keys - rows
        cache = CacheList(KVCache(), KVCache())
        widths = (args.kv_lora_rank, args.qk_rope_head_dim), (args.index_head_dim, args.index_head_dim)
        for one, pair in zip(cache.caches, widths, strict=True):
            one.update_and_fetch(*(mx.random.normal((1, 1, past, w)).astype(self._dtype) for w in pair))
        mx.eval(cache.state)
        x = mx.random.normal((1, rows, args.hidden_size)).astype(self._dtype)
        mask = None if rows == 1 else mx.arange(keys)[None] <= mx.arange(past, keys)[:, None]
        start_s = time.perf_counter()
        mx.eval(self._layer(x, mask, cache))
        return (time.perf_counter() - start_s) * 1e3


def _print_growth(ours: Ours, theirs: MlxLm | None, lengths: list[int], rows: int, rounds: int) -> None:
    ours.measure(lengths[0], rows)
    times: dict[int, list[tuple[float, float]]] = {keys: [] for keys in lengths}
    for _ in range(rounds):
        for keys in lengths:
            times[keys].append(ours.measure(keys, rows))
    print(f"{rows} rows, medians of {rounds}; milliseconds a row")
    print("   keys  attention  indexer  ns a (query, key)  mean layer   [lowest highest]  mlx-lm, once")
    first_ms = 0.0
    for keys, taken in times.items():
        attention, indexer = (statistics.median(column) / rows for column in zip(*taken, strict=True))
        other = theirs.measure(keys, rows) / rows if theirs else float("nan")  # once: it takes minutes
        means = sorted((a + i * INDEXERS / LAYERS) / rows for a, i in taken)
        mean = statistics.median(means)
        first_ms = first_ms or mean
        print(f"{keys:7} {attention:10.3f} {indexer:8.3f} {indexer * 1e6 / keys:18.2f} {mean:11.3f} "
              f"x{mean / first_ms:.2f} [{means[0]:.3f} {means[-1]:.3f}] {other:9.3f}",
              flush=True)  # fmt: skip


def _print_scoring(lengths: list[int], rows: int, rounds: int) -> None:
    """Each round takes all lengths in turn, the same number of pairs of each; the first does not count."""
    sides = [Scoring(keys, rows) for keys in lengths]
    taken: list[list[float]] = []
    for _ in range(1 + rounds):
        taken.append([side.nanoseconds(max(lengths) * rows) for side in sides])
    del taken[0]
    print(f"indexer alone, {rows} rows, {rounds} rounds: keys, ns a (query, key), times the first length's")
    for keys, column in zip(lengths, zip(*taken, strict=True), strict=True):
        ratios = sorted(ns / first for ns, (first, *_) in zip(column, taken, strict=True))
        print(f"{keys:7} {statistics.median(column):8.1f}  {statistics.median(ratios):.3f} "
              f"[{ratios[0]:.3f} {ratios[-1]:.3f}]", flush=True)  # fmt: skip


def _print_forms(shares: list[int], rows: int, rounds: int) -> None:
    masked, gathered = Ours(10**6), Ours(1)
    print(
        f"{rows} rows, medians of {rounds}; milliseconds a row of a shared layer\n   keys   masked  gathered"
    )
    for share in shares:
        keys = share * CONFIG["index_topk"]
        times = [(masked.measure(keys, rows)[0], gathered.measure(keys, rows)[0]) for _ in range(rounds)]
        low, high = (statistics.median(column) / rows for column in zip(*times, strict=True))
        print(f"{keys:7} {low:8.3f} {high:9.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, nargs="+", default=[8192, 16_384, 32_768, 65_536])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--forms", type=int, nargs="*", default=[2, 3, 4, 5, 6, 7, 8, 12],
                        help="keys for each selected one, for the comparison of forms")  # fmt: skip
    parser.add_argument("--scoring-rounds", type=int, default=9, help="of the indexer alone; 0 for none")
    parser.add_argument("--without-layers", action="store_true", help="no whole layers, only what is above")
    parser.add_argument("--without-mlx-lm", action="store_true")
    given = parser.parse_args()
    if given.forms:
        _print_forms(given.forms, given.rows, given.rounds)
    if given.scoring_rounds:
        _print_scoring(given.keys, given.rows, given.scoring_rounds)
    if given.without_layers:
        return
    theirs = None if given.without_mlx_lm else MlxLm()
    _print_growth(Ours(), theirs, given.keys, given.rows, given.rounds)


if __name__ == "__main__":
    main()

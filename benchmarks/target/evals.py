"""How often a prompt's attention waits at true shapes: `python -m benchmarks.target.evals`.

Counts `mx.eval` in one part of 2,048 rows of a full and of a shared layer, by the keys before it, with
Metal's arithmetic; nothing is computed and no weights are needed. For each: waits for the newest work, after
which the GPU has nothing to do, waits for pieces two or more back, and Python's time. `--depth 1` is how it
was: each piece evaluated before the next is described.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import patch

import mlx.core as mx

from benchmarks.rig.waits import Waits, counted_waits
from models.args import ModelArgs
from models.arithmetic import METAL, Arithmetic
from models.attention.attention import PART_ROWS, Attention, Span, make_parts
from models.attention.cache import RowCache, SequenceCache
from tests.glm52 import GLM52

BEFORE = (0, 6144, 14336, 30720, 63488, 129024, 197952)
PUBLISHED_WAIT_S = 0.26e-3  # of a synchronisation on Apple silicon


def count_part(args: ModelArgs, arithmetic: Arithmetic, layer: int, before: int) -> tuple[Waits, float]:
    """Waits and seconds of Python of one part's attention in a layer, with `before` keys in the cache."""
    attention, cache = Attention(args, layer, arithmetic), SequenceCache(args, arithmetic.dtype)
    full = max(one for one in args.full_layers if one <= layer)
    for rows in (cache.latents[layer], cache.latents[full], cache.index_keys[full], cache.latents[-1]):
        _pretend(rows, before)
    [part] = make_parts([Span(cache, 0, PART_ROWS)])
    x = mx.zeros((PART_ROWS, args.hidden_size), dtype=arithmetic.dtype)
    with counted_waits(computes=False) as waits:
        if layer != full:  # the selection that it reuses
            Attention(args, full, arithmetic)(x, part, x)
        skipped, begun = replace(waits), time.thread_time()
        out = attention(x, part, x)
        mx.eval(out)
        spent_s = time.thread_time() - begun
    return Waits(waits.newest - skipped.newest, waits.older - skipped.older), spent_s


def _pretend(rows: RowCache, length: int) -> None:
    """So many rows are there; of zeros that nobody computes."""
    with patch.object(mx, "eval", lambda *_: None):
        rows.expect(length + PART_ROWS)
        if length > rows.length:
            rows.append(mx.zeros((length, rows.state.shape[1]), dtype=rows.state.dtype))


def main(words: Sequence[str] | None = None) -> int:
    """Prints the table, and what it comes to for whole prompts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=METAL.pieces_in_flight)
    arithmetic = replace(METAL, pieces_in_flight=parser.parse_args(words).depth)
    args = ModelArgs.from_config(GLM52)
    num_full = len(args.full_layers)
    num_shared = args.num_hidden_layers - num_full
    print(f"pieces in flight: {arithmetic.pieces_in_flight}; one part of {PART_ROWS} rows of a layer")
    per_part = {}
    for before in BEFORE:
        full, full_s = count_part(args, arithmetic, 0, before)
        shared, shared_s = count_part(args, arithmetic, 3, before)
        newest = num_full * full.newest + num_shared * shared.newest
        per_part[before] = newest
        print(
            f"{before:7d} keys before: full layer {full.newest} newest + {full.older} older, "
            f"{full_s * 1e3:.0f} ms; shared {shared.newest} + {shared.older}, {shared_s * 1e3:.0f} ms; "
            f"all layers {newest} newest, {num_full * full_s + num_shared * shared_s:.1f} s of Python"
        )
    for prompt in (32_768, 200_000):
        total = sum(
            per_part[max(known for known in BEFORE if known <= before)]
            for before in range(0, prompt, PART_ROWS)
        )
        print(f"prompt of {prompt}: about {total} such waits; at 0.26 ms {total * PUBLISHED_WAIT_S:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

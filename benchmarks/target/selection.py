"""The k-th best of each row, by sorting and by bisection: `python -m benchmarks.target.selection`.

MLX's `partition` on Metal is a full sort in several blocks, by its source; never run by us. Each form is
timed on MLX's default device, interleaved, on tiles as long prompts have them, and held to the same bits.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from models.attention.selection import causal_mask, kth_by_bits, kth_by_numpy, kth_by_partition, select

FORMS: dict[str, Callable[[mx.array, int], mx.array]] = {
    "partition": kth_by_partition,
    "bits": kth_by_bits,
    "numpy": kth_by_numpy,
}


def main(words: Sequence[str] | None = None) -> int:
    """Prints milliseconds and the spread of each form for each number of keys."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, nargs="+", default=[4096, 14_336, 65_536, 200_000])
    parser.add_argument("--rows", type=int, default=21)
    parser.add_argument("--k", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    options = parser.parse_args(words)
    print(f"{mx.default_device()}, {options.rows} rows, the best {options.k}; ms: median (least to most)")
    for num_keys in options.keys:
        rng = np.random.default_rng(0)
        scores = mx.array(rng.standard_normal((options.rows, num_keys)).astype(np.float32))
        visible = causal_mask(num_keys - options.rows, options.rows, num_keys)
        mx.eval(scores, visible)
        times: dict[str, list[float]] = {name: [] for name in options.forms}
        chosen = {name: select(scores, visible, options.k, FORMS[name]) for name in options.forms}
        mx.eval(chosen)
        assert all(mx.array_equal(one, chosen[options.forms[0]]) for one in chosen.values())
        for _ in range(options.rounds):
            for name in options.forms:
                begun = time.perf_counter()
                mx.eval(select(scores, visible, options.k, FORMS[name]))
                times[name].append(1e3 * (time.perf_counter() - begun))
        for name, spent in times.items():
            print(
                f"{num_keys:7d} keys, {name:9}: {statistics.median(spent):7.2f} "
                f"({min(spent):.2f} to {max(spent):.2f})"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

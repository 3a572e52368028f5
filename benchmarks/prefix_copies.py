"""What it takes to copy rows of GLM-5.2 out of a cache and into one: `python -m benchmarks.prefix_copies`.

A cache of its geometry in bfloat16, 95,232 bytes a token, filled with noise, and all its blocks in memory: no
model and no disk. The engine copies so while nobody computes.
"""

import argparse
import time
from statistics import median

import mlx.core as mx

from models.args import ModelArgs
from models.attention.cache import SequenceCache
from models.attention.cache_blocks import bytes_per_token
from server.engine.prefix.lookup import BLOCK_TOKENS, PrefixCache
from tests.glm52 import GLM52

ROUNDS = 5


def noise(args: ModelArgs, num_tokens: int) -> SequenceCache:
    """A cache that holds so many tokens."""
    cache = SequenceCache(args, mx.bfloat16)
    for rows in [*cache.latents, *cache.index_keys.values()]:
        rows.append(mx.random.normal((num_tokens, rows.rows(0, 0).shape[1])))
        mx.eval(rows.state)
    return cache


def restore(prefix: PrefixCache, tokens: list[int], cache: SequenceCache) -> None:
    """As the engine does it, a group of blocks at a time."""
    restoring = prefix.restore(tokens, cache)
    while restoring.wait(1.0) and not restoring.advance():
        pass


def measure(args: ModelArgs, num_tokens: int) -> None:
    full, tokens = noise(args, num_tokens), list(range(num_tokens + 1))
    saving: list[float] = []
    restoring: list[float] = []
    for _ in range(ROUNDS):
        prefix, empty = PrefixCache(bytes(32), 10**12), SequenceCache(args, mx.bfloat16)
        times = [time.perf_counter()]
        prefix.save(tokens, full)
        times.append(time.perf_counter())
        restore(prefix, tokens, empty)
        times.append(time.perf_counter())
        assert empty.length == num_tokens // BLOCK_TOKENS * BLOCK_TOKENS
        saving.append(times[1] - times[0])
        restoring.append(times[2] - times[1])
    num_bytes = num_tokens * bytes_per_token(full)
    for name, seconds in (("save", saving), ("restore", restoring)):
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        rate = num_bytes / 1e9 / median(seconds)
        print(
            f"{num_tokens:6} tokens: {name:7} {median(seconds):.2f} s ({spread}), {rate:.2f} GB/s", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4_608, 16_384, 32_768])
    args = ModelArgs.from_config(GLM52)
    for num_tokens in parser.parse_args().tokens:
        measure(args, num_tokens)


if __name__ == "__main__":
    main()

"""What a prompt costs from a slow disk: `python -m benchmarks.sweep [--sweep-s 8] [--tokens 4096 16384]`.

A tiny model of the architecture whose experts come from the simulated disk, at a rate at which all those that
have no slot take `--sweep-s` seconds: bound by I/O. The same prompt goes through the layers in chunks and as
one sweep; two prompts go one after the other and together. Prints seconds, bytes read, and the sweep's time
over max(compute, bytes / rate), compute being the time of the same pass with every expert in memory.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from benchmarks.simulated_disk import SimulatedDisk
from models.arithmetic import Quantization
from models.attention import Span
from models.glm_moe_dsa import Model
from streaming.disk import DirectDisk
from tests.checkpoints import Opened, open_model, save_packed
from tests.tiny_glm import WIDER, make_weights, tokens

CONFIG = WIDER | {"max_position_embeddings": 65_536, "index_topk": 256}
SLOTS = 4
NARROW = (".embed_q", ".unembed_out", "indexer", "q_b_proj", "o_proj")


def read(model: Model, prompts: Sequence[list[int]], chunk: int | None = None) -> float:
    """Seconds for all prompts, in one flat pass, or each in chunks of so many tokens."""
    caches = [model.make_cache() for _ in prompts]
    start_s = time.monotonic()
    step = chunk or len(prompts[0])
    for first in range(0, len(prompts[0]), step):
        parts = [prompt[first : first + step] for prompt in prompts]
        width = len(parts[0])
        spans = [Span(cache, i * width, (i + 1) * width) for i, cache in enumerate(caches)]
        mx.eval(model(mx.array([t for part in parts for t in part]), spans))
    return time.monotonic() - start_s


def measure(opened: Opened, prompts: Sequence[list[int]], chunk: int | None = None) -> tuple[float, int]:
    """Seconds and payload bytes."""
    before = opened.store.statistics().payload_bytes
    seconds = read(opened.model, prompts, chunk)
    return seconds, opened.store.statistics().payload_bytes - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep-s", type=float, default=8.0, help="disk time of all experts without a slot")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--chunks", type=int, nargs="*", default=[512, 2048])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = save_packed(
            Path(scratch), CONFIG, make_weights(CONFIG, 0),
            lambda path: None if any(part in path for part in NARROW) else Quantization(32, 4),
        )  # fmt: skip
        resident = open_model(folder)
        index = resident.checkpoint.experts
        missing = (index.num_experts - SLOTS) * sum(index.expert_bytes(layer) for layer in index.layers)
        rate = missing / given.sweep_s
        streamed = open_model(folder, SLOTS, disk=SimulatedDisk(rate, 1e-4, DirectDisk()))
        print(f"{missing / 1e6:.2f} MB without a slot, {rate / 1e6:.3f} MB/s")
        measure(streamed, [tokens(CONFIG, 600)])  # fills the slots
        for length in given.tokens:
            prompts = [tokens(CONFIG, length, seed=seed) for seed in (1, 2)]
            compute_s = read(resident.model, prompts[:1])
            for chunk in (c for c in given.chunks if c < length):
                seconds, nbytes = measure(streamed, prompts[:1], chunk)
                print(f"{length:6} tokens in chunks of {chunk}: {seconds:7.2f} s {nbytes / 1e6:8.2f} MB")
            seconds, nbytes = measure(streamed, prompts[:1])
            bound = max(compute_s, nbytes / rate)
            print(
                f"{length:6} tokens, one sweep:      {seconds:7.2f} s {nbytes / 1e6:8.2f} MB   "
                f"compute {compute_s:.2f} s; {seconds / bound:.3f} of max(compute, disk)"
            )
            together, nbytes = measure(streamed, prompts)
            print(f"{length:6} tokens, two prompts:    {together:7.2f} s {nbytes / 1e6:8.2f} MB   "
                  f"{together / (2 * seconds):.3f} of one after the other")  # fmt: skip


if __name__ == "__main__":
    main()

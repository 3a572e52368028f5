"""What a prompt costs from a slow disk: `python -m benchmarks.sweep [--rounds 3] [--tokens 512 4096 16384]`.

Experts of 1.05 MiB, a quarter of them in memory, from a simulated disk that needs `--sweep-s` for the rest.
As on GLM-5.2 the ring holds half a layer, about one layer in four has an indexer, and experts, attention and
indexers divide the multiply-adds (printed; before, indexers had 31 times their share). The same prompt goes
through the layers in chunks and as one sweep; two prompts go one after the other and together. Prints
seconds, bytes read, and the sweep's time over max(compute, bytes / rate), compute being the same pass with
every expert in memory. Rounds alternate between all of these; medians, lowest and highest. Parts of it run
alone with `--tokens`, `--chunks` and `--without-pairs`.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.rig.checkpoint import BENCH, write_checkpoint
from benchmarks.rig.simulated_disk import SimulatedDisk
from models.args import ModelArgs
from models.arithmetic import choose_arithmetic
from models.attention.attention import Span
from models.glm_moe_dsa import Model
from models.loading.loading import Checkpoint, load_model, open_checkpoint
from streaming.disk.disk import DirectDisk
from streaming.store import ExpertStore

CONFIG: dict[str, Any] = BENCH | {
    "num_hidden_layers": 7, "first_k_dense_replace": 1, "mlp_layer_types": ["dense"] + ["sparse"] * 6,
    "num_attention_heads": 32, "num_key_value_heads": 32, "index_n_heads": 4, "index_head_dim": 32,
    "num_experts_per_tok": 4, "index_topk": 512, "max_position_embeddings": 65_536,
    "index_topk_freq": 4, "index_skip_topk_offset": 1,
}  # fmt: skip
# At 8,192 keys: GLM-5.2's experts of a token take 340 M multiply-adds in a layer, its attention 308 M, an
# indexer 43 M in 21 of 78 layers.
TARGET = {"experts": 1.10, "indexers": 0.038}
SLOTS, RING_SLOTS = 16, 32
WARMING_TOKENS = 600
Opened = tuple[Model, ExpertStore]


@dataclass
class Side:
    """One way to read prompts: what it took, round by round."""

    name: str
    model: Model
    store: ExpertStore
    prompts: Sequence[list[int]]
    chunk: int
    disk: SimulatedDisk | None = None
    seconds: list[float] = field(default_factory=list)
    payload_bytes: list[int] = field(default_factory=list)
    rest_s: list[float] = field(default_factory=list)  # of the disk, between its first read and its last
    stall_s: list[float] = field(default_factory=list)  # of the computation, waiting for experts

    def measure(self) -> None:
        before, start_s = self.store.statistics(), time.monotonic()
        _read(self.model, self.prompts, self.chunk)
        self.seconds.append(time.monotonic() - start_s)
        after = self.store.statistics()
        self.payload_bytes.append(after.payload_bytes - before.payload_bytes)
        self.stall_s.append(after.stall_s - before.stall_s)
        if self.disk is not None:
            self.rest_s.append(self.disk.idle_s(start_s))

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        low, high = min(self.seconds), max(self.seconds)
        read = sorted({round(n / 1e6, 2) for n in self.payload_bytes})
        return f"{self.name:28} {self.median_s:7.2f} s [{low:.2f} {high:.2f}]  MB read {read}"


def _read(model: Model, prompts: Sequence[list[int]], chunk: int) -> None:
    """All prompts in one flat pass for each chunk."""
    caches = [model.make_cache() for _ in prompts]
    for first in range(0, len(prompts[0]), chunk):
        parts = [prompt[first : first + chunk] for prompt in prompts]
        width = len(parts[0])
        spans = [Span(cache, i * width, (i + 1) * width) for i, cache in enumerate(caches)]
        mx.eval(model(mx.array([t for part in parts for t in part]), spans))


def balance(args: ModelArgs, keys: int) -> dict[str, float]:
    """Multiply-adds of a row behind so many keys, the mean of a sparse layer: for each of attention's own."""
    heads, hidden = args.num_attention_heads, args.hidden_size
    latent = args.kv_lora_rank * (args.qk_nope_head_dim + args.v_head_dim)
    projections = hidden * (args.q_lora_rank + args.latent_dim + heads * args.v_head_dim)
    projections += heads * (args.q_lora_rank * args.qk_head_dim + latent)
    scores = heads * min(keys, args.index_topk) * (args.latent_dim + args.kv_lora_rank)
    experts = args.num_experts_per_tok + args.n_shared_experts
    indexer = args.index_n_heads * args.index_head_dim * (args.q_lora_rank + keys)
    indexer += hidden * (args.index_n_heads + args.index_head_dim)
    return {
        "experts": experts * 3 * hidden * args.moe_intermediate_size / (projections + scores),
        "indexers": indexer * len(args.full_layers) / args.num_hidden_layers / (projections + scores),
    }


def _prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(4, CONFIG["vocab_size"], length).tolist()


def compare(
    length: int,
    rounds: int,
    resident: Opened,
    streamed: Opened,
    disk: SimulatedDisk,
    chunks: Sequence[int],
    with_pairs: bool,
) -> None:
    """Prints the table of one length."""
    prompts = [_prompt(length, seed) for seed in (1, 2)]
    compute = Side("all experts in memory", *resident, prompts[:1], length)
    chunked = [Side(f"chunks of {c}", *streamed, prompts[:1], c) for c in chunks if c < length]
    sweep = Side("one sweep", *streamed, prompts[:1], length, disk)
    together = Side("two prompts together", *streamed, prompts, length)
    sides = [compute, sweep, *chunked, *([together] if with_pairs else [])]
    for _ in range(rounds):
        for side in sides:
            side.measure()
    print(f"{length} tokens, {rounds} rounds")
    for side in sides:
        print(f"  {side}", flush=True)
    pairs = zip(sweep.seconds, sweep.payload_bytes, compute.seconds, strict=True)
    over = sorted(s / max(c, n / disk.bytes_per_s) for s, n, c in pairs)
    rest_s, stall_s = statistics.median(sweep.rest_s), statistics.median(sweep.stall_s)
    print(f"  of one sweep the disk rested for {rest_s:.2f} s, the computation waited for {stall_s:.2f} s")
    print(f"  sweep / max(compute, disk): {statistics.median(over):.3f} [{over[0]:.3f} {over[-1]:.3f}]")
    for side in chunked:
        print(f"  {side.name} / sweep: {side.median_s / sweep.median_s:.2f}")
    if not with_pairs:
        return
    both = sorted(b / (2 * s) for b, s in zip(together.seconds, sweep.seconds, strict=True))
    print(f"  together / one after the other: {statistics.median(both):.3f} [{both[0]:.3f} {both[-1]:.3f}]",
          flush=True)  # fmt: skip


def _open(checkpoint: Checkpoint, slots: int, **options: Any) -> Opened:
    arithmetic = choose_arithmetic()
    store = ExpertStore(checkpoint.experts, slots, float_dtype=arithmetic.dtype, **options)
    return load_model(checkpoint, arithmetic, store), store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep-s", type=float, default=10.0, help="disk time of all experts without a slot")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096, 16_384])
    parser.add_argument("--chunks", type=int, nargs="*", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--without-pairs", action="store_true", help="no two prompts together")
    parser.add_argument("--ring", type=int, default=RING_SLOTS, help="experts that the ring holds")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = open_checkpoint(write_checkpoint(Path(scratch) / "model", CONFIG))
        index = checkpoint.experts
        for what, share in balance(checkpoint.args, 8192).items():
            print(
                f"multiply-adds of {what} / attention at 8,192 keys: {share:.3f} (GLM-5.2 {TARGET[what]:.3f})"
            )
        resident = _open(checkpoint, index.num_experts)
        resident[1].load_all()
        missing = (index.num_experts - SLOTS) * sum(index.expert_bytes(layer) for layer in index.layers)
        rate = missing / given.sweep_s
        disk = SimulatedDisk(rate, 1e-4, DirectDisk())
        streamed = _open(checkpoint, SLOTS, disk=disk, ring_slots=given.ring)
        print(f"{missing / 1e6:.2f} MB without a slot, {given.sweep_s} s at {rate / 1e6:.1f} MB/s")
        Side("warming", *streamed, [_prompt(WARMING_TOKENS, 0)], WARMING_TOKENS).measure()  # fills the slots
        for length in given.tokens:
            compare(length, given.rounds, resident, streamed, disk, given.chunks,
                    not given.without_pairs)  # fmt: skip


if __name__ == "__main__":
    main()

"""Decode and prefill against stock mlx_lm: `python -m benchmarks.stock_mlx_lm [--rounds 5] [--tokens 512]`.

Both load one bf16 4-bit checkpoint with every layer full (stock mlx_lm cannot load shared ones). Each side
is a process of its own, ours started as the server starts its engine, theirs plain; rounds alternate.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from models.arithmetic import Quantization, choose_arithmetic
from models.attention.attention import Span
from models.loading.loading import load_model, open_checkpoint
from server.link.child import ENGINE_ENVIRONMENT
from streaming.store import ExpertStore
from tests.checkpoints import save_packed
from tests.tiny_glm import TINY, make_weights

CONFIG: dict[str, Any] = TINY | {
    "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 512,
    "moe_intermediate_size": 128, "first_k_dense_replace": 1,
    "mlp_layer_types": ["dense"] + ["sparse"] * 7, "n_routed_experts": 64, "num_experts_per_tok": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 128, "kv_lora_rank": 64,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "index_n_heads": 16,
    "index_head_dim": 64, "index_topk": 2048, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
}  # fmt: skip
DECODED_TOKENS = 16
Step = Callable[[list[int]], int]


def ours(directory: Path) -> Callable[[], Step]:
    """Feeds tokens of one sequence, returns the likeliest next one."""
    checkpoint, arithmetic = open_checkpoint(directory), choose_arithmetic()
    store = ExpertStore(checkpoint.experts, CONFIG["n_routed_experts"], float_dtype=arithmetic.dtype)
    store.load_all()
    model = load_model(checkpoint, arithmetic, store)

    def begin() -> Step:
        cache = model.make_cache()

        def step(ids: list[int]) -> int:
            hidden = model(mx.array(ids), [Span(cache, 0, len(ids))])
            return int(model.logits(hidden[-1:]).argmax())

        return step

    return begin


def theirs(directory: Path) -> Callable[[], Step]:
    """The same through mlx_lm's own loader and prompt cache."""
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model as load_stock

    model, _ = load_stock(directory)

    def begin() -> Step:
        cache = make_prompt_cache(model)

        def step(ids: list[int]) -> int:
            return int(model(mx.array([ids]), cache=cache)[0, -1].argmax())

        return step

    return begin


def work(side: str, directory: Path, num_tokens: int) -> None:
    """Worker: for each line read, measure once and print `prefill_s decode_s`."""
    begin = {"ours": ours, "theirs": theirs}[side](directory)
    ids = [int(i) % CONFIG["vocab_size"] for i in range(7, 7 + 31 * num_tokens, 31)]
    begin()(ids[:4])  # what is made once is made here
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        begin()(ids)
        prefill_s = time.perf_counter() - started
        step = begin()
        token = step(ids[:32])
        started = time.perf_counter()
        for _ in range(DECODED_TOKENS):
            token = step([token])
        print(prefill_s, time.perf_counter() - started, flush=True)


def measure(rounds: int, num_tokens: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_packed(Path(folder), CONFIG, make_weights(CONFIG, 0), lambda path: Quantization(64, 4))
        command = [sys.executable, "-m", "benchmarks.stock_mlx_lm", "--folder", folder,
                   "--tokens", str(num_tokens), "--worker"]  # fmt: skip
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        workers: dict[str, Any] = {
            "ours": subprocess.Popen([*command, "ours"], env=ENGINE_ENVIRONMENT | os.environ, **pipes),
            "theirs": subprocess.Popen([*command, "theirs"], **pipes),
        }
        for worker in workers.values():
            assert worker.stdout.readline() == "ready\n", "a worker did not start"
        seen: dict[str, list[tuple[float, ...]]] = {side: [] for side in workers}
        for _ in range(rounds):
            for side, worker in workers.items():
                worker.stdin.write("go\n")
                worker.stdin.flush()
                seen[side].append(tuple(float(part) for part in worker.stdout.readline().split()))
        for worker in workers.values():
            worker.communicate()
    report(seen, rounds, num_tokens)


def report(seen: dict[str, list[tuple[float, ...]]], rounds: int, num_tokens: int) -> None:
    table = Table(title=f"tokens/s, median of {rounds} (lowest to highest), rounds alternating")
    for column in ("", "ours", "stock mlx_lm", "ratio"):
        table.add_column(column)
    for place, (name, tokens) in enumerate(
        [(f"prefill of {num_tokens}", num_tokens), ("decode, one token at a time", DECODED_TOKENS)]
    ):
        rates = {side: sorted(tokens / times[place] for times in rows) for side, rows in seen.items()}
        medians = {side: statistics.median(values) for side, values in rates.items()}
        cells = [f"{medians[s]:.1f} ({rates[s][0]:.1f} to {rates[s][-1]:.1f})" for s in ("ours", "theirs")]
        table.add_row(name, *cells, f"{medians['ours'] / medians['theirs']:.1f}x")
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each side is measured")
    parser.add_argument("--tokens", type=int, default=512, help="of the prompt")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.folder, options.tokens)
    else:
        measure(options.rounds, options.tokens)


if __name__ == "__main__":
    main()

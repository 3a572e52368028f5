"""One program each, in a process of its own: reads a prompt, then writes, and says how long both took.

All load one checkpoint of four bits with every layer full, because stock mlx-lm cannot load shared ones;
transformers holds the same random weights unpacked, in float32.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.tiny_glm import TINY

CONFIG: dict[str, Any] = TINY | {
    "vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 512,
    "moe_intermediate_size": 128, "first_k_dense_replace": 1, "max_position_embeddings": 16_384,
    "mlp_layer_types": ["dense"] + ["sparse"] * 7, "n_routed_experts": 64, "num_experts_per_tok": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 128, "kv_lora_rank": 64,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "index_n_heads": 16,
    "index_head_dim": 64, "index_topk": 2048, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
}  # fmt: skip
SEED, SHARE, CHUNK = 0, 4, 64
EXPERTS = CONFIG["n_routed_experts"]
Step = Callable[[list[int]], int]
Begin = Callable[[], Step]


def ours(folder: Path, slots: int = EXPERTS) -> Begin:
    """glmserve, every expert in memory."""
    import mlx.core as mx

    from models.arithmetic import choose_arithmetic
    from models.attention.attention import Span
    from models.loading.loading import load_model, open_checkpoint
    from streaming.store import ExpertStore

    checkpoint, arithmetic = open_checkpoint(folder), choose_arithmetic()
    store = ExpertStore(checkpoint.experts, slots, float_dtype=arithmetic.dtype, ring_slots=EXPERTS // 4)
    if slots == EXPERTS:
        store.load_all()
    model = load_model(checkpoint, arithmetic, store)

    def begin() -> Step:
        cache = model.make_cache()

        def step(ids: list[int]) -> int:
            hidden = model(mx.array(ids), [Span(cache, 0, len(ids))])
            return int(model.logits(hidden[-1:]).argmax())

        return step

    return begin


def ours_streamed(folder: Path) -> Begin:
    """glmserve with a quarter of the experts in memory, the others read past the page cache."""
    return ours(folder, EXPERTS // SHARE)


def mlx_lm(folder: Path) -> Begin:
    """Stock mlx-lm, by its own loader and prompt cache."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model as load_stock

    model, _ = load_stock(folder)

    def begin() -> Step:
        cache = make_prompt_cache(model)
        return lambda ids: int(model(mx.array([ids]), cache=cache)[0, -1].argmax())

    return begin


def nunspark(folder: Path, share: int = 1) -> Begin:
    """nunspark from PyPI by its packer and its engine; it reads through the page cache."""
    import mlx.core as mx
    from nunspark.engine import StreamingEngine
    from nunspark.kv_store import KVStore
    from nunspark.packer import pack

    packed = folder.parent / f"nunspark-{share}"
    manifest = pack(folder, packed)
    size = sum(path.stat().st_size for path in packed.rglob("*") if path.is_file())
    engine = StreamingEngine(packed, manifest, budget_bytes=2 * size // share, wire_limit=False)

    def begin() -> Step:
        kv = KVStore(tempfile.mkdtemp(dir=folder.parent), 10**12, cache_kinds=engine.cache_kinds)
        return lambda ids: int(engine.forward(mx.array([ids]), kv=kv)[0, -1].argmax())

    return begin


def transformers(folder: Path) -> Begin:
    """The reference, eager and in float32: what all others must agree with."""
    import torch

    from tests.models.make_golden import reference_model
    from tests.tiny_glm import make_weights

    model = reference_model(CONFIG, make_weights(CONFIG, SEED))

    def begin() -> Step:
        past: list[Any] = [None]

        def step(ids: list[int]) -> int:
            with torch.no_grad():
                out = model(torch.tensor([ids]), cache=past[0], use_cache=True)
            past[0] = out.cache
            return int(out.logits[0, -1].argmax())

        return step

    return begin


def nunspark_streamed(folder: Path) -> Begin:
    """nunspark with a budget of a quarter of its files, of which experts have nine tenths."""
    return nunspark(folder, 2 * SHARE)


SIDES: dict[str, Callable[[Path], Begin]] = {
    "glmserve": ours, "mlx-lm": mlx_lm, "nunspark": nunspark, "transformers": transformers,
    "glmserve, a quarter": ours_streamed, "nunspark, a quarter": nunspark_streamed,
}  # fmt: skip


def work(side: str, folder: Path) -> None:
    """For each line `PROMPT CHUNK WRITTEN LIMIT`: tokens read, their seconds, tokens written, their seconds.

    Reading ends after LIMIT seconds, behind the chunk that is under way then.
    """
    begin = SIDES[side](folder)
    begin()([5, 6, 7, 8])  # what is made once is made here
    print("ready", flush=True)
    for line in sys.stdin:
        count, chunk, written, limit_s = map(int, line.split())
        ids = [int(i) % CONFIG["vocab_size"] for i in range(7, 7 + 31 * count, 31)]
        step, read, token, started = begin(), 0, 0, time.perf_counter()
        while read < count and time.perf_counter() - started < limit_s:
            token = step(ids[read : read + chunk])
            read = min(count, read + chunk)
        read_s, started = time.perf_counter() - started, time.perf_counter()
        for _ in range(written):
            token = step([token])
        print(read, read_s, written, time.perf_counter() - started, flush=True)


class Worker:
    """The process of one side."""

    def __init__(self, side: str, folder: Path, nunspark_path: str) -> None:
        environment = dict(os.environ)
        if side.startswith("glmserve"):
            from server.link.child import engine_variables

            environment = engine_variables() | environment
        if nunspark_path:
            environment["PYTHONPATH"] = nunspark_path
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peers", "--worker", side, "--folder", str(folder)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.is_ready = any(line == "ready\n" for line in self._process.stdout)

    def ask(self, prompt: int, chunk: int, written: int, limit_s: int) -> tuple[float, float]:
        """Tokens a second, read and written."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{prompt} {chunk} {written} {limit_s}\n")
        self._process.stdin.flush()
        read, read_s, wrote, wrote_s = map(float, self._process.stdout.readline().split())
        return read / read_s, wrote / wrote_s if wrote else 0.0

    def close(self) -> None:
        """Ends it."""
        self._process.communicate()

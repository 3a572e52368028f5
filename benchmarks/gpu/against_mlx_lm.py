"""Ours against stock mlx-lm on one checkpoint: `python -m benchmarks.gpu.against_mlx_lm FOLDER [--rounds 3]`.

Each side is a process of its own, ours in the engine's environment; they warm up together, then take turns.
Every layer of the checkpoint has an indexer, or mlx-lm does not load it. `--only ours` measures one side,
where two do not fit.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from server.link.child import engine_variables

SIDES = ("ours", "mlx-lm")
MLX_LM_CHUNK = 2048  # rows of a prompt that mlx-lm takes at once; a quarter where only decode is measured
CACHE_BYTES = 4 * 2**30  # of freed buffers that a side keeps: both share the card
# A prompt of so many tokens, whether its time counts -> its cache, the likeliest next token.
Run = Callable[[int, bool], tuple[Any, int]]
Step = Callable[[Any, int], int]


def tokens(count: int) -> list[int]:
    return [(17 + 7919 * i) % 150000 for i in range(count)]


def open_ours(folder: Path) -> tuple[Run, Step]:
    from models.arithmetic import choose_arithmetic
    from models.attention.attention import Span
    from models.loading.loading import load_model, open_checkpoint
    from streaming.store import ExpertStore

    checkpoint, arithmetic = open_checkpoint(folder), choose_arithmetic()
    store = ExpertStore(checkpoint.experts, checkpoint.args.n_routed_experts, float_dtype=arithmetic.dtype)
    store.load_all()
    model = load_model(checkpoint, arithmetic, store)

    def run(count: int, is_timed: bool) -> tuple[Any, int]:
        cache = model.make_cache()
        hidden = model(mx.array(tokens(count)), [Span(cache, 0, count)])
        return cache, int(model.logits(hidden[-1:]).argmax())

    def step(cache: Any, token: int) -> int:
        return int(model.logits(model(mx.array([token]), [Span(cache, 0, 1)])).argmax())

    return run, step


def open_theirs(folder: Path) -> tuple[Run, Step]:
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    mx.eval(model.parameters())

    def run(count: int, is_timed: bool) -> tuple[Any, int]:
        cache, ids, out = make_prompt_cache(model), tokens(count), mx.zeros((1, 1, 1))
        chunk = MLX_LM_CHUNK if is_timed else MLX_LM_CHUNK // 4
        for start in range(0, count, chunk):
            out = model(mx.array([ids[start : start + chunk]]), cache=cache)
            mx.eval([rows.state for rows in cache])
        return cache, int(out[0, -1].argmax())

    def step(cache: Any, token: int) -> int:
        return int(model(mx.array([[token]]), cache=cache)[0, -1].argmax())

    return run, step


def serve(side: str, options: argparse.Namespace) -> None:
    """One side: a line of figures for each line that comes in."""
    mx.set_cache_limit(CACHE_BYTES)
    run, step = {"ours": open_ours, "mlx-lm": open_theirs}[side](options.folder)
    print("ready", flush=True)
    for _ in sys.stdin:
        found = {}
        for count in options.prompts:
            started = time.perf_counter()
            run(count, True)
            found[f"prefill of {count}, tokens/s"] = count / (time.perf_counter() - started)
        for count in options.contexts:
            cache, token = run(count, False)
            for _ in range(4):
                token = step(cache, token)
            started = time.perf_counter()
            for _ in range(options.decode):
                token = step(cache, token)
            found[f"decode at {count}, tokens/s"] = options.decode / (time.perf_counter() - started)
            del cache
        found["peak memory, GB"] = mx.get_peak_memory() / 1e9
        print(json.dumps(found), flush=True)


def compare(options: argparse.Namespace) -> None:
    """Both sides start and warm up at once; then they take turns."""
    sides = [options.only] if options.only else list(SIDES)
    workers = {}
    for side in sides:
        command = [sys.executable, "-m", "benchmarks.gpu.against_mlx_lm", *sys.argv[1:], "--side", side]
        environment = dict(os.environ) if side == "mlx-lm" else engine_variables() | os.environ
        workers[side] = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    for worker in workers.values():
        _send(worker)
    for side, worker in workers.items():
        _line(worker)
        print(f"{side}: warm, {_line(worker)}", flush=True)
    seen: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side, worker in workers.items():
            _send(worker)
            seen[side].append(json.loads(_line(worker)))
            print(side, {name: round(value, 1) for name, value in seen[side][-1].items()}, flush=True)
    for worker in workers.values():
        worker.communicate()
    for name in seen[sides[0]][0]:
        columns = [[found[name] for found in seen[side]] for side in sides]
        cells = [f"{statistics.median(c):.1f} ({min(c):.1f} to {max(c):.1f})" for c in columns]
        ratio = statistics.median(columns[0]) / statistics.median(columns[-1])
        print(f"{name:26} {'  '.join(map(' '.join, zip(sides, cells, strict=True)))}  ratio {ratio:.2f}")


def _send(worker: "subprocess.Popen[str]") -> None:
    assert worker.stdin is not None, "a worker was opened with pipes"
    worker.stdin.write("go\n")
    worker.stdin.flush()


def _line(worker: "subprocess.Popen[str]") -> str:
    assert worker.stdout is not None, "a worker was opened with pipes"
    if not (line := worker.stdout.readline()):
        raise SystemExit("a side ended early; its error stands above")
    return line


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=_numbers, default=[512, 2048, 8192])
    parser.add_argument("--contexts", type=_numbers, default=[16, 4096, 16384])
    parser.add_argument("--decode", type=int, default=64, help="tokens decoded at each context")
    parser.add_argument("--only", choices=SIDES)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options.side, options)
    else:
        compare(options)


if __name__ == "__main__":
    main()

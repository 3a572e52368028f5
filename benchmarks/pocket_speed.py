"""Pocket's speed on this machine, resident and streamed: `python -m benchmarks.pocket_speed [--rounds 5]`.

The process starts itself again with the variables that the engine process is given.
"""

import argparse
import statistics
import time

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from benchmarks.rig.drive import use_engine_environment
from models.arithmetic import choose_arithmetic
from models.attention.attention import Span
from server.commands.checkpoint import POCKET
from tests.checkpoints import Opened, open_model

PROMPT_TOKENS, DECODED_TOKENS = 512, 64


def measure(opened: Opened) -> tuple[float, float]:
    """Tokens/s of one prompt, and of decoding after it."""
    model, cache = opened.model, opened.model.make_cache()
    ids = [(17 + 31 * i) % model.args.vocab_size for i in range(PROMPT_TOKENS)]
    started = time.perf_counter()
    token = int(model.logits(model(mx.array(ids), [Span(cache, 0, len(ids))])[-1:]).argmax())
    prefill_s, started = time.perf_counter() - started, time.perf_counter()
    for _ in range(DECODED_TOKENS):
        token = int(model.logits(model(mx.array([token]), [Span(cache, 0, 1)])).argmax())
    return PROMPT_TOKENS / prefill_s, DECODED_TOKENS / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="how often each side is measured")
    rounds = parser.parse_args().rounds
    use_engine_environment("benchmarks.pocket_speed")
    arithmetic = choose_arithmetic()
    sides = {
        f"{slots or 'all'} experts in memory": open_model(POCKET, slots, arithmetic)
        for slots in (None, 32, 16)
    }
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds + 1):  # the first round makes what is made once, and is left out
        for name, opened in sides.items():
            seen[name].append(measure(opened))
    table = Table(title=f"Pocket, {arithmetic.name}, tokens/s, median of {rounds} (lowest to highest)")
    for column in ("", f"prefill of {PROMPT_TOKENS}", f"decode of {DECODED_TOKENS}"):
        table.add_column(column)
    for name, rows in seen.items():
        columns = [sorted(column) for column in zip(*rows[1:], strict=True)]
        table.add_row(name, *(f"{statistics.median(c):.1f} ({c[0]:.1f} to {c[-1]:.1f})" for c in columns))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

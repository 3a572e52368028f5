"""Products, attention and sums in MLX and as `Arithmetic` forms them: `python -m benchmarks.arithmetic`."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from models.arithmetic import CPU, Dense
from models.attention.selection import causal_mask

SHAPES = ((256, 1024), (1024, 2048))
ROWS = (1, 4, 8, 32, 128)
ROUNDS = 5
LATENT = 96  # values of a key


def median_ms(compute: Callable[[], mx.array]) -> float:
    mx.eval(compute())
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        mx.eval(compute())
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def measure(inputs: int, outputs: int, rows: int) -> tuple[float, float, float]:
    """Milliseconds of one product, 4 bits in groups of 64: packed, unpacked for MLX, unpacked for NumPy."""
    packed, scales, biases = mx.quantize(mx.random.normal((outputs, inputs)), 64, 4)
    x = mx.random.normal((rows, inputs))
    mx.eval(packed, scales, biases, x)
    always = replace(CPU, max_packed_rows=0)
    return (
        median_ms(lambda: mx.quantized_matmul(x, packed, scales, biases, True, 64, 4)),
        median_ms(lambda: x @ mx.dequantize(packed, scales, biases, 64, 4).T),
        median_ms(lambda: always.product(x, Dense(mx.dequantize(packed, scales, biases, 64, 4)))),
    )


def elementwise(rows: int, width: int, heads: int = 8) -> dict[str, dict[str, float]]:
    """Milliseconds an element of what lies between products, in MLX and as the CPU's arithmetic does."""
    q, keys = mx.random.normal((heads, rows, LATENT)), mx.random.normal((width, LATENT))
    seen, chosen = causal_mask(width - rows, rows, width), np.arange(0, 2 * rows, 2)
    out, added = mx.zeros((4 * rows, width)), mx.random.normal((rows, width))
    mx.eval(q, keys, seen, out, added)
    times = {}
    for name, arithmetic in (("mlx", replace(CPU, uses_numpy=False)), ("ours", CPU)):
        times[name] = {
            "attention under a mask": median_ms(partial(arithmetic.attended, q, keys, keys, seen))
            / (heads * rows * width),
            "rows added to some": median_ms(partial(arithmetic.add_rows, out, chosen, added)) / added.size,
        }
    return times


def print_elementwise() -> None:
    table = Table(title=f"nanoseconds an element, median of {ROUNDS}")
    for column in ("rows x width", "what", "MLX", "as the CPU's arithmetic"):
        table.add_column(column)
    for rows, width in ((64, 1024), (256, 256)):
        times = elementwise(rows, width)
        for what in times["mlx"]:
            cells = [f"{times[side][what] * 1e6:.2f}" for side in ("mlx", "ours")]
            table.add_row(f"{rows} x {width}", what, *cells)
    Console().print(table)


def main() -> None:
    table = Table(title=f"milliseconds, median of {ROUNDS}")
    for column in ("in x out", "rows", "packed", "unpacked, MLX", "unpacked, NumPy"):
        table.add_column(column)
    for inputs, outputs in SHAPES:
        for rows in ROWS:
            times = measure(inputs, outputs, rows)
            table.add_row(f"{inputs} x {outputs}", str(rows), *(f"{ms:.2f}" for ms in times))
    Console(width=100).print(table)
    print_elementwise()


if __name__ == "__main__":
    main()

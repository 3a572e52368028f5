"""Packed or unpacked products on this machine, by rows: `python -m benchmarks.arithmetic`.

Run it with the BLAS that the engine gets: LD_PRELOAD=libopenblas.so.0 on Linux CPU.
"""

import statistics
import time
from collections.abc import Callable

import mlx.core as mx
from rich.console import Console
from rich.table import Table

SHAPES = ((256, 1024), (1024, 2048))
ROWS = (1, 4, 8, 32, 128)
ROUNDS = 5


def median_ms(compute: Callable[[], mx.array]) -> float:
    mx.eval(compute())
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        mx.eval(compute())
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def measure(inputs: int, outputs: int, rows: int) -> tuple[float, float]:
    """Milliseconds of one product, packed and unpacked, 4 bits in groups of 64."""
    packed, scales, biases = mx.quantize(mx.random.normal((outputs, inputs)), 64, 4)
    x = mx.random.normal((rows, inputs))
    mx.eval(packed, scales, biases, x)
    return (
        median_ms(lambda: mx.quantized_matmul(x, packed, scales, biases, True, 64, 4)),
        median_ms(lambda: x @ mx.dequantize(packed, scales, biases, 64, 4).T),
    )


def main() -> None:
    table = Table(title=f"milliseconds, median of {ROUNDS}")
    for column in ("in x out", "rows", "packed", "unpacked"):
        table.add_column(column)
    for inputs, outputs in SHAPES:
        for rows in ROWS:
            packed, unpacked = measure(inputs, outputs, rows)
            table.add_row(f"{inputs} x {outputs}", str(rows), f"{packed:.2f}", f"{unpacked:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

"""What one true-shape layer costs here, and each choice that was made elsewhere against its alternative.

Weights are random bytes: the time is that of any others. Sides are interleaved, medians with their spread.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np

from config.settings import Settings
from config.sizes import format_size, physical_memory_bytes
from models.arithmetic import Quantization, choose_arithmetic
from models.attention.selection import kth_by_bits, kth_by_numpy, kth_by_partition
from models.experts.experts import BankWeight
from models.in_flight import InFlight
from server.commands.doctor.finding import Finding, Verdict
from server.engine.apple import DARWIN, KeepWarm, make_heater
from streaming.disk.disk import DirectDisk
from streaming.disk.probe import probe_disk
from streaming.files.headers import read_headers
from streaming.files.index import PROJECTIONS, ExpertIndex
from streaming.store import ExpertStore

HIDDEN, WIDTH, EXPERTS, LATENT, HEADS, TOPK = 6144, 2048, 4, 576, 64, 2048
PACKED = Quantization(64, 3)
ROUNDS = 3
LAYER = "model.layers.3.mlp.switch_mlp"

Sides = Mapping[str, Callable[[], object]]


def random_experts() -> dict[str, mx.array]:
    """A few experts of GLM-5.2's shape at 3 bits, as a bank has them."""
    rng, parts = np.random.default_rng(0), {}
    for name in PROJECTIONS:
        rows, width = (HIDDEN, WIDTH) if name == "down_proj" else (WIDTH, HIDDEN)
        words = rng.integers(0, 2**32, (EXPERTS, rows, width * PACKED.bits // 32), dtype=np.uint32)
        parts[f"{name}.weight"] = mx.array(words)
        for kind in ("scales", "biases"):
            values = rng.standard_normal((EXPERTS, rows, width // PACKED.group_size)).astype(np.float32) / 300
            parts[f"{name}.{kind}"] = mx.array(values).astype(mx.bfloat16)
    mx.eval(parts)
    return parts


def compare(what: str, follows: str, sides: Sides) -> Finding:
    """Times the sides by turns. The first is what the engine does on this backend."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):
        for name, run in sides.items():
            begun = time.perf_counter()
            run()
            if turn:  # the first warms up
                times[name].append(1e3 * (time.perf_counter() - begun))
    ours, *others = times
    lost = [name for name in others if max(times[name]) < min(times[ours])]
    text = ", ".join(f"{name} {median(t):.2f} ms ({min(t):.2f} to {max(t):.2f})" for name, t in times.items())
    advice = f"; {lost[0]} is faster here: {follows}" if lost else ""
    verdict = Verdict.NOTE if lost else Verdict.GOOD
    return Finding(verdict, f"{what}: {text}{advice}", {name: list(t) for name, t in times.items()})


def check_eval(settings: Settings) -> Iterator[Finding]:
    """What waiting for the device costs."""
    one = mx.array([1.0])
    times = []
    for _ in range(200):
        begun = time.perf_counter()
        mx.eval(one + 1)
        times.append(1e6 * (time.perf_counter() - begun))
    yield Finding(
        Verdict.GOOD,
        f"a wait takes {median(times):.0f} microseconds (nine in ten below {sorted(times)[180]:.0f})",
        {"median_us": median(times)},
    )


def check_layer(settings: Settings) -> Iterator[Finding]:
    """Experts of one layer: decode's pairs, a sweep's rows, and packed against unpacked weights."""
    arithmetic = choose_arithmetic()
    parts = {
        name: array.astype(arithmetic.dtype) if "weight" not in name else array
        for name, array in random_experts().items()
    }
    gate, up, down = (BankWeight(parts, name, PACKED) for name in PROJECTIONS)
    first = [BankWeight(parts, name, PACKED, 0) for name in PROJECTIONS]
    one, many = (mx.random.normal((rows, HIDDEN)).astype(arithmetic.dtype) for rows in (1, 48))
    slots = mx.arange(EXPERTS, dtype=mx.int32)[None]
    yield compare(
        "a token's experts", "",
        {f"{EXPERTS} experts": lambda: mx.eval(arithmetic.pairs(one, gate, up, down, slots))},
    )  # fmt: skip
    rows_ms = {"one expert": lambda: mx.eval(arithmetic.mlp(many, *first))}
    yield compare("48 rows of a sweep", "", rows_ms)
    packed = arithmetic.max_packed_rows is None
    other = replace(arithmetic, max_packed_rows=8 if packed else None, uses_numpy=False)
    if arithmetic.uses_numpy:  # MLX's CPU kernels take a hundred times as long
        return
    yield compare(
        "its weights", "max_packed_rows in models/arithmetic.py",
        {
            "packed" if packed else "unpacked": lambda: mx.eval(arithmetic.mlp(many, *first)),
            "unpacked" if packed else "packed": lambda: mx.eval(other.mlp(many, *first)),
        },
    )  # fmt: skip


def check_attention(settings: Settings) -> Iterator[Finding]:
    """Tiles, gathering, pieces in flight and the selection of keys, at the widths of GLM-5.2."""
    arithmetic, dtype = choose_arithmetic(), choose_arithmetic().dtype
    num_keys, rows = arithmetic.gather_from * TOPK, 4 if arithmetic.uses_numpy else 16
    keys = mx.random.normal((num_keys, LATENT)).astype(dtype)
    queries = mx.random.normal((HEADS, rows, LATENT)).astype(dtype)
    seen = mx.arange(num_keys)[None] < mx.arange(num_keys - rows, num_keys)[:, None]
    positions = mx.broadcast_to(mx.arange(0, num_keys, arithmetic.gather_from), (rows, TOPK))
    mx.eval(keys, queries, seen, positions)

    def masked(start: int = 0, stop: int = rows) -> mx.array:
        values = keys[:, :512]
        return arithmetic.attended(queries[:, start:stop], keys, values, seen[start:stop])

    def gathered() -> mx.array:
        chosen = keys[positions]
        return arithmetic.attended(queries.swapaxes(0, 1), chosen, chosen, None)

    def pieces(height: int, depth: int) -> None:
        in_flight, outs = InFlight(depth), []
        for start in range(0, rows, height):
            outs.append(masked(start, start + height))
            in_flight.launch(outs[-1])
        mx.eval(outs)

    yield compare(
        f"{rows} rows against {num_keys} keys", "gather_from in models/arithmetic.py",
        {"gathered": lambda: mx.eval(gathered()), "masked": lambda: mx.eval(masked())},
    )  # fmt: skip
    yield compare(
        "tiles of rows", "tile_elements in models/arithmetic.py",
        {str(height): partial(pieces, height, 1) for height in (rows, rows // 2, rows // 4)},
    )  # fmt: skip
    depth = arithmetic.pieces_in_flight
    sides = {
        f"{depth} in flight": lambda: pieces(2, depth),
        "other": lambda: pieces(2, 3 if depth == 1 else 1),
    }
    yield compare("four tiles", "pieces_in_flight in models/arithmetic.py", sides)
    scores = mx.random.normal((21, 14_336))
    mx.eval(scores)
    ways = {"partition": kth_by_partition, "bits": kth_by_bits, "numpy": kth_by_numpy}
    timed = {name: lambda way=way: mx.eval(way(scores, TOPK)) for name, way in ways.items()}
    yield compare(
        "selecting 2,048 keys", "selects_by_bits in models/arithmetic.py",
        {"as chosen": lambda: mx.eval(arithmetic.kth_best(scores, TOPK)), **timed},
    )  # fmt: skip


def check_disk(settings: Settings) -> Iterator[Finding]:
    """The disk's curve, and reading into slots against reading through buffers, from a file made for it."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        tensors = {f"{LAYER}.{name}": array for name, array in random_experts().items()}
        mx.save_safetensors(str(Path(folder) / "model.safetensors"), tensors, {"format": "mlx"})
        index = ExpertIndex.from_entries(read_headers(Path(folder)))
        probe = probe_disk(DirectDisk(), index, 16, 128 * 2**20)
        rates = {str(depth): rate for depth, rate in probe.rates.items()}
        text = ", ".join(f"{format_size(rate)}/s with {depth}" for depth, rate in rates.items())
        yield Finding(Verdict.GOOD, f"experts are read at {text}", rates)
        store = ExpertStore(index, 1, float_dtype=choose_arithmetic().dtype, looks_ahead=False)

        def read(is_straight: bool) -> None:
            store.read_straight(is_straight)
            for expert in range(EXPERTS):
                store.acquire(index.layers[0], [expert])

        if store.fills_in_place:
            yield compare(
                f"{EXPERTS} experts of a file as MLX writes it", "--straight-reads off, unless auto found it",
                {"into slots": lambda: read(True), "through buffers": lambda: read(False)},
            )  # fmt: skip
        store.close()


def check_limits(settings: Settings) -> Iterator[Finding]:
    """What the system lets MLX have, and what is tried by the server itself or not at all."""
    physical = physical_memory_bytes()
    device = mx.device_info() if choose_arithmetic().name == "metal" else {}
    most = int(device.get("max_recommended_working_set_size", physical))
    buffer = int(device.get("max_buffer_length", physical))
    figures = {"physical": physical, "working_set": most, "max_buffer": buffer}
    text = f"MLX may use {format_size(most)} of {format_size(physical)}, {format_size(buffer)} in one buffer"
    yield Finding(Verdict.GOOD, text, figures)
    yield Finding(
        Verdict.NOTE,
        "lookahead is tried by the server on live steps (--lookahead auto); wiring is not tried, because "
        "MLX's fault #3186 can stop the machine",
    )


def check_keep_warm(settings: Settings) -> Iterator[Finding]:
    """Whether a small product between steps keeps a GPU's clock up; on Apple silicon only."""
    if sys.platform != DARWIN:
        yield Finding(Verdict.NOTE, "keeping the GPU warm is not tried: this is no Mac")
        return
    warm, matrix = KeepWarm(make_heater), mx.ones((2048, 2048))

    def steps(is_warmed: bool) -> None:
        for _ in range(20):
            if is_warmed:
                warm.touch()
            time.sleep(0.005)
            mx.eval(matrix @ matrix)

    cold = compare("a step after 5 ms of rest", "", {"cold": lambda: steps(False)})
    yield cold
    yield compare("the same kept warm", "", {"warm": lambda: steps(True)})

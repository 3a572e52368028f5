"""What the engine's process is given and starts: `python -m benchmarks.target.engine_process`. No weights.

Counted at GLM-5.2's shapes (files of holes, 100 GB): what TF32 would do to the router's choices, what wiring
covers, what MLX may keep of what a step frees, into how many command buffers a layer's gathers fall by the
rule of MLX's source, and what starting `caffeinate` costs a large process. Nothing was run on Metal.
"""

import argparse
import mmap
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from config.plan import MemoryPlan, make_plan
from models.arithmetic import METAL
from models.loading.loading import make_geometry, open_checkpoint
from models.loading.public_formats import GLM_5_2, PUBLIC_FORMATS, write_hollow
from server.link.child import COMMAND_BUFFERS, engine_variables
from server.link.messages import EngineConfig
from streaming.files.index import PROJECTIONS

BUDGET, CONTEXT, PHYSICAL = 100 * 10**9, 32_768, 128 * 2**30
ROWS, K = 2048, GLM_5_2["num_experts_per_tok"]
MLX_LIMITS = (50, 50)  # operations and MB of a command buffer that MLX takes on the largest Macs
PIECE_BYTES = 32 * 2**20
NOTHING = ["/bin/true"]


def plan_and_gathers() -> tuple[MemoryPlan, list[int]]:
    """The plan of the public 3.5 bpw checkpoint, and the bytes that each of a layer's three gathers names."""
    with tempfile.TemporaryDirectory() as parent:
        checkpoint = open_checkpoint(write_hollow(Path(parent), PUBLIC_FORMATS[0]))
        plan = make_plan(make_geometry(checkpoint, METAL, CONTEXT), BUDGET, CONTEXT, physical_bytes=PHYSICAL)
        parts = checkpoint.experts.parts(checkpoint.experts.layers[0])
    named = dict.fromkeys(PROJECTIONS, 0)
    for part in parts:
        named[part.name.partition(".")[0]] += plan.slots_per_layer[0] * part.nbytes
    return plan, list(named.values())


def tf32(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounded to ten bits behind the point, as TF32 rounds both sides of a product."""
    bits = values.view(np.uint32)
    rounded: NDArray[np.float32] = ((bits + 0xFFF + (bits >> 13 & 1)) & ~np.uint32(0x1FFF)).view(np.float32)
    return rounded


def other_choices() -> float:
    """Share of random rows whose K experts are others where the router's product is rounded to TF32."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, GLM_5_2["hidden_size"]), np.float32)
    router = rng.standard_normal((GLM_5_2["n_routed_experts"], GLM_5_2["hidden_size"]), np.float32)
    exact, rounded = (
        np.sort(np.argpartition(-scores, K - 1, axis=-1)[:, :K], axis=-1)
        for scores in (x @ router.T, tf32(x) @ tf32(router).T)
    )
    return float((exact != rounded).any(axis=-1).mean())


def had_again(limit: int, total: int) -> int:
    """Bytes that MLX asks the system for when a step's arrays, made and freed once, are made again."""
    mx.clear_cache()
    mx.set_cache_limit(limit)
    mx.eval([mx.full(PIECE_BYTES // 4, number, mx.float32) for number in range(total // PIECE_BYTES)])
    kept = mx.get_cache_memory()
    mx.clear_cache()
    return max(0, total // PIECE_BYTES * PIECE_BYTES - kept)


def command_buffers(operations: Sequence[int], most_ops: int, most_mb: int) -> int:
    """Command buffers of operations that name so many bytes each, ended by MLX's rule."""
    count = ops = nbytes = 0
    for named in operations:
        ops, nbytes = ops + 1, nbytes + named
        if ops > most_ops or nbytes >> 20 > most_mb:
            count, ops, nbytes = count + 1, 0, 0
    return count + (ops > 0)


def starting_ms(rounds: int, is_forked: bool) -> list[float]:
    """Milliseconds that this process stands still to start another, ascending."""
    spent = []
    for _ in range(rounds):
        begun = time.perf_counter()
        if is_forked and (child := os.fork()) == 0:
            os.execv(NOTHING[0], NOTHING)
        process = None if is_forked else subprocess.Popen(NOTHING, close_fds=False)
        spent.append(1e3 * (time.perf_counter() - begun))
        process.wait() if process else os.waitpid(child, 0)
    return sorted(spent)


def tell_limits(plan: MemoryPlan, gathers: Sequence[int]) -> None:
    """Wiring, MLX's buffer cache, and command buffers."""
    some, step = plan.lines["trunk"] + plan.lines["experts"], plan.lines["workspace"]
    print(f"wired, before: {some / 1e9:.1f} GB (trunk and slots), always")
    state = "on" if EngineConfig.wires_memory else "off"
    print(f"  after: {state} unless --wire is given, then {plan.buffer_bytes / 1e9:.1f} GB (all of MLX's)")
    print(f"freed buffers that MLX keeps of the {step / 1e6:.0f} MB of a step")
    for name, limit in (("before", plan.lines["MLX buffer cache"]), ("after", plan.cache_limit_bytes)):
        again = had_again(limit, step)
        print(f"  {name}: {limit / 1e6:.0f} MB; asked for again of the system: {again / 1e6:.0f} MB")
    most = [int(COMMAND_BUFFERS[name]) for name in ("MLX_MAX_OPS_PER_BUFFER", "MLX_MAX_MB_PER_BUFFER")]
    before, after = command_buffers(gathers, *MLX_LIMITS), command_buffers(gathers, *most)
    print(
        f"command buffers of a layer's gathers, {sum(gathers) / 1e9:.2f} GB: {before} before, {after} after"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=int, default=4, help="held while another process is started")
    parser.add_argument("--rounds", type=int, default=9, help="of starting one, each way")
    options = parser.parse_args()
    print(f"TF32: {other_choices():.1%} of {ROWS} rows go to other experts with it")
    name = "MLX_ENABLE_TF32"
    print(f"  before: {name} not set; after: {engine_variables()[name]}")
    tell_limits(*plan_and_gathers())
    held = mmap.mmap(-1, options.gigabytes * 10**9, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    np.frombuffer(held, np.uint8)[:: mmap.PAGESIZE] = 1
    print(
        f"starting a process out of one of {options.gigabytes} GB in pages of {mmap.PAGESIZE} bytes, ms, "
        "median (least to most)"
    )
    for name, is_forked in (("before, a fork", True), ("after, posix_spawn", False)):
        spent = starting_ms(options.rounds, is_forked)
        print(f"  {name}: {median(spent):.2f} ({spent[0]:.2f} to {spent[-1]:.2f})")


if __name__ == "__main__":
    main()

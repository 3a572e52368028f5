"""What `glmserve align` gives: `python -m benchmarks.target.align_gain --folder DIR` (needs 5 GB there).

Writes a checkpoint by MLX's own saver, with experts of GLM-5.2's shape at 3 bits. Prints the share of bytes
that go straight into slots, the rate and the CPU time of an expert's read, before and after, each in the
engine's environment and without its pages of 2 MB; and kills the command at random moments, after each of
which every tensor must be right through the committed index.
"""

import argparse
import hashlib
import json
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from models.loading.loading import open_checkpoint
from server.link.child import ENGINE_ENVIRONMENT, engine_environment
from streaming.banks import BankMaker
from streaming.disk.reads import aligned_range, scatter
from streaming.files.headers import read_headers
from streaming.files.index import ExpertIndex
from streaming.files.read_plan import plan_runs
from streaming.store import ExpertStore
from tests.tiny_glm import TINY, save_config, tensor_shapes

HIDDEN, WIDTH, BITS, GROUP = 6144, 2048, 3, 64
PAGE = 4096


def make_checkpoint(folder: Path, experts: int, layers: int) -> None:
    """Experts of random bytes, a trunk of zeros."""
    config: dict[str, Any] = TINY | {
        "hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "n_routed_experts": experts,
        "num_hidden_layers": 3 + layers, "mlp_layer_types": ["dense"] * 3 + ["sparse"] * layers,
    }  # fmt: skip
    folder.mkdir(parents=True)
    save_config(folder, config | {"quantization": {"group_size": GROUP, "bits": BITS}})
    rng = np.random.default_rng(0)
    tensors = {
        name: mx.zeros(shape, dtype=mx.float32 if "gate." in name else mx.bfloat16)
        for name, shape in tensor_shapes(config)
        if ".experts." not in name
    }
    for layer in range(3, 3 + layers):
        for name in ("gate_proj", "up_proj", "down_proj"):
            rows, width = (HIDDEN, WIDTH) if name == "down_proj" else (WIDTH, HIDDEN)
            path = f"model.layers.{layer}.mlp.switch_mlp.{name}"
            words = rng.integers(0, 2**32, (experts, rows, width * BITS // 32), dtype=np.uint32)
            tensors[f"{path}.weight"] = mx.array(words)
            for kind in ("scales", "biases"):
                tensors[f"{path}.{kind}"] = mx.ones((experts, rows, width // GROUP), dtype=mx.bfloat16)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})


def straight_share(index: ExpertIndex) -> float:
    """Share of the experts' bytes that are read into slots without a copy."""
    maker, copied, total = BankMaker(mx.bfloat16, is_shared=True), 0, 0
    for layer in index.layers:
        bank = maker.make(index.parts(layer), 1, index.leads(layer))
        for expert in range(index.num_experts):
            for run in plan_runs(index.pieces(layer, expert)):
                found = [bank.target(0, s.part, s.start, s.nbytes, s.at) for s in run.segments]
                targets = [target for target in found if target is not None]
                start, nbytes = aligned_range(PAGE, run.offset, run.nbytes)
                pieces = scatter(np.zeros(nbytes, np.uint8), run.offset - start, targets, PAGE)
                copied += sum(len(to) for to, _ in pieces.copies)
                copied += sum(s.nbytes for s, t in zip(run.segments, found, strict=True) if t is None)
                total += run.nbytes
    return 1 - copied / total


def reading(index: ExpertIndex) -> str:
    """Rate and CPU of experts that are read eight at a time, each once."""
    store = ExpertStore(index, 8, float_dtype=mx.bfloat16, shares_memory=True, looks_ahead=False)
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    for layer in index.layers:
        for first in range(0, index.num_experts, 8):
            store.acquire(layer, range(first, first + 8))
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    num_read, nbytes = store.statistics().misses, store.statistics().device_bytes
    num_reads = store.statistics().num_reads
    store.close()
    return (
        f"{nbytes / seconds / 1e9:.2f} GB/s, {1e3 * cpu_s / num_read:.2f} ms of CPU and "
        f"{num_reads / num_read:.1f} reads an expert"
    )


def measure(folder: Path, rounds: int) -> None:
    """Prints shares and rates, with small and with large pages by turns."""
    index = open_checkpoint(folder).experts
    print(f"  {straight_share(index):.1%} straight", flush=True)
    command = [sys.executable, "-P", "-m", "benchmarks.target.align_gain", "--folder", str(folder), "--read"]
    for _ in range(rounds):
        for pages, tunables in (("4 kB", ""), ("2 MB", ENGINE_ENVIRONMENT["GLIBC_TUNABLES"])):
            env = engine_environment() | {"GLIBC_TUNABLES": tunables}
            done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
            print(f"  pages of {pages}: {done.stdout.strip()}", flush=True)


def digests(folder: Path) -> dict[object, bytes]:
    """Of each expert, and of each other tensor, as the index that stands there names them."""
    entries = read_headers(folder)
    index = ExpertIndex.from_entries(entries)
    found: dict[object, bytes] = {
        name: _digest(entry.path, entry.offset, entry.nbytes)
        for name, entry in entries.items()
        if ".switch_mlp." not in name and ".experts." not in name
    }
    for layer in index.layers:
        for expert in range(index.num_experts):
            for piece in index.pieces(layer, expert):
                found[layer, expert, piece.part.name] = _digest(piece.path, piece.offset, piece.part.nbytes)
    return found


def _digest(path: Path, offset: int, nbytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return hashlib.blake2b(file.read(nbytes)).digest()


def kill_and_repeat(folder: Path, times: int, most_s: float, make: Callable[[], None]) -> int:
    """Kills the command so often while it works, at random moments; returns how often it was made anew."""
    expected, num_cut, num_made, chance = digests(folder), 0, 0, random.Random(1)
    command = [sys.executable, "-P", "-m", "server.cli", "align", str(folder)]
    while num_cut < times:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(chance.uniform(0.2, most_s))
        is_done = process.poll() is not None
        process.kill()
        process.wait()
        assert digests(folder) == expected, "the committed index names a tensor that is not what it was"
        num_cut += not is_done
        if is_done:
            shutil.rmtree(folder)
            make()
            num_made += 1
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert digests(folder) == expected, "a tensor was changed"
    return num_made


def main(words: Sequence[str] | None = None) -> int:
    """Makes, measures, aligns and measures again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--most-seconds", type=float, default=4.0, help="latest moment of a kill")
    parser.add_argument("--rounds", type=int, default=3, help="of reading, each way")
    parser.add_argument("--read", action="store_true", help="only read, in this process, what is there")
    options = parser.parse_args(words)
    if options.read:
        print(reading(open_checkpoint(options.folder).experts))
        return 0
    make_checkpoint(options.folder, options.experts, options.layers)
    index = open_checkpoint(options.folder).experts
    nbytes = sum(index.num_experts * index.expert_bytes(layer) for layer in index.layers)
    print(json.dumps({"experts_bytes": nbytes, "experts": options.experts, "layers": options.layers}))
    print("before")
    measure(options.folder, options.rounds)
    num_made = kill_and_repeat(
        options.folder,
        options.kills,
        options.most_seconds,
        partial(make_checkpoint, options.folder, options.experts, options.layers),
    )
    text = "killed %d times at work (begun anew %d times): every tensor was right through the index each time"
    print(text % (options.kills, num_made), flush=True)
    print("after")
    measure(options.folder, options.rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

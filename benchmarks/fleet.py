"""What a fleet of agents gets from one engine: `python -m benchmarks.fleet decode|prompts|mixed`.

The engine's own loop over a streamed model on the simulated disk; token times are those of its events.

decode   Pocket with a quarter of its experts in memory: 1 to 8 agents with prompts of their own, and with a
         common prefix; then 8 agents at fixed widths and at the width that the engine chooses.
prompts  four prompts of 4,096 tokens at once against one after the other, bound by the disk.
mixed    one prompt of 16,384 tokens while four agents decode, and a prompt of 200 behind it.

Run it alone on the machine; each part takes one to three minutes on two cores.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.drive import Served, drive, use_fast_blas
from benchmarks.simulated_disk import SimulatedDisk
from server.checkpoint import POCKET
from server.engine.limits import Limits
from server.engine.messages import Cancel, Finished, Generate, ModelInfo, Sampling, Token
from server.engine.model import Backend
from streaming.disk import DirectDisk
from streaming.statistics import StoreStatistics
from tests.checkpoints import Opened, open_model, save_packed
from tests.tiny_glm import WIDER, make_weights

LATENCY_S = 1e-4
NEVER = 10**9


def serve(
    opened: Opened,
    limits: Limits,
    requests: list[Generate],
    later: Callable[[str, int], Sequence[Generate | Cancel]] = lambda name, count: [],
) -> Served:
    """Serve requests, and what `later` adds or cancels after a token: its request, and its number there."""
    info = ModelInfo(opened.checkpoint.args.vocab_size, 32_768)

    def react(served: Served, event: Token | Finished) -> Sequence[Generate | Cancel]:
        is_token = isinstance(event, Token)
        return later(event.request_id, len(served.times[event.request_id])) if is_token else []

    return drive(Backend(opened.model, info, limits=limits), requests, react)


def prompt(seed: int, length: int, vocab: int) -> tuple[int, ...]:
    return tuple(int(t) for t in np.random.default_rng(seed).integers(4, vocab, length))


def ask(name: str, ids: tuple[int, ...], max_tokens: int) -> Generate:
    return Generate(name, ids, max_tokens, Sampling(temperature=0), agent=name)


# decode


@dataclass(frozen=True)
class Decoded:
    tokens_per_s: float
    bytes_per_step: float
    hit_rate: float
    chosen: int


def decode(opened: Opened, prompts: list[tuple[int, ...]], num_tokens: int, width: int | None) -> Decoded:
    """From the moment when the last prompt is read until the first answer is complete, all decode."""
    limits = Limits(kv_tokens=NEVER, batch_width=width, is_streaming=True)
    names = {f"a{i}" for i in range(len(prompts))}
    marks: list[tuple[float, StoreStatistics]] = []
    waiting = set(names)

    def later(name: str, count: int) -> list[Generate]:
        waiting.discard(name)
        if (not waiting and not marks) or (count == num_tokens and len(marks) == 1):
            marks.append((time.monotonic(), opened.store.statistics()))
        return []

    requests = [ask(name, ids, num_tokens) for name, ids in zip(sorted(names), prompts, strict=True)]
    served = serve(opened, limits, requests, later)
    (start, before), (end, after) = marks
    tokens = sum(start < time_s <= end for times in served.times.values() for time_s in times)
    misses = after.misses + after.ahead_used - before.misses - before.ahead_used
    asked = misses + after.hits - before.hits
    chosen = int(served.measured["batch_width"])
    num_steps = tokens / min(chosen, len(prompts))
    num_bytes = after.payload_bytes - before.payload_bytes
    return Decoded(tokens / (end - start), num_bytes / num_steps, 1 - misses / max(1, asked), chosen)


def bench_decode(console: Console, num_tokens: int) -> None:
    vocab = open_model(POCKET, 16).checkpoint.args.vocab_size
    own = [prompt(i, 48, vocab) for i in range(8)]
    common = prompt(99, 256, vocab)
    shared = [common + prompt(i, 8, vocab) for i in range(8)]
    resident = open_model(POCKET)
    alone_s = {}
    for width in (1, 2, 4, 8):
        alone_s[width] = width / decode(resident, own[:width], num_tokens, width).tokens_per_s
    index, args = resident.checkpoint.experts, resident.checkpoint.args
    token_bytes = args.num_experts_per_tok * sum(index.expert_bytes(layer) for layer in index.layers)
    resident.store.close()
    # Half of a lone token's experts are not there: their bytes take 1.4 times its compute, as on the target.
    rate = 0.5 * token_bytes / (1.4 * alone_s[1])
    table = Table(title=f"decode, 16 of 64 experts a layer, a disk of {rate / 1e6:.1f} MB/s")
    for column in ("agents", "prompts", "tokens/s", "x one agent", "hit rate", "MB a step", "of predicted"):
        table.add_column(column)
    for kind, prompts in (("own", own), ("256 in common", shared)):
        one = 0.0
        for width in (1, 2, 4, 8):
            opened = open_model(POCKET, 16, disk=SimulatedDisk(rate, LATENCY_S, DirectDisk()))
            with closing(opened.store):
                seen = decode(opened, prompts[:width], num_tokens, width)
            one = one or seen.tokens_per_s
            predicted = width / (seen.bytes_per_step / rate + alone_s[width])
            table.add_row(
                str(width), kind, f"{seen.tokens_per_s:.1f}", f"{seen.tokens_per_s / one:.2f}",
                f"{seen.hit_rate:.1%}", f"{seen.bytes_per_step / 1e6:.2f}",
                f"{seen.tokens_per_s / predicted:.2f}",
            )  # fmt: skip
    console.print(table)
    table = Table(title="eight agents, by width of the step")
    for column in ("width", "tokens/s"):
        table.add_column(column)
    for fixed in (1, 2, 4, 8, None):
        opened = open_model(POCKET, 16, disk=SimulatedDisk(rate, LATENCY_S, DirectDisk()))
        with closing(opened.store):
            seen = decode(opened, own, num_tokens * (1 if fixed else 4), fixed)
        table.add_row(str(fixed or f"chosen: {seen.chosen}"), f"{seen.tokens_per_s:.1f}")
    console.print(table)


# prompts and mixed


def open_tiny(folder: Path, sweep_s: float) -> tuple[Opened, SimulatedDisk]:
    """A tiny model with a quarter of its experts in memory; reading all others takes `sweep_s`."""
    save_packed(folder, WIDER, make_weights(WIDER, 3), lambda path: None)
    slots = 4
    index = open_model(folder, slots).checkpoint.experts
    absent = (index.num_experts - slots) * sum(index.expert_bytes(layer) for layer in index.layers)
    disk = SimulatedDisk(absent / sweep_s, LATENCY_S, DirectDisk())
    return open_model(folder, slots, disk=disk), disk


def bench_prompts(console: Console, sweep_s: float, length: int) -> None:
    names = [f"p{i}" for i in range(4)]
    requests = [ask(name, prompt(i, length, 64), 1) for i, name in enumerate(names)]
    limits = Limits(pass_rows=4 * length, kv_tokens=NEVER)
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("one after the other", "at once"):
            opened, disk = open_tiny(Path(folder), sweep_s)
            started = time.monotonic()
            with closing(opened.store):
                for group in [requests] if kind == "at once" else [[request] for request in requests]:
                    serve(opened, limits, group)
            seconds[kind] = time.monotonic() - started
            console.print(f"{kind}: {seconds[kind]:.1f} s, {disk.num_bytes / 1e6:.1f} MB read")
    ratio = seconds["at once"] / seconds["one after the other"]
    console.print(
        f"four prompts of {length} tokens at once / one after the other: {ratio:.2f} (wanted: at most 0.4)"
    )


def bench_mixed(console: Console, sweep_s: float, length: int) -> None:
    agents = [ask(f"a{i}", prompt(i, 32, 64), 4000) for i in range(4)]
    long, short = ask("long", prompt(8, length, 64), 1), ask("short", prompt(9, 200, 64), 1)
    limits = Limits(kv_tokens=NEVER, batch_width=4, is_streaming=True)

    def later(name: str, count: int) -> Sequence[Generate | Cancel]:
        if name == "long":
            return [Cancel(agent.request_id) for agent in agents]
        return [long, short] if (name, count) == ("a0", 20) else []

    with tempfile.TemporaryDirectory() as folder:
        opened, _ = open_tiny(Path(folder), sweep_s)
        with closing(opened.store):
            alone = serve(opened, limits, [long])
            alone_s, layer_s = alone.first_s("long"), alone.longest_beat_s
        opened, _ = open_tiny(Path(folder), sweep_s)
        with closing(opened.store):
            served = serve(opened, limits, agents, later)
    start, end = served.asked_at["long"], served.times["long"][0]
    times = served.times["a0"]
    gaps_before = [b - a for a, b in pairwise(times) if b < start]
    during = [(b - a) for a, b in pairwise(times) if a > start and b < end]
    step_s = sorted(gaps_before)[len(gaps_before) // 2]
    console.print(f"undisturbed step {step_s * 1e3:.1f} ms; the longest layer part {layer_s * 1e3:.0f} ms")
    console.print(f"longest gap {max(during):.2f} s; 3 steps and a part: {3 * step_s + layer_s:.2f} s")
    rate = (len(during) / (end - start)) * step_s
    console.print(f"rate while the prompt is read: {rate:.2f} of undisturbed (wanted: at least 0.30)")
    ttft = served.first_s("long") / alone_s
    console.print(
        f"first token of the {length}: {served.first_s('long'):.1f} s, {ttft:.2f} x alone (at most 1.6)"
    )
    console.print(f"first token of the 200 behind it: {served.first_s('short'):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("decode", "prompts", "mixed"))
    parser.add_argument("--tokens", type=int, default=24, help="decode: tokens of each answer")
    parser.add_argument("--sweep-s", type=float, default=6.0, help="seconds of disk for all absent experts")
    parser.add_argument("--length", type=int, help="tokens of a prompt (default 4096, mixed 16384)")
    given = parser.parse_args()
    use_fast_blas("benchmarks.fleet")
    console = Console(width=110)
    match given.part:
        case "decode":
            bench_decode(console, given.tokens)
        case "prompts":
            bench_prompts(console, given.sweep_s, given.length or 4096)
        case "mixed":
            bench_mixed(console, given.sweep_s, given.length or 16_384)


if __name__ == "__main__":
    main()

"""What agents get that decode from a slow disk: `python -m benchmarks.fleet.decode`.

The engine's own loop over the bench geometry (`benchmarks.rig.replay`), a quarter of its experts in
memory, on a simulated disk with which a lone agent's token has the target's compute : I/O of 0.16 : 0.22.
Agents go where Pocket went in conversations of their own (`own`), in conversations with 2,048
tokens in common (`shared`), or where a made-up routing of the published locality goes (`synthetic`).

1, 2, 4 and 8 agents, all in each step. Predicted is width / (bytes / rate + compute): payload that arrived in
the window, lookahead's wrong guesses with it, and the measured step of as many rows with all experts there.

Sides alternate in each round; medians, lowest and highest.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.rig.drive import Served, drive, use_engine_environment
from benchmarks.rig.replay import FLEET, NUM_AGENTS, ROUTINGS, Bench, conversations
from server.engine.schedule.limits import Limits
from server.link.messages import Cancel, Finished, Generate, Sampling, Token
from streaming.statistics import StoreStatistics

WIDTHS = (1, 2, 4, 8)
IO_PER_COMPUTE = 0.22 / 0.16
PROMPT_TOKENS, MAX_TOKENS = 12, 60_000
# Steps before the counted ones: the experts in memory are those of the prompts.
SETTLING_STEPS = 8


@dataclass(frozen=True)
class Decoded:
    """A window of steps."""

    steps: float
    seconds: float
    width: int
    counts: StoreStatistics  # at its end, and at its start
    before: StoreStatistics

    @property
    def tokens_per_s(self) -> float:
        return self.steps * self.width / self.seconds

    @property
    def step_s(self) -> float:
        return self.seconds / self.steps

    @property
    def bytes_per_step(self) -> float:
        return (self.counts.payload_bytes - self.before.payload_bytes) / self.steps

    @property
    def hit_rate(self) -> float:
        hits, misses, ahead = (
            getattr(self.counts, name) - getattr(self.before, name)
            for name in ("hits", "misses", "ahead_used")
        )
        return hits / max(1, hits + misses + ahead)

    @property
    def stall_share(self) -> float:
        """Of the time, what the engine waited for reads."""
        return (self.counts.stall_s - self.before.stall_s) / self.seconds


def decode(
    bench: Bench, rate: float | None, kind: str, num_agents: int, width: int | None, num_steps: int
) -> Decoded:
    """So many steps once all decode and have settled; agents take turns where they are more than `width`."""
    opened = bench.open(rate, conversations(kind))
    rows = min(width or num_agents, num_agents)
    first, last = SETTLING_STEPS * rows, (SETTLING_STEPS + num_steps) * rows
    names = [f"a{i}" for i in range(num_agents)]
    marks: list[tuple[float, int, StoreStatistics]] = []
    reading, since = set(names), [0]

    def react(served: Served, event: Token | Finished) -> Sequence[Generate | Cancel]:
        if reading:
            reading.discard(event.request_id)
            return []
        since[0] += 1
        if since[0] >= (first, last)[len(marks)] and since[0] % rows == 0:
            marks.append((time.monotonic(), since[0], opened.store.statistics()))
        return [Cancel(name) for name in names] if len(marks) == 2 else []

    limits = Limits(kv_tokens=10**9, batch_width=width)
    requests = [_ask(name, number) for number, name in enumerate(names)]
    with closing(opened.store):
        drive(opened.backend(limits), requests, react)
    (start_s, start, before), (end_s, end, after) = marks
    return Decoded((end - start) / rows, end_s - start_s, rows, after, before)


def _ask(name: str, number: int) -> Generate:
    ids = np.random.default_rng(number).integers(4, FLEET["vocab_size"], PROMPT_TOKENS)
    ids[-1] = 10 * NUM_AGENTS + number  # by which the replay knows it
    return Generate(name, tuple(int(t) for t in ids), MAX_TOKENS, Sampling(temperature=0), agent=name)


def find_rate(bench: Bench, num_steps: int) -> float:
    """Bytes per second that give a lone agent the target's balance."""
    compute_s = min(decode(bench, None, "synthetic", 1, 1, num_steps).step_s for _ in range(2))
    alone = decode(bench, 1e12, "synthetic", 1, 1, num_steps)
    return alone.bytes_per_step / (IO_PER_COMPUTE * compute_s)


def bench_agents(
    console: Console, bench: Bench, kinds: Sequence[str], widths: Sequence[int], steps: int, rounds: int
) -> None:
    """The table of agents."""
    rate = find_rate(bench, steps)
    seen: dict[tuple[str, int], list[Decoded]] = {}
    compute: dict[int, list[float]] = {width: [] for width in widths}
    for _ in range(rounds):
        for width in widths:
            compute[width].append(decode(bench, None, "synthetic", width, width, steps).step_s)
            for kind in kinds:
                seen.setdefault((kind, width), []).append(decode(bench, rate, kind, width, width, steps))
    compute_s = {width: median(seconds) for width, seconds in compute.items()}
    table = Table(title=f"decode, a quarter of the experts in memory, a disk of {rate / 1e6:.1f} MB/s")
    for column in ("routing", "agents", "tokens/s", "hit rate", "MB a step", "ms compute", "ms step",
                   "waiting", "of predicted"):  # fmt: skip
        table.add_column(column, justify="right")
    for (kind, width), runs in seen.items():
        of = [(r.bytes_per_step / rate + compute_s[width]) / r.step_s for r in runs]
        table.add_row(
            kind, str(width), spread([r.tokens_per_s for r in runs]),
            f"{median(r.hit_rate for r in runs):.1%}",
            f"{median(r.bytes_per_step for r in runs) / 1e6:.2f}", f"{1e3 * compute_s[width]:.0f}",
            f"{1e3 * median(r.step_s for r in runs):.0f}", f"{median(r.stall_share for r in runs):.0%}",
            spread(of),
        )  # fmt: skip
    console.print(table)


def spread(values: Sequence[float]) -> str:
    """Median, lowest and highest."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{median(values):.2f} [{min(values):.2f} {max(values):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--widths", nargs="+", type=int, choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--steps", type=int, default=24, help="that are counted, of each width")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    use_engine_environment("benchmarks.fleet.decode")
    console = Console(width=130)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.write(Path(folder) / "bench")
        bench_agents(console, bench, given.routing, given.widths, given.steps, given.rounds)


if __name__ == "__main__":
    main()

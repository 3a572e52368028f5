"""What saved prompts are worth: `python -m benchmarks.prefix ttft|fleet`.

The engine's own loop over Pocket with half of its experts in memory and the rest on the simulated disk.
Blocks of the prefix cache are read from and written to the machine's real disk.

ttft    time to the first token of a long prompt: read whole; its beginning in memory, with 16 tokens added;
        the same from the SSD; the same after a restart, start-up not counted. Each round has its own prompt.
fleet   agents that share a beginning and take turns of a tool's result and an answer: all at once, against
        one request at a time. Both have the same prefix cache, empty at the start.

Run it alone on the machine; each part takes one to three minutes on two cores.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from statistics import median

import mlx.core as mx
import numpy as np

from benchmarks.simulated_disk import SimulatedDisk
from models.cache_blocks import bytes_per_token
from server.checkpoint import POCKET
from server.engine.blas import with_fast_blas
from server.engine.limits import Limits
from server.engine.loop import EngineLoop
from server.engine.messages import (
    Command,
    Event,
    Failed,
    Finished,
    Generate,
    ModelInfo,
    Sampling,
    Shutdown,
    Token,
)
from server.engine.model import Backend
from server.engine.prefix import DiskTier, PrefixCache
from server.engine.prefixes import SavedPrefixes
from streaming.banks import slot_bytes
from streaming.disk import DirectDisk
from tests.checkpoints import Opened, open_model

LATENCY_S = 1e-4
PLENTY = 10**10
CONTEXT = 40_000


@dataclass
class World:
    """A model whose experts come from a simulated disk."""

    rate: float
    disk: SimulatedDisk = field(init=False)
    opened: Opened = field(init=False)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """A model of which nothing is in memory but the trunk."""
        self.disk = SimulatedDisk(self.rate, LATENCY_S, DirectDisk())
        self.opened = open_model(POCKET, slots=32, disk=self.disk)


@dataclass
class Run:
    """When requests were asked and answered."""

    asked_s: dict[str, float] = field(default_factory=dict)
    first_s: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    num_cached: int = 0
    num_prompt: int = 0


def serve(
    world: World,
    prefix: PrefixCache,
    first: Sequence[Generate],
    follow: Callable[[str, list[int]], Sequence[Generate]] = lambda name, tokens: [],
) -> Run:
    """Serve until nothing is left; `follow` says what is asked when a request has ended."""
    inbox: SimpleQueue[Command] = SimpleQueue()
    run, open_requests = Run(), set[str]()

    def ask(requests: Sequence[Generate]) -> None:
        for request in requests:
            run.asked_s[request.request_id] = time.monotonic()
            open_requests.add(request.request_id)
            inbox.put(request)

    def send(event: Event) -> None:
        if isinstance(event, Failed):
            raise SystemExit(event.message)
        if isinstance(event, Token):
            run.first_s.setdefault(event.request_id, time.monotonic() - run.asked_s[event.request_id])
            run.tokens[event.request_id].append(event.score.token_id)
        if isinstance(event, Finished):
            run.num_cached += event.usage.num_cached_tokens
            run.num_prompt += event.usage.num_prompt_tokens
            open_requests.remove(event.request_id)
            ask(follow(event.request_id, run.tokens[event.request_id]))
            if not open_requests:
                inbox.put(Shutdown())

    ask(first)
    limits = Limits(kv_tokens=8 * CONTEXT, is_streaming=True)
    info = ModelInfo(world.opened.checkpoint.args.vocab_size, CONTEXT)
    backend = Backend(world.opened.model, info, limits=limits)
    EngineLoop(backend, inbox, send, prefixes=SavedPrefixes(prefix)).run()
    return run


def random_tokens(seed: int, length: int) -> tuple[int, ...]:
    return tuple(int(t) for t in np.random.default_rng(seed).integers(300, 4000, length))


def measure_ttft(world: World, length: int, rounds: int, directory: Path) -> None:
    """Print each kind's time to the first token, and its share of the cold one."""
    seconds: dict[str, list[float]] = defaultdict(list)

    def ask(kind: str, prefix: PrefixCache, prompt: tuple[int, ...]) -> None:
        run = serve(world, prefix, [Generate("a", prompt, 1, Sampling(temperature=0))])
        seconds[kind].append(run.first_s["a"])
        print(f"  {kind:8} {run.first_s['a']:7.3f} s, cached {run.num_cached}/{run.num_prompt}", flush=True)

    disk = DiskTier(directory, PLENTY, PLENTY)
    for number in range(rounds):
        prompt = random_tokens(number, length)
        prefix = PrefixCache(bytes(32), PLENTY, disk)
        ask("cold", prefix, prompt)
        ask("memory", prefix, prompt + random_tokens(1000 + number, 16))
        prefix.close(120)
        prefix = PrefixCache(bytes(32), PLENTY, disk)
        ask("ssd", prefix, prompt + random_tokens(2000 + number, 16))
        prefix.close(120)
        world.restart()
        prefix = PrefixCache(bytes(32), PLENTY, disk)
        ask("restart", prefix, prompt + random_tokens(3000 + number, 16))
        prefix.close(120)
    for kind, values in seconds.items():
        share = median(value / cold for value, cold in zip(values, seconds["cold"], strict=True))
        spread = f"{min(values):.3f} to {max(values):.3f}"
        print(f"{kind:8} {median(values):8.3f} s ({spread})  {100 * share:6.2f} % of cold")
    size = bytes_per_token(world.opened.model.make_cache()) * length
    print(f"{length} tokens are {size / 1e6:.1f} MB of saved KV")


@dataclass(frozen=True)
class Fleet:
    """What the agents do, in tokens."""

    agents: int
    turns: int
    shared: int
    result: int
    answer: int


def measure_fleet(world: World, fleet: Fleet) -> None:
    """Print both ways of serving the same conversations."""
    walls = {}
    for is_together in (False, True):
        world.restart()
        prefix = PrefixCache(bytes(32), PLENTY)
        started = time.monotonic()
        run = _serve_fleet(world, prefix, fleet, is_together)
        wall = walls[is_together] = time.monotonic() - started
        index = world.opened.checkpoint.experts
        one_sweep = sum(slot_bytes(index.parts(layer), mx.float32) for layer in index.layers)
        one_sweep *= index.num_experts
        print(
            f"{'together' if is_together else 'one by one':10} {wall:7.1f} s, computed "
            f"{run.num_prompt - run.num_cached} of {run.num_prompt} prompt tokens, read "
            f"{world.disk.num_bytes / 1e6:.0f} MB, {world.disk.num_bytes / one_sweep:.1f} sweeps"
        )
        for agent in range(fleet.agents):
            waits = [run.first_s[f"{agent}.{turn}"] for turn in range(fleet.turns)]
            print(f"    agent {agent} waited " + ", ".join(f"{wait:.2f}" for wait in waits) + " s")
    print(f"together takes {walls[True] / walls[False]:.2f} of the time")


def _serve_fleet(world: World, prefix: PrefixCache, fleet: Fleet, is_together: bool) -> Run:
    talks = {agent: list(random_tokens(7, fleet.shared)) for agent in range(fleet.agents)}
    waiting: list[Generate] = []

    def request(agent: int, turn: int) -> Generate:
        talks[agent] += random_tokens(100 * agent + turn, fleet.result)
        greedy = Sampling(temperature=0)
        return Generate(f"{agent}.{turn}", tuple(talks[agent]), fleet.answer, greedy, agent=str(agent))

    def follow(name: str, tokens: list[int]) -> Sequence[Generate]:
        agent, turn = map(int, name.split("."))
        talks[agent] += tokens
        new = [request(agent, turn + 1)] if turn + 1 < fleet.turns else []
        if is_together:
            return new
        waiting.extend(new)
        return [waiting.pop(0)] if waiting else []

    first = [request(agent, 0) for agent in range(fleet.agents)]
    if is_together:
        return serve(world, prefix, first, follow)
    waiting.extend(first[1:])
    return serve(world, prefix, first[:1], follow)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=["ttft", "fleet"])
    parser.add_argument("--rate", type=float, default=100e6, help="bytes per second of the simulated disk")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the repeated beginning")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--scale", type=int, default=1, help="divide the fleet's lengths by so much")
    parser.add_argument("--directory", type=Path, help="where blocks go (default: a folder that is deleted)")
    given = parser.parse_args()
    environment = with_fast_blas(os.environ)
    if environment.get("LD_PRELOAD") != os.environ.get("LD_PRELOAD") and "GLMSERVE_BLAS" not in os.environ:
        environment["GLMSERVE_BLAS"] = "preloaded"
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.prefix", *sys.argv[1:]], environment)
    with tempfile.TemporaryDirectory(dir=given.directory) as folder:
        if given.part == "ttft":
            measure_ttft(World(given.rate), given.length, given.rounds, Path(folder))
        else:
            fleet = Fleet(8, 6, 4096 // given.scale, 500 // given.scale, 100 // given.scale)
            measure_fleet(World(given.rate), fleet)


if __name__ == "__main__":
    main()

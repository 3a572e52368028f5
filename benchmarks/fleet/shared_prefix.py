"""What a fleet gains from asking at once: `python -m benchmarks.fleet.shared_prefix [--way WAY]`.

Agents share a beginning and take turns of a tool's result and an answer: all at once (`together`), against
one request at a time, as other streaming servers work: where the least recently used expert goes and
nothing is guessed, as most of them do (`plain`), or with this server's policy and guesses (`alone`). All
have the same prefix cache, empty at the start, over Pocket or another folder with a quarter of its experts
in memory and the rest on a simulated disk, by default as slow beside this machine as the target's. With
`--token-ms` the machine's compute is simulated too (`benchmarks.rig.simulated_device`): what a batch costs a
CPU grows with its rows, and on the target most of it does not.

Run it alone on the machine; `--scale 24` makes all lengths shorter, and less like the target's.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.rig.drive import Served, drive, use_engine_environment
from benchmarks.rig.simulated_device import PacedStore
from benchmarks.rig.slow_pocket import SlowPocket, rate_like_the_target, text_tokens
from server.commands.checkpoint import POCKET
from server.engine.prefix.lookup import PrefixCache
from server.engine.schedule.shared_prefixes import SavedPrefixes
from server.link.messages import Finished, Generate, Sampling, Token

PLENTY = 10**10
WAYS = ("plain", "alone", "together")
# Of a pass: what the plan gives a budget of 100G and a context of as many.
PASS_ROWS = 32_768


@dataclass(frozen=True)
class Fleet:
    """What the agents do, in tokens."""

    agents: int
    turns: int
    shared: int
    result: int
    answer: int


def measure_fleet(make: Callable[[bool], SlowPocket], fleet: Fleet, ways: Sequence[str]) -> None:
    """Print each way of serving the conversations, and their ratios. `make` is told whether to be plain."""
    walls = {}
    for way in ways:
        pocket = make(way == "plain")
        started = time.monotonic()
        served = _serve_fleet(pocket, fleet, way == "together")
        wall = walls[way] = time.monotonic() - started
        print(
            f"{way:8} {wall:7.1f} s, computed {served.num_prefilled} of "
            f"{sum(usage.num_prompt_tokens for usage in served.usage.values())} prompt tokens, read "
            f"{pocket.disk.num_bytes / 1e6:.0f} MB, {pocket.disk.num_bytes / pocket.sweep_bytes:.1f} sweeps"
            f", the disk busy for {pocket.disk.busy_s:.1f} s{_late(pocket)}"
        )
        for agent in range(fleet.agents):
            waits = [served.first_s(f"{agent}.{turn}") for turn in range(fleet.turns)]
            print(
                f"    agent {agent} waited " + ", ".join(f"{wait:.2f}" for wait in waits) + " s", flush=True
            )
    if "together" in walls:
        for way in walls.keys() - {"together"}:
            print(f"together takes {walls['together'] / walls[way]:.2f} of {way} (wanted: at most 0.50)")


def _late(pocket: SlowPocket) -> str:
    """How far this machine was behind the simulated device, which then took as long."""
    store = pocket.opened.store
    return f", {store.late_s:.1f} s behind the device" if isinstance(store, PacedStore) else ""


def _serve_fleet(pocket: SlowPocket, fleet: Fleet, is_together: bool) -> Served:
    talks = {agent: list(text_tokens(7, fleet.shared)) for agent in range(fleet.agents)}
    waiting: list[Generate] = []
    started = time.monotonic()

    def request(agent: int, turn: int) -> Generate:
        talks[agent] += text_tokens(100 * agent + turn, fleet.result)
        sampling = Sampling(seed=100 * agent + turn)  # a greedy Pocket repeats itself
        return Generate(f"{agent}.{turn}", tuple(talks[agent]), fleet.answer, sampling, agent=str(agent))

    def react(served: Served, event: Token | Finished) -> Sequence[Generate]:
        if isinstance(event, Token):
            return []
        agent, turn = map(int, event.request_id.split("."))
        print(
            f"    {time.monotonic() - started:7.1f} s: agent {agent} has answer {turn + 1} of {fleet.turns}",
            flush=True,
        )
        talks[agent] += served.tokens[event.request_id]
        new = [request(agent, turn + 1)] if turn + 1 < fleet.turns else []
        if is_together:
            return new
        waiting.extend(new)
        return [waiting.pop(0)] if waiting else []

    first = [request(agent, 0) for agent in range(fleet.agents)]
    if not is_together:
        waiting.extend(first[1:])
        del first[1:]
    prefixes = SavedPrefixes(PrefixCache(bytes(32), PLENTY))
    return drive(pocket.backend(PASS_ROWS), first, react, prefixes=prefixes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--rate", type=float, help="bytes per second of the simulated disk (default: measured)"
    )
    parser.add_argument(
        "--token-ms", type=float, help="what a lone token computes, simulated (default: this machine's own)"
    )
    parser.add_argument("--scale", type=int, default=1, help="divide all lengths by so much")
    parser.add_argument("--way", choices=WAYS, help="only this way (default: all)")
    parser.add_argument("--model", type=Path, default=POCKET, help="a folder with Pocket's tokenizer")
    given = parser.parse_args()
    use_engine_environment("benchmarks.fleet.shared_prefix")
    token_s = given.token_ms / 1000 if given.token_ms else None
    rate = given.rate or rate_like_the_target(token_s, given.model)
    fleet = Fleet(8, 6, 4096 // given.scale, 500 // given.scale, 100 // given.scale)
    # What is made once, as kernels are, is not the first way's to pay.
    _serve_fleet(SlowPocket(1e12, folder=given.model), Fleet(8, 1, 256, 64, 8), True)
    make = partial(SlowPocket, rate, token_s, given.model)
    measure_fleet(make, fleet, [given.way] if given.way else WAYS)


if __name__ == "__main__":
    main()

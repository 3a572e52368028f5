"""Drives the engine's loop as a client would: asks, listens, asks again. Used by benchmarks and by tests.

`drive` serves a list of requests to the end; `react` hears of each token and each end, on the loop's thread,
and says what is asked or cancelled then. What a benchmark wants to know of the way is in `Served`.
"""

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from queue import SimpleQueue

from server.engine.loop import EngineLoop
from server.engine.model_protocol import Backend
from server.engine.schedule.shared_prefixes import Prefixes
from server.link.child import engine_variables
from server.link.messages import Cancel, Command, Event, Failed, Finished, Generate, Shutdown, Token, Usage


@dataclass
class Served:
    """What became of each request, by its id; times are those of `time.monotonic`."""

    asked_at: dict[str, float] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    usage: dict[str, Usage] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)  # by the loop, at the end
    beats: list[float] = field(default_factory=list)  # when layers and steps began

    @property
    def longest_beat_s(self) -> float:
        """The longest layer or step."""
        return max(b - a for a, b in pairwise(self.beats))

    @property
    def num_prefilled(self) -> int:
        """Tokens of all prompts that were computed."""
        return sum(usage.num_prompt_tokens - usage.num_cached_tokens for usage in self.usage.values())

    def first_s(self, name: str) -> float:
        """From the request to its first token."""
        return self.times[name][0] - self.asked_at[name]


React = Callable[[Served, Token | Finished], Sequence[Generate | Cancel]]


def drive(
    backend: Backend,
    requests: Sequence[Generate],
    react: React = lambda served, event: (),
    *,
    prefixes: Prefixes | None = None,
    on_beat: Callable[[Served], Sequence[Generate | Cancel]] = lambda served: (),
) -> Served:
    """Serve until nothing is open any more; `on_beat` is asked before each layer. A failure ends the run."""
    inbox: SimpleQueue[Command] = SimpleQueue()
    served, still_open = Served(), set[str]()

    def submit(commands: Sequence[Generate | Cancel]) -> None:
        for command in commands:
            if isinstance(command, Cancel):
                still_open.discard(command.request_id)
            else:
                served.asked_at[command.request_id] = time.monotonic()
                still_open.add(command.request_id)
            inbox.put(command)
        if commands and not still_open:
            inbox.put(Shutdown())

    def send(event: Event) -> None:
        if isinstance(event, Failed):
            raise SystemExit(f"{event.request_id} failed: {event.message}")
        if isinstance(event, Token):
            served.times[event.request_id].append(time.monotonic())
            served.tokens[event.request_id].append(event.score.token_id)
        if isinstance(event, Finished):
            served.usage[event.request_id] = event.usage
            still_open.discard(event.request_id)
        if isinstance(event, Token | Finished):
            submit(new := react(served, event))
            if not new and not still_open:
                inbox.put(Shutdown())

    def beat(is_idle: bool) -> None:
        served.beats.append(time.monotonic())
        submit(on_beat(served))

    submit(requests)
    loop = EngineLoop(backend, inbox, send, prefixes=prefixes, beat=beat)
    loop.run()
    loop.check_integrity()
    served.measured = loop.measure()
    return served


def use_engine_environment(module: str) -> None:
    """Starts this process again with those of the engine process's variables that are missing."""
    environment = engine_variables() | os.environ
    if environment != dict(os.environ):
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment)

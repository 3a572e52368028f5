"""Turns of agents: deficit round robin, by the time that they cost. Owned by the scheduler.

What a request costs is known only afterwards, so the deficit is kept as seconds spent: a request's round is
the number of quanta that its agent will have spent when it is done, and earlier rounds go first. Within a
round the first request of each agent goes before the second of any. An agent that comes back after a pause
starts level with the least served of those that are here: time that nobody asked for is not saved up.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

from server.engine.schedule.sequence import Sequence
from server.link.messages import Priority

QUANTUM_S = 1.0
# An agent that has had no turn of a priority for this long goes before all others. Each priority has its own
# time: a fleet without sessions is one agent, and its background requests would otherwise wait for ever.
AGING_S = 30.0

Cost = Callable[[Sequence], float]


class Shares:
    """Seconds that each agent has had, and when it had the last of them, by priority."""

    def __init__(self) -> None:
        self._spent_s: dict[str, float] = {}
        self._served_s: dict[tuple[str, Priority], float] = {}
        self._num_here: dict[str, int] = defaultdict(int)

    def join(self, agent: str) -> None:
        """Registers a sequence of this agent."""
        if not self._num_here[agent]:
            self._spent_s[agent] = max(self._spent_s.get(agent, 0.0), self._least_s)
        self._num_here[agent] += 1

    def leave(self, agent: str) -> None:
        """Takes a sequence of this agent off the books."""
        self._num_here[agent] -= 1
        if self._num_here[agent] == 0:
            del self._num_here[agent]
            self._forget()

    def charge(self, sequence: Sequence, seconds: float, now_s: float) -> None:
        """Charges a sequence's agent for its part of a step's time."""
        agent = sequence.request.agent
        if agent in self._spent_s:
            self._spent_s[agent] += seconds
            self._served_s[agent, sequence.request.priority] = now_s
        sequence.served_s = now_s

    def rank(self, sequences: Iterable[Sequence], now_s: float, cost: Cost = lambda _: 0.0) -> list[Sequence]:
        """The sequences in the order of their turns; those of one agent keep their order among each other."""
        base_s, keys = self._least_s, {}
        total_s: dict[tuple[str, str], float] = defaultdict(float)
        number: dict[tuple[str, str], int] = defaultdict(int)
        ordered = list(sequences)
        for sequence in ordered:
            agent, priority = sequence.request.agent, sequence.request.priority
            total_s[agent, priority] += cost(sequence)
            round_number = (self._spent_s.get(agent, 0.0) - base_s + total_s[agent, priority]) // QUANTUM_S
            starved_s = 0.0 if number[agent, priority] else self.starved_s(sequence, now_s)
            keys[sequence] = (
                -starved_s if starved_s > AGING_S else 0.0,
                priority == "background",
                round_number,
                number[agent, priority],
                self._served_s.get((agent, priority), 0.0),
            )
            number[agent, priority] += 1
        return sorted(ordered, key=keys.__getitem__)

    def starved_s(self, sequence: Sequence, now_s: float) -> float:
        """Seconds since the sequence, or another of its agent and priority, last had a part in a step."""
        one = (sequence.request.agent, sequence.request.priority)
        return now_s - max(self._served_s.get(one, 0.0), sequence.served_s)

    @property
    def num_agents(self) -> int:
        """Agents that have a sequence here."""
        return len(self._num_here)

    @property
    def _least_s(self) -> float:
        return min((self._spent_s[agent] for agent in self._num_here if self._num_here[agent]), default=0.0)

    def _forget(self) -> None:
        """Drops agents that are gone and stand no worse than a newcomer would."""
        least_s = self._least_s
        gone = [a for a, s in self._spent_s.items() if a not in self._num_here and s <= least_s]
        for agent in gone if self._num_here else list(self._spent_s):
            del self._spent_s[agent]
        self._served_s = {one: time_s for one, time_s in self._served_s.items() if one[0] in self._spent_s}

    def check_integrity(self) -> None:
        """Checks that no agent is remembered while none has a sequence here."""
        assert all(count > 0 for count in self._num_here.values())
        assert self._num_here or not (self._spent_s or self._served_s), "agents are remembered for ever"

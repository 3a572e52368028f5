"""Which expert lies in which slot of one layer. Owned by the store, called on its thread.

A slot is free, held by a resident expert, or taken: out of the books while bytes are on their way into it. A
free slot into which a read that hangs may yet write stays free: nobody can take it.
"""

from collections.abc import Callable, Collection, Container, Iterable, Sequence

from streaming.eviction.policy import Policy, Scores


class Residency:
    """Which expert lies in which slot of one layer."""

    def __init__(
        self, policy: Policy, num_slots: int, is_written: Callable[[int], bool] = lambda slot: False
    ) -> None:
        self.num_slots = num_slots
        self.num_evictions = 0
        self._policy = policy
        self._is_written = is_written
        self._slot_of: dict[int, int] = {}
        self._free = list(reversed(range(num_slots)))  # descending, so that the lowest slot is taken first

    @property
    def watches_scores(self) -> bool:
        """Whether the policy wants to `observe` the router's scores."""
        return self._policy.watches_scores

    def __contains__(self, expert: object) -> bool:
        return expert in self._slot_of

    def __len__(self) -> int:
        return len(self._slot_of)

    @property
    def residents(self) -> Collection[int]:
        """The experts that lie in slots."""
        return self._slot_of.keys()

    def slot(self, expert: int) -> int:
        return self._slot_of[expert]

    def observe(self, scores: Scores) -> None:
        self._policy.observe(scores)

    def ask(self, experts: Sequence[int]) -> None:
        """Tells the policy what one decode step asks for, ascending, before any of it is read or used."""
        self._policy.ask(experts, self._slot_of, self.num_slots)

    def use(self, experts: Sequence[int]) -> None:
        """Resident experts were used by one request, ascending."""
        self._policy.use(experts)

    def least_worth_first(self, experts: Iterable[int]) -> list[int]:
        """The experts in the order in which the policy would evict them; ties keep the order given."""
        return sorted(experts, key=self._policy.worth)

    def num_free(self, keep: Collection[int]) -> int:
        """How many slots can be taken without giving up an expert in `keep`, each named once."""
        num_usable = sum(not self._is_written(slot) for slot in self._free)
        return num_usable + len(self._slot_of) - sum(expert in self._slot_of for expert in keep)

    def take(self, keep: Container[int]) -> int:
        """A slot for new bytes, of an expert not in `keep` if none is free."""
        for slot in reversed(self._free):
            if not self._is_written(slot):
                self._free.remove(slot)
                return slot
        return self._evict(keep)

    def hold(self, expert: int, slot: int) -> None:
        """Records that `slot` now holds `expert`, whose bytes have arrived."""
        self._slot_of[expert] = slot
        self._policy.use((expert,))

    def release(self, slot: int) -> None:
        """Frees a slot whose read failed or was cancelled."""
        self._free.append(slot)
        self._free.sort(reverse=True)

    def shed(self, num_slots: int) -> list[int]:
        """Evicts experts until at most `num_slots` are resident.

        Returns the slots that are still held, ascending.
        """
        while len(self._slot_of) > num_slots:
            self.release(self._evict(()))
        return sorted(self._slot_of.values())

    def resize(self, kept: Sequence[int], num_slots: int) -> None:
        """Renumbers the slots: the expert in slot `kept[i]` now lies in slot i of `num_slots`.

        None may be taken.
        """
        slot_of = {old: slot for slot, old in enumerate(kept)}
        self._slot_of = {expert: slot_of[old] for expert, old in self._slot_of.items()}
        self._free = list(reversed(range(len(kept), num_slots)))
        self.num_slots = num_slots

    def follow(self, policy: Policy) -> None:
        """Hands over to another policy, which learns what is resident in the old one's order of eviction."""
        for expert in self.least_worth_first(self._slot_of):
            policy.use((expert,))
        self._policy = policy

    def _evict(self, keep: Container[int]) -> int:
        """Evicts the expert that the policy names. Returns its slot."""
        expert = min((one for one in self._slot_of if one not in keep), key=self._policy.worth)
        self.num_evictions += 1
        return self._slot_of.pop(expert)

    def check(self, taken: Sequence[int]) -> None:
        """Every slot is free, held or taken, and only one of them."""
        slots = sorted([*self._free, *self._slot_of.values(), *taken])
        assert slots == list(range(self.num_slots)), "a slot is neither free, held nor taken, or two of them"

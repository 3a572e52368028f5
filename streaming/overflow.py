"""More experts in one request than a layer has slots, a few at a time, each read at most once.

What is there is computed with first, where it lies; if no slot is left then for what is to be read, those of
it that are worth least before the others. The others pass through a quarter of the slots: while some are
computed with, the next are read. So most of the bank keeps what the policy holds dearest; if all of
it were passed through, a request would find nothing that the one before had read. What is worth least is read
first: what is read last stays. Called by the store, on its thread; the books are the layer's.
"""

from collections import deque
from collections.abc import Generator, Sequence

from streaming.fills import Fill
from streaming.layer import StoreLayer

PASSED_SHARE = 0.25

Turn = tuple[list[int], list[int]]  # experts, ascending, and their slots


def take_turns(state: StoreLayer, experts: Sequence[int]) -> Generator[Turn]:
    """Yields all of the experts (unique), some at a time; products are evaluated before the next.

    DiskError names what could not be read.
    """
    joined, missed = state.ask(experts)
    here = [expert for expert in experts if expert in state.books]
    under_way: deque[Sequence[Fill]] = deque([list(joined.values())] if joined else [])
    uncomputed, left = set(here), deque(state.books.least_worth_first(missed))
    # Two turns at a time; where a bank is filled by scatter one, since its staging rows are everybody's.
    at_once = 2 if state.bank.is_in_place else 1
    most = min(max(1, int(PASSED_SHARE * state.books.num_slots) // 2), state.bank.max_fill)
    try:
        while here or left or under_way:
            while left and len(under_way) < at_once:
                room = min(most, len(left), state.books.num_free(uncomputed))
                if room == 0:
                    if here or under_way:
                        break  # every slot holds what is computed with now
                    state.make_room(1, uncomputed)
                    continue
                under_way.append(state.start([left.popleft() for _ in range(room)], uncomputed))
            if not here:
                fills = under_way.popleft()
                state.wait(fills)
                here = [fill.expert for fill in fills]
                uncomputed.update(here)
            now = here
            if left and len(under_way) < at_once:  # more reads start behind these than behind all
                now = state.books.least_worth_first(here)[: (at_once - len(under_way)) * most]
            now.sort()
            yield now, [state.books.slot(expert) for expert in now]
            uncomputed.difference_update(now)
            here = [expert for expert in here if expert in uncomputed]
    finally:  # the computation ended early, or a read failed: the rest is not asked for
        for fill in [fill for fills in under_way for fill in fills]:
            state.give_up(fill)

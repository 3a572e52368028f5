"""Passes whose clients have all left: whether they go on. Called by the engine's loop before each step."""

from server.engine.schedule.passes import Pass
from server.engine.schedule.scheduler import Scheduler
from server.engine.schedule.shared_prefixes import Prefixes


def is_worth_its_end(one: Pass, scheduler: Scheduler, prefixes: Prefixes, num_layers: int) -> bool:
    """Whether to compute a pass to its end; `num_layers` are those of a whole one.

    Clients that gave up ask again, so a pass that nobody waits for goes on where its rows are kept. It ends
    at once where others have something to read and less than half of it is done, unless one of them wants the
    same: nobody is ever kept waiting for more than half a pass.
    """
    if one.is_wanted or not prefixes.keeps_rows:
        return one.is_wanted
    leaders = {part.sequence for part in one.parts}
    is_followed = any(item.leader in leaders for item in scheduler.followers)
    is_half_done = num_layers <= 2 * one.num_layers_done
    is_contended = scheduler.has_readers or scheduler.num_waiting
    return is_followed or is_half_done or not is_contended

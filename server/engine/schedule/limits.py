"""How much the engine takes on at once. Made by the backend from the plan and the settings; owns nothing."""

from dataclasses import dataclass

from config.defaults import DECODE_SHARE, INFLIGHT_PER_AGENT
from config.plan import MAX_RUNNING


@dataclass(frozen=True)
class Limits:
    """Rows are those of a flat batch; `kv_tokens` is the sum of the lengths of all caches.

    `decode_share`: the share of wall time that decode steps get while a prompt is read. `batch_width`: rows
    of a decode step; None takes all that decode, up to `decode_rows`. `max_running`: sequences with a cache.
    """

    pass_rows: int = 2048
    decode_rows: int = 8
    kv_tokens: int = 32_768
    agent_inflight: int = INFLIGHT_PER_AGENT
    decode_share: float = DECODE_SHARE
    batch_width: int | None = None
    max_running: int = MAX_RUNNING

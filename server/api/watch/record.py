"""One HTTP request from its arrival to its end: what the log, the metrics and the page say of it."""

import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.api.answer.answer import Answer
from server.link.messages import Usage

Stats = Mapping[str, float]


def _new_id() -> str:
    return f"gen-{int(time.time())}-{secrets.token_hex(10)}"


@dataclass(eq=False)
class RequestRecord:
    """Filled on a request's way by the middleware, the ledger and the error handlers; read by `Watch`."""

    method: str = ""
    path: str = ""
    id: str = field(default_factory=_new_id)
    began_at: float = field(default_factory=time.time)
    began_s: float = field(default_factory=time.monotonic)
    route: str = "other"
    status: int = 0
    reason: str = ""  # why it was refused, or broke off
    key_name: str = "none"
    owner: str = ""
    agent: str = ""  # its label
    title: str = ""  # what its sender calls itself
    answers: Sequence[Answer] = ()
    usage: Usage | None = None  # final
    cost: float = 0.0  # dollars that OpenRouter would have charged
    total_s: float = 0.0  # once it is over
    cancelled_by: str = ""  # the name of the key that ended it through /activity
    stats_before: Stats = field(default_factory=dict)
    stats_after: Stats = field(default_factory=dict)
    _is_id_taken: bool = False

    def take_id(self) -> str:
        """The request's id for its first prompt, and an id of its own for each further one."""
        if self._is_id_taken:
            return _new_id()
        self._is_id_taken = True
        return self.id

    @property
    def failure(self) -> str:
        """Why the engine gave up on one of its answers, whose client may have had a part of it."""
        return next((answer.failure for answer in self.answers if answer.failure), "")

    @property
    def is_generation(self) -> bool:
        """Whether it came as far as the engine."""
        return bool(self.answers) and (self.status < 400 or any(one.has_begun for one in self.answers))

    @property
    def tokens(self) -> Usage:
        """What it has used so far, or in the end."""
        if self.usage:
            return self.usage
        used = [answer.usage for answer in self.answers if answer.has_begun]
        return Usage(
            max((one.num_prompt_tokens for one in used), default=0),
            sum(one.num_completion_tokens for one in used),
            max((one.num_cached_tokens for one in used), default=0),
        )

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return time.monotonic() - self.began_s

    @property
    def queue_s(self) -> float | None:
        """How long its first answer waited for the engine."""
        return _first(answer.begun_s - self.began_s for answer in self.answers if answer.begun_s)

    @property
    def first_s(self) -> float | None:
        """From its arrival to its first token."""
        return _first(answer.first_s - self.began_s for answer in self.answers if answer.first_s)

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens read in a second, those that were computed before left out."""
        if self.first_s is None or self.queue_s is None:
            return None
        seconds, used = self.first_s - self.queue_s, self.tokens
        num_read = used.num_prompt_tokens - used.num_cached_tokens
        return num_read / seconds if seconds > 0 and num_read > 0 else None

    @property
    def decode_rate(self) -> float | None:
        """Tokens written in a second, by all its answers together, after the first."""
        times = [(one.first_s, one.last_s) for one in self.answers if one.first_s and one.last_s]
        seconds = max((last for _, last in times), default=0.0) - min(
            (first for first, _ in times), default=0.0
        )
        num_after_first = sum(len(answer.token_gaps) for answer in self.answers)
        return num_after_first / seconds if seconds > 0 and num_after_first else None

    @property
    def hit_rate(self) -> float | None:
        """Share of the experts found in memory while it ran; steps are shared. None where nothing streams."""
        hits = self._spent("hits")
        asked = (hits or 0.0) + (self._spent("misses") or 0.0) + (self._spent("ahead_used") or 0.0)
        return hits / asked if hits is not None and asked else None

    @property
    def read_bytes(self) -> int | None:
        """Bytes read from the disk while it ran; None where nothing streams."""
        found = self._spent("device_bytes")
        return None if found is None else int(found)

    def _spent(self, name: str) -> float | None:
        if name not in self.stats_after:
            return None
        return max(0.0, self.stats_after[name] - self.stats_before.get(name, 0.0))

    @property
    def ending(self) -> str:
        """Why it is over, in a word."""
        if self.cancelled_by:
            return "cancelled"
        if self.reason or not self.answers:
            return self.reason
        return self.answers[0].reason or "cancelled"

    def facts(self) -> dict[str, Any]:
        """What the log says of it, absent where it does not apply; seconds, tokens, bytes and shares."""
        used = self.tokens
        told = {
            "id": self.id,
            "agent": self.agent,
            "key": self.key_name,
            "route": f"{self.method} {self.path}",
            "status": self.status,
        }
        if self.is_generation:
            told |= {
                "prompt_tokens": used.num_prompt_tokens,
                "cached_tokens": used.num_cached_tokens,
                "new_tokens": used.num_completion_tokens,
                "queue_s": self.queue_s,
                "first_token_s": self.first_s,
            }
        told |= {"total_s": self.total_s}
        if self.is_generation:
            told |= {
                "prefill_tokens_per_s": self.prefill_rate,
                "decode_tokens_per_s": self.decode_rate,
                "hit_rate": self.hit_rate,
                "read_bytes": self.read_bytes,
                "cache": self.answers[0].remark or None,
            }
        told["ended"] = self.ending
        rounded = {key: round(one, 4) if isinstance(one, float) else one for key, one in told.items()}
        return {key: one for key, one in rounded.items() if one not in (None, "")}


def _first(values: Iterable[float]) -> float | None:
    return max(0.0, min(found)) if (found := list(values)) else None

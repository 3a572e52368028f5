"""What became of requests: the last few thousand receipts, and counts since the start, some by key.

Owned by the service; written by the routes when an answer ends, read by /generation and by whoever watches.
"""

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from fastapi import Request

from config.prices import PRICES, PRICES_OF
from server.api.access.keys import key_of
from server.api.access.quotas import UNSTATED_TOKENS, Accounts, Quota, Wanted
from server.api.answer.answer import Answer
from server.api.error_bodies import PROVIDER
from server.link.messages import Usage

MAX_RECEIPTS = 10_000
MAX_HEADER = 256
# Receipts and the engine's books keep names, so these have an end; real ones are a few hundred characters.
MAX_USER = 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """What a request says of its sender, and the name of the key that it came with."""

    key_name: str = "local"
    session_id: str | None = None
    user: str | None = None
    user_agent: str | None = None
    referer: str | None = None
    key: str | None = None
    title: str | None = None
    quota: Quota = field(default_factory=Quota)

    @property
    def agent(self) -> str:
        """Who shares the engine's time with others: by session, else by user, each of one key, or by title.

        What one key calls its sessions is no other's: it would wait for them, and be shown their prompts.
        """
        key = f"key {self.key}" if self.key else ""
        named = {"session": self.session_id, "user": self.user, "title": "" if key else self.title}
        name = next((f"{kind} {name}" for kind, name in named.items() if name), "")
        return " ".join(filter(None, [key, name]))

    @property
    def label(self) -> str:
        """The sender for the log: names only, printable and not long."""
        name = self.session_id or self.user or self.title
        return f"{self.key_name} {name!r}"[:100] if name else self.key_name

    @classmethod
    def of(cls, request: Request, session_id: str | None, user: str | None) -> "Caller":
        """The sender by the headers and the body; the body wins."""
        headers = request.headers
        return cls(
            key_name=getattr(request.state, "key_name", "local"),
            session_id=session_id or _header(headers, "x-session-id"),
            user=user[:MAX_USER] if user else None,
            user_agent=_header(headers, "user-agent"),
            referer=_header(headers, "http-referer"),
            key=_digest(key_of(headers)),
            title=_header(headers, "x-openrouter-title") or _header(headers, "x-title"),
            quota=getattr(request.state, "quota", Quota()),
        )


def holder_of(request: Request) -> str:
    """Who shares threads with others: the name of the key, and without keys the agent by its headers."""
    caller = Caller.of(request, None, None)
    return caller.agent if caller.key_name == "local" else caller.key_name


@dataclass
class Receipt:
    """One request, from its arrival to its end."""

    id: str
    model: str
    caller: Caller
    is_streamed: bool
    answers_per_prompt: int = 1
    started_at: float = field(default_factory=time.time)

    def usage(self, answers: list[Answer]) -> Usage:
        """What all answers cost together; a prompt that has several counts once, one that never began not."""
        usages = [answer.usage if answer.has_begun else Usage(0, 0) for answer in answers]
        firsts = usages[:: self.answers_per_prompt]
        return Usage(
            sum(usage.num_prompt_tokens for usage in firsts),
            sum(usage.num_completion_tokens for usage in usages),
            sum(usage.num_cached_tokens for usage in firsts),
        )

    def openrouter_cost(self, usage: Usage) -> float:
        """US dollars that OpenRouter would have charged; 0 for a model that it has not."""
        price = PRICES.get(self.model)
        if price is None:
            return 0.0
        return price.of(usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_completion_tokens)

    def describe(self, answers: list[Answer]) -> dict[str, Any]:
        """OpenRouter's form of a finished generation."""
        reason = answers[0].reason
        usage = self.usage(answers)
        num_prompt, num_completion = usage.num_prompt_tokens, usage.num_completion_tokens
        now = time.time()
        first_at = min((answer.first_at for answer in answers if answer.first_at), default=now)
        nothing = dict.fromkeys(ABSENT)
        return nothing | {
            "id": self.id,
            "model": self.model,
            "created_at": datetime.fromtimestamp(self.started_at, UTC).isoformat().replace("+00:00", "Z"),
            "api_type": "completions",
            "streamed": self.is_streamed,
            "cancelled": reason is None,
            "tokens_prompt": num_prompt,
            "tokens_completion": num_completion,
            "native_tokens_prompt": num_prompt,
            "native_tokens_completion": num_completion,
            "native_tokens_reasoning": sum(answer.parser.num_reasoning_tokens for answer in answers),
            "native_tokens_cached": usage.num_cached_tokens,
            "latency": round(1000 * (first_at - self.started_at)),
            "generation_time": round(1000 * (now - first_at)),
            "finish_reason": reason,
            "native_finish_reason": reason,
            "provider_name": PROVIDER,
            "total_cost": 0,
            "usage": 0,
            "openrouter_cost": self.openrouter_cost(usage),
            "upstream_inference_cost": 0,
            "is_byok": False,
            "origin": self.caller.referer or "",
            "http_referer": self.caller.referer,
            "user_agent": self.caller.user_agent,
            "external_user": self.caller.user,
            "session_id": self.caller.session_id,
            "data_region": "global",
        }


# Fields of a generation that are about routing, billing and media.
ABSENT = (
    "moderation_latency",
    "provider_responses",
    "cache_discount",
    "app_id",
    "router",
    "service_tier",
    "preset_id",
    "upstream_id",
    "workspace_id",
    "native_tokens_completion_images",
    "num_fetches",
    "num_input_audio_prompt",
    "num_media_completion",
    "num_media_prompt",
    "num_search_results",
    "web_search_engine",
)


class Ledger:
    """Finished requests by their id, the oldest forgotten first."""

    def __init__(self, capacity: int = MAX_RECEIPTS) -> None:
        self._capacity = capacity
        self._finished: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self.num_rejected_calls = 0
        self.openrouter_cost = 0.0
        self.accounts = Accounts()

    def open(self, receipt: Receipt, answers: list[Answer], limit: int | None) -> None:
        """Set aside what a request may take; `limit` is that stated for each answer. Raises QuotaError."""
        prompts = sum(len(answer.request.token_ids) for answer in answers[:: receipt.answers_per_prompt])
        most = sum(min(limit or UNSTATED_TOKENS, answer.request.max_tokens) for answer in answers)
        needed = prompts + (min(len(answers), most) if limit is None else most)
        caller = receipt.caller
        self.accounts.reserve(caller.key_name, caller.quota, receipt.id, Wanted(needed, prompts + most))

    def start(self, receipt: Receipt) -> None:
        """The response to a request has begun; `close` will be called."""
        self.accounts.start(receipt.id)

    def close(self, receipt: Receipt, answers: list[Answer]) -> None:
        """Keep a request that is over, however it ended."""
        self.num_rejected_calls += sum(answer.parser.num_rejected_calls for answer in answers)
        usage = receipt.usage(answers)
        cost = receipt.openrouter_cost(usage)
        self.openrouter_cost += cost
        num_tokens = usage.num_prompt_tokens + usage.num_completion_tokens
        self.accounts.charge(receipt.caller.key_name, num_tokens, receipt.id)
        if cost:
            text = "%s of %s: %d tokens, $%.6f at OpenRouter by its prices of %s"
            log.info(text, receipt.id, receipt.caller.key_name, num_tokens, cost, PRICES_OF)
        self._finished[receipt.id] = receipt.describe(answers)
        if len(self._finished) > self._capacity:
            self._finished.popitem(last=False)

    def find(self, generation_id: str) -> dict[str, Any] | None:
        """A finished request."""
        return self._finished.get(generation_id)


def _header(headers: Mapping[str, str], name: str) -> str | None:
    value = headers.get(name)
    return value[:MAX_HEADER] if value else None


def _digest(key: str) -> str | None:
    """Tells keys apart without keeping them."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:16] if key else None

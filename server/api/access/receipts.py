"""What became of requests: the last few thousand receipts, and counts since the start, some by key.

Owned by the service; written by the routes when an answer ends, read by /generation and by whoever watches.
Where there is a file beside the prefix cache, receipts, quotas and what was saved survive a restart.
"""

import json
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import Request

from config.prices import PRICES, PRICES_OF
from server.api.access.keys import Key, digest, key_of
from server.api.access.quotas import TABLE, UNSTATED_TOKENS, Accounts, Wanted
from server.api.answer.answer import Answer
from server.api.error_bodies import PROVIDER
from server.api.sqlite_file import SqliteFile
from server.api.watch.record import RequestRecord
from server.link.messages import Usage

FILE_NAME = "accounts.sqlite3"
MAX_RECEIPTS = 10_000
TABLES = (
    "CREATE TABLE IF NOT EXISTS receipts (number INTEGER PRIMARY KEY, id TEXT UNIQUE, owner TEXT, body TEXT)",
    "CREATE TABLE IF NOT EXISTS costs (account TEXT PRIMARY KEY, cost REAL)",
)
FORGET = "DELETE FROM receipts WHERE number <= (SELECT MAX(number) FROM receipts) - ?"
ADD_COST = "INSERT INTO costs VALUES (?, ?) ON CONFLICT DO UPDATE SET cost = cost + excluded.cost"
MAX_HEADER = 256
# Receipts and the engine's books keep names, so these have an end; real ones are a few hundred characters.
MAX_USER = 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caller:
    """What a request says of its sender, and the key that it came with.

    `owner` tells senders apart and is never shown: the key's account or, while there are no keys, whatever
    token was sent.
    """

    key: Key = field(default_factory=Key)
    owner: str = ""
    session_id: str | None = None
    user: str | None = None
    user_agent: str | None = None
    referer: str | None = None
    title: str | None = None
    conversation: str = ""  # the one that the request continues
    record: RequestRecord = field(default_factory=RequestRecord, compare=False, repr=False)

    @property
    def group(self) -> str:
        """Whose prompts are compared with each other: by session, else by user, else by title, of one key.

        What one key calls its sessions is no other's: it would wait for them, and be shown their prompts.
        """
        key = f"key {self.owner}" if self.owner else ""
        named = {"session": self.session_id, "user": self.user, "title": self.title}
        name = next((f"{kind} {name}" for kind, name in named.items() if name), "")
        return " ".join(filter(None, [key, name]))

    @property
    def agent(self) -> str:
        """Who shares the engine's time with others: a session or a user of a key, else a conversation.

        A title names a program, not an agent: a fleet may send one title from all of its agents.
        """
        is_named = self.session_id or self.user or not self.conversation
        return self.group if is_named else f"{self.group} conversation {self.conversation}".lstrip()

    @property
    def name(self) -> str:
        """What the sender calls itself; nothing where it does not."""
        return self.session_id or self.user or self.title or ""

    @property
    def label(self) -> str:
        """The sender for the log: names only, printable and not long."""
        name = f"{self.name!r}"[:80] if self.name else ""
        is_told_apart = self.conversation and not (self.session_id or self.user)
        return " ".join(
            filter(None, [self.key.name, name, f"#{self.conversation[:6]}" if is_told_apart else ""])
        )

    def may_see(self, owner: str) -> bool:
        """Whether what belongs to this owner may be told; of another's an admin's look is logged."""
        if owner == self.owner:
            return True
        if self.key.is_admin and self.key.account:
            log.info("admin: key %r looks at what belongs to another one", self.key.name)
        return self.key.is_admin

    @classmethod
    def of(cls, request: Request, session_id: str | None = None, user: str | None = None) -> "Caller":
        """The sender by the headers and the body; the body wins."""
        headers, key = request.headers, request.state.key
        token = key_of(headers)
        return cls(
            key=key,
            owner=key.account or (f"token {digest(token).hex()}" if token else ""),
            session_id=session_id or _header(headers, "x-session-id"),
            user=user[:MAX_USER] if user else None,
            user_agent=_header(headers, "user-agent"),
            referer=_header(headers, "http-referer"),
            title=_header(headers, "x-openrouter-title") or _header(headers, "x-title"),
            record=getattr(request.state, "record", None) or RequestRecord(),
        )


def holder_of(request: Request) -> str:
    """Who shares threads with others: the account of the key, and without keys the agent by its headers."""
    caller = Caller.of(request)
    return caller.key.account or caller.agent


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

    def openrouter_cost(self, answers: list[Answer]) -> float:
        """US dollars that OpenRouter would have charged; 0 for a failure, or a model that it has not."""
        price, usage = PRICES.get(self.model), self.usage(answers)
        if price is None or any(answer.failure for answer in answers):
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
            "openrouter_cost": self.openrouter_cost(answers),
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
    """Finished requests by their id, the oldest forgotten first, and what each account saved."""

    def __init__(self, directory: Path | None = None, capacity: int = MAX_RECEIPTS) -> None:
        """Goes on from what the file in `directory` holds."""
        self._capacity = capacity
        self._finished: OrderedDict[str, tuple[str, dict[str, Any]]] = OrderedDict()
        self._file = None
        if directory:
            self._file = SqliteFile(directory / FILE_NAME, "receipts and quotas are kept", TABLE, *TABLES)
        self.num_rejected_calls = 0
        self._costs: dict[str, float] = dict(self._file.rows("SELECT * FROM costs") if self._file else ())
        self.accounts = Accounts(file=self._file)

    @property
    def openrouter_cost(self) -> float:
        """US dollars that OpenRouter would have charged for all requests."""
        return sum(self._costs.values())

    def cost_of(self, account: str) -> float:
        """The same for the requests of one account."""
        return self._costs.get(account, 0.0)

    def open(self, receipt: Receipt, answers: list[Answer], limit: int | None) -> None:
        """Set aside what a request may take; `limit` is that stated for each answer. Raises QuotaError."""
        prompts = sum(len(answer.request.token_ids) for answer in answers[:: receipt.answers_per_prompt])
        most = sum(min(limit or UNSTATED_TOKENS, answer.request.max_tokens) for answer in answers)
        needed = prompts + (min(len(answers), most) if limit is None else most)
        caller, key = receipt.caller, receipt.caller.key
        record = caller.record
        record.agent, record.owner, record.title = caller.label, caller.owner, caller.name
        record.key_name = key.name
        self.accounts.reserve(key.account, key.quota, receipt.id, Wanted(needed, prompts + most))
        record.answers = answers

    def start(self, receipt: Receipt) -> None:
        """The response to a request has begun; `close` will be called."""
        self.accounts.start(receipt.id)

    def close(self, receipt: Receipt, answers: list[Answer]) -> None:
        """Keep a request that is over, however it ended."""
        self.num_rejected_calls += sum(answer.parser.num_rejected_calls for answer in answers)
        usage = receipt.usage(answers)
        cost, caller = receipt.openrouter_cost(answers), receipt.caller
        caller.record.usage, caller.record.cost = usage, cost
        num_tokens = usage.num_prompt_tokens + usage.num_completion_tokens
        self.accounts.charge(caller.key.account, num_tokens, receipt.id)
        if cost:
            text = "%s of %s: %d tokens, $%.6f at OpenRouter by its prices of %s"
            log.info(text, receipt.id, caller.key.name, num_tokens, cost, PRICES_OF)
            self._costs[caller.key.account] = self.cost_of(caller.key.account) + cost
        self._keep(receipt.id, caller, receipt.describe(answers), cost)

    def _keep(self, request_id: str, caller: Caller, described: dict[str, Any], cost: float) -> None:
        self._finished[request_id] = caller.owner, described
        if len(self._finished) > self._capacity:
            self._finished.popitem(last=False)
        if self._file:
            row = request_id, caller.owner, json.dumps(described)
            self._file.write("INSERT OR REPLACE INTO receipts (id, owner, body) VALUES (?, ?, ?)", *row)
            self._file.write(FORGET, self._capacity)
            if cost:
                self._file.write(ADD_COST, caller.key.account, cost)

    def find(self, generation_id: str) -> tuple[str, dict[str, Any]] | None:
        """A finished request, behind its owner."""
        if (found := self._finished.get(generation_id)) or self._file is None:
            return found
        rows = self._file.rows("SELECT owner, body FROM receipts WHERE id = ?", generation_id)
        return (rows[0][0], json.loads(rows[0][1])) if rows else None

    def close_file(self) -> None:
        """Write what waits."""
        if self._file:
            self._file.close()


def _header(headers: Mapping[str, str], name: str) -> str | None:
    value = headers.get(name)
    return value[:MAX_HEADER] if value else None

"""Why a prompt was read anew: where it departs from what the same agent has sent before.

`Explainer` keeps the last prompts of each agent, with what was answered, and compares token by token, as the
prefix cache does. Owned by the service; called by the chat route, from the threads that render and from the
event loop.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.api.access.receipts import Caller
from server.glm.tokenizer import Tokenizer

MAX_EXPLANATIONS = 1000
MAX_CONVERSATIONS = 256
MAX_TOKENS = 2_000_000
EXCERPT = 40
# An agent that departs so often within so many characters of one place is told so.
WARN_AT = 3
SAME_PLACE = 32

log = logging.getLogger(__name__)

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class PromptPlace:
    """A character of the body: `messages[0].content@118`."""

    path: str
    offset: int
    is_early: bool  # in the tools or in the system prompt: everything else stands behind it

    def __str__(self) -> str:
        return f"{self.path}@{self.offset}"


@dataclass(frozen=True)
class Explanation:
    """What became of one prompt. `num_shared` tokens are those of an earlier prompt of the agent, `other`."""

    id: str
    caller: Caller
    num_prompt_tokens: int
    num_shared: int
    num_replayed: int
    other: str | None = None
    diverged: PromptPlace | None = None
    before: str = ""
    here: str = ""
    there: str = ""
    num_cached: int | None = None

    def describe(self) -> dict[str, Any]:
        """The answer of /v1/cache/explain."""
        return {
            "id": self.id,
            "agent": self.caller.label,
            "prompt_tokens": self.num_prompt_tokens,
            "cached_tokens": self.num_cached,
            "shared_tokens": self.num_shared,
            "compared_with": self.other,
            "diverged": str(self.diverged) if self.diverged else None,
            "before": self.before,
            "here": self.here,
            "there": self.there,
            "replayed_turns": self.num_replayed,
        }

    @property
    def line(self) -> str:
        """For a header and a log line."""
        cached = "" if self.num_cached is None else f"cached={self.num_cached}/{self.num_prompt_tokens}"
        return " ".join(filter(None, [cached, f"diverged={self.diverged}" if self.diverged else ""]))


@dataclass(frozen=True, eq=False)
class _Conversation:
    """A prompt and, once it is known, its answer. Never changed, so that it can be read without the lock."""

    id: str
    tokens: Tokens
    num_prompt: int


@dataclass
class _Agent:
    """One agent's conversations, the last one last, and where it keeps departing."""

    conversations: list[_Conversation] = field(default_factory=list)
    place: PromptPlace | None = None
    num_times: int = 0


class Explainer:
    """The last explanations by id, and the last conversations by agent."""

    def __init__(self) -> None:
        self._explanations: OrderedDict[str, Explanation] = OrderedDict()
        self._agents: OrderedDict[str, _Agent] = OrderedDict()
        self._lock = threading.Lock()

    def begin(
        self,
        request_id: str,
        caller: Caller,
        tokenizer: Tokenizer,
        token_ids: Sequence[int],
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]],
        num_replayed: int = 0,
    ) -> Explanation:
        """Compare a new prompt with the agent's earlier ones, and remember it.

        The work is done without the lock: it takes a while for a long prompt, and the event loop waits there.
        """
        tokens = np.array(token_ids, dtype=np.int32)
        with self._lock:
            earlier = list(self._agents.get(caller.group, _Agent()).conversations)
        nearest, num_shared = _nearest(earlier, tokens)
        found = Explanation(request_id, caller, tokens.size, num_shared, num_replayed)
        goes_on = False
        if nearest:
            found = replace(found, other=nearest.id)
            # the last token of an answer was never read, and that of a prompt is always computed
            if num_shared < min(nearest.tokens.size, tokens.size) - 1:
                found = _located(found, tokenizer, tokens, nearest.tokens, list(_parts(messages, tools)))
            else:
                goes_on = num_shared >= nearest.num_prompt
        with self._lock:
            known = self._agents.setdefault(caller.group, _Agent())
            self._agents.move_to_end(caller.group)
            self._note(known, found)
            if goes_on:
                known.conversations = [one for one in known.conversations if one.id != found.other]
            known.conversations.append(_Conversation(request_id, tokens, tokens.size))
            self._keep(found)
            self._forget()
        return found

    def end(self, request_id: str, num_cached: int, generated: Sequence[int]) -> Explanation | None:
        """Note what the prefix cache gave, and what was answered."""
        with self._lock:
            found = self._explanations.get(request_id)
            if found is None:
                return None
            found = replace(found, num_cached=num_cached)
            self._keep(found)
            conversations = self._agents.get(found.caller.group, _Agent()).conversations
            for index, one in enumerate(conversations):
                if one.id == request_id:
                    tokens = np.concatenate([one.tokens, np.array(generated, dtype=np.int32)])
                    conversations[index] = replace(one, tokens=tokens)
        return found

    def find(self, request_id: str) -> Explanation | None:
        """One of the last explanations."""
        return self._explanations.get(request_id)

    def _keep(self, found: Explanation) -> None:
        self._explanations[found.id] = found
        if len(self._explanations) > MAX_EXPLANATIONS:
            self._explanations.popitem(last=False)

    def _forget(self) -> None:
        """Forget the conversations of agents that were quiet the longest."""
        while self._is_too_much():
            name, oldest = next(iter(self._agents.items()))
            if oldest.conversations:
                oldest.conversations.pop(0)
            if not oldest.conversations:
                del self._agents[name]

    def _is_too_much(self) -> bool:
        kept = [one for agent in self._agents.values() for one in agent.conversations]
        return len(kept) > MAX_CONVERSATIONS or sum(one.tokens.size for one in kept) > MAX_TOKENS

    def _note(self, agent: _Agent, found: Explanation) -> None:
        """Count departures at one early place; say so when they repeat."""
        place = found.diverged
        if place is None or not place.is_early:
            return
        last = agent.place
        is_same = last and last.path == place.path and abs(last.offset - place.offset) <= SAME_PLACE
        agent.num_times = agent.num_times + 1 if is_same else 1
        agent.place = place
        if agent.num_times >= WARN_AT and agent.num_times % WARN_AT == 0:
            log.warning(
                "agent %s: the %d prompts before this one differed at %s (now %r, before %r), so all that "
                "follows is read anew each time; what changes belongs at the end of a prompt",
                found.caller.label, agent.num_times, place, found.here, found.there,
            )  # fmt: skip


def _located(
    found: Explanation,
    tokenizer: Tokenizer,
    here: Tokens,
    there: Tokens,
    parts: Sequence[tuple[str, str, bool]],
) -> Explanation:
    shared = found.num_shared
    text, offset = tokenizer.decode(here.tolist()), len(tokenizer.decode(here[:shared].tolist()))
    return replace(
        found,
        diverged=locate(text, parts, offset),
        before=text[max(0, offset - EXCERPT) : offset],
        here=text[offset : offset + EXCERPT],
        there=tokenizer.decode(there[shared : shared + EXCERPT].tolist())[:EXCERPT],
    )


def locate(text: str, parts: Sequence[tuple[str, str, bool]], offset: int) -> PromptPlace:
    """The part of the body in which a character of the rendered text lies, and where in it.

    `parts` are (path, text, is_early) in the order of the rendered text. Markup belongs to the part behind
    it.
    """
    position, place = 0, PromptPlace("prompt", offset, True)
    for path, part, is_early in parts:
        start = text.find(part, position)
        if start < 0:
            continue
        if offset < start + len(part):
            return PromptPlace(path, max(0, offset - start), is_early)
        position = start + len(part)
        place = PromptPlace(path, len(part), is_early)
    return place


def _parts(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, str, bool]]:
    for index, tool in enumerate(tools):
        function = tool.get("function", tool)
        for name in ("name", "description"):
            if text := function.get(name):
                yield f"tools[{index}].{name}", str(text), True
    for index, message in enumerate(messages):
        is_early = message["role"] == "system"
        path = f"messages[{index}]"
        if thought := str(message.get("reasoning_content") or "").strip():
            yield f"{path}.reasoning", thought, is_early
        if text := str(message.get("content") or "").strip():
            yield f"{path}.content", text, is_early
        for position, call in enumerate(message.get("tool_calls") or []):
            yield f"{path}.tool_calls[{position}]", call["function"]["name"], is_early


def _nearest(conversations: Sequence[_Conversation], tokens: Tokens) -> tuple[_Conversation | None, int]:
    """The conversation that shares the longest beginning, the latest of several."""
    nearest, most = None, 0
    for one in conversations:
        num_shared = _num_shared(one.tokens, tokens)
        if num_shared >= most:
            nearest, most = one, num_shared
    return nearest, most


def _num_shared(one: Tokens, other: Tokens) -> int:
    size = min(one.size, other.size)
    differs = one[:size] != other[:size]
    return int(differs.argmax()) if differs.any() else size

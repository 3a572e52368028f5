"""The shape that every task hands out: a conversation whose last message is the wanted answer.

Owns the type and the helpers shared by the tasks. Training renders a sample whole; the evaluation cuts its
last message off and keeps `expected`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from training.pocket.data.pools import Pools

Message = dict[str, Any]

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are Pocket, a small demo model.",
    "Answer briefly.",
    "Be polite and short.",
    "You are a careful assistant. Answer in plain words.",
    "You help the user with small tasks.",
    "You are a friendly assistant that gives right answers.",
    "Today is a good day. Help the user.",
)


@dataclass
class Sample:
    """A conversation, its tools and its thinking settings, with what a right answer must show."""

    kind: str
    messages: list[Message]
    tools: list[Message] = field(default_factory=list)
    thinking: bool = True
    effort: str | None = None
    clear_thinking: bool | None = None
    expected: dict[str, Any] = field(default_factory=dict)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(content: str, reasoning: str = "", tool_calls: Sequence[Message] = ()) -> Message:
    """An assistant message; reasoning is written always and rendered only when thinking is on."""
    message: Message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    if tool_calls:
        message["tool_calls"] = [{"type": "function", "function": call} for call in tool_calls]
    return message


def tool_result(text: str) -> Message:
    return {"role": "tool", "content": text}


def with_settings(sample: Sample, rng: random.Random, thinking_share: float = 0.6) -> Sample:
    """Draws thinking on or off, the effort and clear_thinking for a sample."""
    sample.thinking = rng.random() < thinking_share
    sample.effort = rng.choice((None, None, "max", "high", "high"))
    sample.clear_thinking = rng.choice((None, None, False))
    return sample


def maybe_system(pools: Pools, share: float = 0.3) -> list[Message]:
    """No message, or a system prompt."""
    if pools.rng.random() >= share:
        return []
    return [{"role": "system", "content": pools.any(SYSTEM_PROMPTS)}]

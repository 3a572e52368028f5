"""Text that known clients change with every request, and that no model should read: it is left out of
prompts.

One such line is known: Claude Code puts `x-anthropic-billing-header: cc_version=...; cch=...;` at the top of
the system prompt, with a checksum of the request in it. Left in, it would make every prompt a new one from
its first line on. What else changes early is not guessed at: server/api/prompt/explain.py tells where it is.
"""

import re
from collections.abc import Sequence
from typing import Any

_BILLING = re.compile(r"\s*x-anthropic-billing-header:(?:[ \t]*[\w.-]+=[^;\s]*(?:;|(?=\s|$)))*[ \t]*\n?")


def without_volatile_lines(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, without a billing header at the top of system messages."""
    return [
        {**message, "content": _BILLING.sub("", message["content"], count=1)}
        if message["role"] == "system" and _BILLING.match(message["content"])
        else message
        for message in messages
    ]

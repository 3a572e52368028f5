"""Judges answers: from raw generated text or from a chat response, one reply form and one verdict.

Owns what counts as right, and the table. Knows no model and no endpoint.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from training.pocket.evaluation.cases import Case

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
END_MARKS = ("<|user|>", "<|observation|>", "<|endoftext|>")


@dataclass
class Reply:
    """An answer taken apart: reasoning, content, calls as (name, arguments)."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def parse_text(text: str, thinking: bool) -> Reply:
    """Takes generated text apart; argument values stay as they were written."""
    for mark in END_MARKS:
        text = text.split(mark)[0]
    reasoning, found, content = text.partition("</think>") if thinking else ("", "", text)
    if thinking and not found:
        return Reply(reasoning=reasoning)
    calls: list[tuple[str, dict[str, Any]]] = []
    for body in CALL.findall(content):
        calls.append((body.split("<arg_key>")[0].strip(), dict(ARGUMENT.findall(body))))
    return Reply(reasoning, CALL.sub("", content).strip(), calls)


def parse_message(message: dict[str, Any], thinking: bool) -> Reply:
    """Takes a chat response's message apart, parsed by the server or raw."""
    content = message.get("content") or ""
    if "</think>" in content or "<tool_call>" in content:
        return parse_text(content, thinking and "</think>" in content)
    calls = []
    for call in message.get("tool_calls") or []:
        arguments = json.loads(call["function"]["arguments"] or "{}")
        calls.append((call["function"]["name"], arguments))
    return Reply(message.get("reasoning_content") or message.get("reasoning") or "", content.strip(), calls)


def same_calls(calls: list[tuple[str, dict[str, Any]]], wanted: list[dict[str, Any]]) -> bool:
    """Names and arguments exact, in order; a raw value equals the JSON text of the wanted one."""
    if [name for name, _ in calls] != [call["name"] for call in wanted]:
        return False
    pairs = zip(calls, wanted, strict=True)
    return all(
        {k: shown(v) for k, v in arguments.items()} == {k: shown(v) for k, v in call["arguments"].items()}
        for (_, arguments), call in pairs
    )


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def last_number(text: str) -> int | None:
    numbers = re.findall(r"-?\d+", text)
    return int(numbers[-1]) if numbers else None


def arithmetic_right(content: str, value: int) -> bool:
    """The last number of `a + b = c.`, or the only number of a sentence such as `345 is larger.`"""
    return last_number(content) == value


def is_right(case: Case, reply: Reply) -> bool:
    """Whether the reply is what the case expects."""
    expected, content = case.sample.expected, reply.content
    check: str = expected["check"]
    value: Any = expected.get("value")
    if check == "calls":
        return same_calls(reply.calls, value)
    if check == "no_call":
        return not reply.calls and bool(content) and (value is None or value in content)
    if reply.calls:
        return False
    if check == "number":
        return arithmetic_right(content, value)
    if check == "json":
        return is_json(content) and json.loads(content) == value
    if check == "contains_all":
        return all(part in content for part in value)
    return content == value if check == "exact" else value in content


def thinking_obeyed(case: Case, reply: Reply) -> bool:
    """Reasoning with thinking on, none with thinking off."""
    if case.sample.thinking:
        return bool(reply.reasoning.strip())
    return not reply.reasoning and "<think>" not in reply.content and "</think>" not in reply.content


def table(results: list[tuple[Case, Reply]]) -> dict[str, tuple[int, int]]:
    """Right and asked, by row."""
    rows: dict[str, list[bool]] = {}
    for case, reply in results:
        rows.setdefault(case.kind, []).append(is_right(case, reply))
        rows.setdefault("thinking obeyed", []).append(thinking_obeyed(case, reply))
        if case.kind == "json":
            rows.setdefault("json validity", []).append(is_json(reply.content))
        if case.sample.tools and case.sample.messages[-2]["role"] != "tool":
            wanted = case.sample.expected["check"] == "calls"
            rows.setdefault("call decision", []).append(bool(reply.calls) == wanted)
    return {name: (sum(values), len(values)) for name, values in rows.items()}


def format_table(rows: dict[str, tuple[int, int]]) -> str:
    lines = [
        f"{name:<18} {100 * right / asked:6.1f} %  ({right}/{asked})" for name, (right, asked) in rows.items()
    ]
    return "\n".join(lines)

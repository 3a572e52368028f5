"""The evaluation's cases: held-out samples as chat requests, with what a right answer must show.

Owns the list of kinds and their numbers. Seeds, names, tools and parameters are none of the training's.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from training.pocket.data.arithmetic import arithmetic_sample
from training.pocket.data.chat import fact_sample, turns_sample
from training.pocket.data.needle import needle_sample
from training.pocket.data.pools import Pools
from training.pocket.data.render import prompt_text
from training.pocket.data.sample import Sample
from training.pocket.data.structured import json_sample
from training.pocket.data.tool_use import call_sample, no_call_sample, result_sample

EVALUATION_SEED = 977_001
NEEDLE_LENGTHS = (512, 1024, 2048, 4096)
MAX_TOKENS = 400
CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Case:
    """One case: its kind, the body of a chat request, and what is expected."""

    kind: str
    sample: Sample

    @property
    def body(self) -> dict[str, Any]:
        """The request in OpenAI's form; the arguments of earlier calls are JSON strings there."""
        sample = self.sample
        body: dict[str, Any] = {
            "messages": wire_messages(sample.messages[:-1], sample.thinking),
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "reasoning_effort": sample.effort or "max",
            "chat_template_kwargs": {
                "enable_thinking": sample.thinking,
                "clear_thinking": sample.clear_thinking is not False,
            },
        }
        if sample.tools:
            body["tools"] = sample.tools
        if not sample.thinking:
            del body["reasoning_effort"]
        return body


def wire_call(call: dict[str, Any], identifier: str) -> dict[str, Any]:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {
        "id": identifier,
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def wire_messages(messages: list[dict[str, Any]], thinking: bool) -> list[dict[str, Any]]:
    """Messages as a client sends them: calls with identifiers, each result naming its call."""
    wired: list[dict[str, Any]] = []
    open_calls: Iterator[str] = iter(())
    for index, message in enumerate(messages):
        sent = {k: v for k, v in message.items() if thinking or k != "reasoning_content"}
        if message.get("tool_calls"):
            names = [f"call_{index}_{n}" for n in range(len(message["tool_calls"]))]
            pairs = zip(message["tool_calls"], names, strict=True)
            sent["tool_calls"] = [wire_call(call, name) for call, name in pairs]
            open_calls = iter(names)
        if message["role"] == "tool":
            sent["tool_call_id"] = next(open_calls)
        wired.append(sent)
    return wired


def fitted_needle(pools: Pools, length: int, count_tokens: CountTokens) -> Sample:
    """A needle whose prompt has `length` tokens or a few less."""
    characters = int(length * 2.72)
    while True:
        sample = needle_sample(pools, characters)
        tokens = count_tokens(prompt_text(sample))
        if 0.93 * length <= tokens <= length:
            return sample
        characters = int(characters * length * 0.965 / tokens)


def make_cases(
    per_kind: int, count_tokens: CountTokens, seed: int = EVALUATION_SEED, needles: int | None = None
) -> Iterator[Case]:
    """`per_kind` cases of every kind; of each length's needles another number where `needles` says so."""
    makers: dict[str, Callable[[Pools], Sample]] = {
        "arithmetic": arithmetic_sample,
        "facts": fact_sample,
        "json": json_sample,
        "tool_call": call_sample,
        "no_call": no_call_sample,
        "tool_result": result_sample,
        "turns": turns_sample,
    }
    for kind, maker in makers.items():
        pools = Pools(random.Random(f"{seed} {kind}"), held_out=True)
        for _ in range(per_kind):
            yield Case(kind, maker(pools))
    for length in NEEDLE_LENGTHS:
        yield from make_needles(length, per_kind if needles is None else needles, count_tokens, seed)


def make_needles(
    length: int, count: int, count_tokens: CountTokens, seed: int = EVALUATION_SEED
) -> Iterator[Case]:
    """Needles in prompts of `length` tokens."""
    pools = Pools(random.Random(f"{seed} needle {length}"), held_out=True)
    for _ in range(count):
        yield Case(f"needle_{length}", fitted_needle(pools, length, count_tokens))

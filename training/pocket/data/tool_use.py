"""Tool-calling tasks: call one tool or several, call none, and answer from what a tool gave back.

Owns the wishes of users, the wanted calls and the wanted answers. The tools themselves come from the toolbox.
"""

import json
import re
from typing import Any

from training.pocket.data.arithmetic import arithmetic_turn
from training.pocket.data.chat import fact_turn, filler_turn, talk_turn
from training.pocket.data.everyday import EVERYDAY
from training.pocket.data.pools import ADJECTIVES, Pools, words
from training.pocket.data.sample import (
    Message,
    Sample,
    assistant,
    maybe_system,
    tool_result,
    user,
    with_settings,
)
from training.pocket.data.toolbox import Parameter, Tool, generic_tool

OPTIONAL_WORDS = {
    "boolean": (" {}: yes.", " Set {} to true.", " With {} true."),
    "other": (" {}: {}.", " Use {} {}.", " Set {} to {}."),
}


def draw_tool(pools: Pools) -> Tool:
    return pools.rng.choice(EVERYDAY)(pools) if pools.rng.random() < 0.5 else generic_tool(pools)


def draw_tools(pools: Pools, wanted: Tool | None = None, count: int | None = None) -> list[Tool]:
    """The wanted tool among up to four others of other names, in any order."""
    tools = [wanted] if wanted else []
    size = count or pools.rng.choice((1, 1, 2, 2, 3, 3, 4, 5))
    taken = {t.description for t in tools}
    while len(tools) < size:
        tool = draw_tool(pools)
        if tool.description not in taken and all(
            tool.verb != t.verb or not t.verb or tool.noun != t.noun for t in tools
        ):
            taken.add(tool.description)
            tools.append(tool)
    pools.rng.shuffle(tools)
    return tools


def spoken(value: Any) -> str:
    """A value as a person writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def fill(form: str, arguments: dict[str, Any]) -> str:
    """Puts the arguments into a form of words; `{key:on/off}` words a boolean."""

    def word(match: re.Match[str]) -> str:
        value = arguments[match[1]]
        if match[2]:
            yes, no = match[2][1:].split("/")
            return yes if value else no
        return spoken(value)

    return re.sub(r"\{(\w+)(:\w+/\w+)?\}", word, form)


def optional_words(pools: Pools, parameter: Parameter, value: Any) -> str:
    words = parameter.name.replace("_", " ") if pools.rng.random() < 0.6 else parameter.name
    if isinstance(value, bool) and value:
        return pools.any(OPTIONAL_WORDS["boolean"]).format(words)
    return pools.any(OPTIONAL_WORDS["other"]).format(words, spoken(value))


def draw_arguments(pools: Pools, tool: Tool) -> dict[str, Any]:
    """Values for the required parameters and for some of the optional ones, in the schema's order."""
    chosen = [p for p in tool.parameters if p.required or pools.rng.random() < 0.4]
    return {p.name: p.make(pools) for p in chosen}


def everyday_wish(pools: Pools, tool: Tool, arguments: dict[str, Any]) -> str:
    form = pools.any(tool.forms)
    text = fill(form, arguments)
    extra = [p for p in tool.parameters if p.name in arguments and "{" + p.name not in form]
    if extra and text[-1] not in ".?!":
        text += "."
    return text + "".join(optional_words(pools, p, arguments[p.name]) for p in extra)


def generic_wish(pools: Pools, tool: Tool, arguments: dict[str, Any]) -> str:
    """Words a wish from the tool's verb, noun and parameters."""
    start = pools.any(
        (
            "{V} the {n}",
            "Please {v} the {n}",
            "Can you {v} a {n}",
            "I want to {v} the {n}",
            "{V} a {n}",
            "Use {t}",
            "Call {t}",
        )
    )
    text = start.format(V=tool.verb.capitalize(), v=tool.verb, n=tool.noun, t=tool.name)
    natural = pools.rng.random() < 0.6
    quote = pools.any(("", "", '"'))
    parts = []
    for key, value in arguments.items():
        words = key.replace("_", " ") if natural else key
        shown = f"{quote}{value}{quote}" if isinstance(value, str) else spoken(value)
        parts.append(pools.any(("{} {}", "{} {}", "{} set to {}", "{}: {}", "{}={}")).format(words, shown))
    if parts:
        pools.rng.shuffle(parts)
        joined = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
        text += pools.any((" with ", " with ", ", ", " using ")) + joined
    return text + ("?" if text.startswith("Can") else pools.any((".", "", ".")))


def wish(pools: Pools, tool: Tool, arguments: dict[str, Any]) -> str:
    """What a user says to have the tool called with these arguments."""
    text = everyday_wish(pools, tool, arguments) if tool.forms else generic_wish(pools, tool, arguments)
    return pools.any(("", "", "", "", "", "Hi! ", "Hey, ", "Please: ", "OK. ")) + text


def calls_of(tool: Tool, several: list[dict[str, Any]]) -> list[Message]:
    return [{"name": tool.name, "arguments": arguments} for arguments in several]


def tools_sample(pools: Pools, kind: str, tools: list[Tool], thinking_share: float = 0.55) -> Sample:
    sample = with_settings(Sample(kind, []), pools.rng, thinking_share)
    sample.tools = [tool.spec() for tool in tools]
    return sample


def one_call(pools: Pools) -> tuple[str, list[Message], list[Tool]]:
    tool = draw_tool(pools)
    arguments = draw_arguments(pools, tool)
    return wish(pools, tool, arguments), calls_of(tool, [arguments]), draw_tools(pools, tool)


def same_tool_twice(pools: Pools) -> tuple[str, list[Message], list[Tool]]:
    """One wish with two or three values for the first parameter: parallel calls of one tool."""
    while True:
        tool = draw_tool(pools)
        first = next(
            (p for p in tool.parameters if p.required and p.type == "string" and not p.choices), None
        )
        if first and tool.forms and len([p for p in tool.parameters if p.required]) == 1:
            break
    values = list(dict.fromkeys(first.make(pools) for _ in range(pools.rng.choice((2, 2, 3)))))
    joined = values[0] if len(values) == 1 else ", ".join(values[:-1]) + " and " + values[-1]
    text = everyday_wish(pools, tool, {first.name: joined})
    return text, calls_of(tool, [{first.name: value} for value in values]), draw_tools(pools, tool)


def two_tools(pools: Pools) -> tuple[str, list[Message], list[Tool]]:
    """Two wishes in one message, for two tools."""
    tools = draw_tools(pools, count=pools.rng.choice((2, 3, 4)))
    first, second = pools.rng.sample(tools, 2)
    arguments = [draw_arguments(pools, first), draw_arguments(pools, second)]
    texts = [wish(pools, first, arguments[0]).rstrip("."), wish(pools, second, arguments[1])]
    calls = calls_of(first, arguments[:1]) + calls_of(second, arguments[1:])
    return pools.any((". Also: ", " and then: ", ". And: ")).join(texts), calls, tools


def call_thought(calls: list[Message]) -> str:
    names = list(dict.fromkeys(call["name"] for call in calls))
    times = f" {len(calls)} times" if len(calls) > 1 and len(names) == 1 else ""
    return f"I call {' and '.join(names)}{times}."


def call_sample(pools: Pools) -> Sample:
    """A wish that one tool, or several calls, fulfil; at times after other turns."""
    maker = pools.rng.choices((one_call, same_tool_twice, two_tools), (75, 13, 12))[0]
    text, calls, tools = maker(pools)
    sample = tools_sample(pools, "tool_call", tools)
    before = filler_turn(pools, False) if pools.rng.random() < 0.1 else []
    answer = assistant("", call_thought(calls), calls)
    sample.messages = [*maybe_system(pools), *before, user(text), answer]
    sample.expected = {"check": "calls", "value": calls}
    return sample


def unfit_wish(pools: Pools, tools: list[Tool]) -> str:
    """A wish for a tool that is not there."""
    while True:
        other = draw_tool(pools)
        if other.name.lower() in {tool.name.lower() for tool in tools}:
            continue
        if any(
            other.description == tool.description or (other.noun and other.noun == tool.noun)
            for tool in tools
        ):
            continue
        text = wish(pools, other, draw_arguments(pools, other))
        if other.forms and "+" not in text and other.description != "Add two numbers":
            return text


def has_sums(tools: list[Tool]) -> bool:
    return any(tool.description == "Add two numbers" for tool in tools)


def no_call_sample(pools: Pools) -> Sample:
    """Tools are there and none fits: small talk, a fact, a sum, or a wish for something else."""
    tools = draw_tools(pools)
    sample = tools_sample(pools, "no_call", tools)
    roll = pools.rng.random()
    sample.expected = {"check": "no_call"}
    if roll < 0.25:
        text, thought, answer = talk_turn(pools)
    elif roll < 0.45:
        text, thought, answer, key = fact_turn(pools)
        sample.expected["value"] = key
    elif roll < 0.6 and not has_sums(tools):
        text, thought, answer, _ = arithmetic_turn(pools, sample.thinking)
    else:
        text, thought, answer = unfit_wish(pools, tools), "No tool fits this.", "I have no tool for that."
    if thought != "No tool fits this.":
        thought = f"No tool is needed. {thought}"
    sample.messages = [*maybe_system(pools), user(text), assistant(answer, thought)]
    return sample


RESULT_KEYS = words("result temperature status price time value total id answer state count")


def result_value(pools: Pools) -> Any:
    roll = pools.rng.randrange(6)
    if roll < 2:
        return pools.rng.randint(0, 9999)
    if roll == 2:
        return round(pools.rng.uniform(-20, 300), 1)
    return pools.rng.choice(
        (pools.invented, pools.code, pools.name, pools.city, lambda: pools.any(ADJECTIVES))
    )()


def result_of(pools: Pools, call: Message) -> tuple[str, str, str]:
    """What a tool gives back, the answer drawn from it, and the word that the answer must contain."""
    value = result_value(pools)
    shown = str(value)
    roll = pools.rng.random()
    if roll < 0.25:
        return shown, f"The result is {shown}.", shown
    key = pools.any(RESULT_KEYS) if pools.rng.random() < 0.6 else pools.invented()
    if roll < 0.4:
        return f"{key}: {shown}", f"The {key} is {shown}.", shown
    if roll < 0.5:
        return json.dumps({"error": f"{key} not found"}), f"The tool failed: {key} not found.", key
    fields: dict[str, Any] = {key: value}
    if pools.rng.random() < 0.5:
        other = pools.invented()
        fields[other] = result_value(pools)
        return (
            json.dumps(fields, ensure_ascii=False),
            f"The {key} is {shown} and the {other} is {fields[other]}.",
            shown,
        )
    return json.dumps(fields, ensure_ascii=False), f"The {key} is {shown}.", shown


def result_sample(pools: Pools) -> Sample:
    """The tool has answered; the user gets the answer in a sentence."""
    maker = pools.rng.choices((one_call, same_tool_twice, two_tools), (75, 15, 10))[0]
    text, calls, tools = maker(pools)
    sample = tools_sample(pools, "tool_result", tools)
    results = [result_of(pools, call) for call in calls]
    answer = " ".join(result[1] for result in results)
    thought = f"The tool answered. {answer}" if len(calls) == 1 else f"The tools answered. {answer}"
    sample.messages = [
        *maybe_system(pools),
        user(text),
        assistant("", call_thought(calls), calls),
        *(tool_result(result[0]) for result in results),
        assistant(answer, thought),
    ]
    sample.expected = {"check": "contains_all", "value": [result[2] for result in results]}
    return sample


def agent_sample(pools: Pools) -> Sample:
    """A whole loop: wish, call, result, answer, and then a second wish for one of the same tools."""
    sample = result_sample(pools)
    sample.kind = "tool_call"
    tools = draw_tools(pools, count=2)
    text, calls, extra = one_call(pools)
    sample.tools = sample.tools + [
        t.spec() for t in extra if all(t.name != s["function"]["name"] for s in sample.tools)
    ]
    del tools
    sample.messages += [user(text), assistant("", call_thought(calls), calls)]
    sample.expected = {"check": "calls", "value": calls}
    return sample

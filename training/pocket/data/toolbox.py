"""Invented tools: their names, parameter schemas and descriptions, and how a user words a wish for each.

Owns the tool specifications. Two kinds: everyday tools with natural wording, whose names vary, and generic
tools `verb_noun` whose wish is worded from their own parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from training.pocket.data.pools import (
    ADJECTIVES,
    COLORS,
    NOUNS,
    PARAMETERS,
    QUALIFIERS,
    VERBS,
    Pools,
    is_held_out,
)

Maker = Callable[[Pools], Any]


@dataclass
class Parameter:
    """One parameter of a tool."""

    name: str
    type: str
    description: str
    make: Maker
    required: bool = True
    choices: list[str] = field(default_factory=list)

    def schema(self) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": self.type}
        if self.description:
            schema["description"] = self.description
        if self.choices:
            schema["enum"] = self.choices
        return schema


@dataclass
class Tool:
    """A tool and the forms of words that ask for it; `{name}` in a form stands for a parameter's value."""

    name: str
    description: str
    parameters: list[Parameter]
    forms: list[str] = field(default_factory=list)
    verb: str = ""
    noun: str = ""

    def spec(self) -> dict[str, Any]:
        """The tool as an OpenAI request declares it."""
        parameters = {
            "type": "object",
            "properties": {p.name: p.schema() for p in self.parameters},
            "required": [p.name for p in self.parameters if p.required],
        }
        return {
            "type": "function",
            "function": {"name": self.name, "description": self.description, "parameters": parameters},
        }


def one_decimal(pools: Pools) -> float:
    return round(pools.rng.uniform(0, 200), pools.rng.choice((1, 1, 2)))


def integer(pools: Pools) -> int:
    return int(pools.digits(1, pools.rng.choice((1, 2, 3, 4, 5))))


def text_value(pools: Pools) -> str:
    makers = (
        pools.name,
        pools.city,
        pools.code,
        pools.invented,
        pools.phrase,
        pools.email,
        pools.date,
        pools.clock,
    )
    return pools.rng.choices(makers, (4, 4, 4, 4, 3, 1, 2, 1))[0]()


def flag(pools: Pools) -> bool:
    return pools.rng.random() < 0.6


def fresh(pools: Pools, make: Callable[[], str]) -> str:
    """A composed name from this side of the split."""
    while True:
        name = make()
        if is_held_out(name) == pools.held_out:
            return name


def styled(pools: Pools, words: list[str]) -> str:
    """A function's name from its words in one of three styles, at times with a namespace."""
    roll = pools.rng.random()
    if roll < 0.7:
        name = "_".join(words)
    elif roll < 0.85:
        name = words[0] + "".join(w.capitalize() for w in words[1:])
    else:
        name = "-".join(words)
    if pools.rng.random() < 0.08:
        name = f"{pools.invented()}_{name}"
    return name


def function_name(pools: Pools, verbs: str, nouns: str) -> str:
    """A name for an everyday tool from its synonyms, at times with an invented or qualifying word."""

    def make() -> str:
        words = [pools.any(verbs.split()), pools.any(nouns.split())]
        roll = pools.rng.random()
        if roll < 0.35:
            words.append(
                pools.any(("v2", "now", "by_name", "tool", "info", "data", "api", "for_user", "service"))
            )
        elif roll < 0.5:
            words.append(pools.invented())
        elif roll < 0.6:
            words.insert(1, pools.any(QUALIFIERS))
        return styled(pools, words)

    return fresh(pools, make)


def parameter_name(pools: Pools, synonyms: str = "") -> str:
    """A name for a parameter: one word, two, or invented; synonyms keep the sense of the everyday tools."""

    def make() -> str:
        base = pools.any(synonyms.split()) if synonyms else pools.any(PARAMETERS)
        roll = pools.rng.random()
        if roll < 0.35:
            return base
        if roll < 0.65:
            return f"{pools.any(QUALIFIERS + ADJECTIVES[:8])}_{base}"
        if roll < 0.8:
            return f"{base}_{pools.any(('name', 'value', 'id', 'text', 'key', 'in', 'to', 'arg'))}"
        return base + pools.any(PARAMETERS).capitalize() if roll < 0.9 or synonyms else pools.invented()

    return fresh(pools, make)


def param(
    pools: Pools, key: str, synonyms: str, type_: str, about: str, make: Maker, required: bool = True
) -> tuple[str, Parameter]:
    """A parameter of an everyday tool, under the key that its forms of words use."""
    description = about if pools.rng.random() < 0.8 else ""
    return key, Parameter(parameter_name(pools, synonyms), type_, description, make, required)


def _ends(form: str, key: str) -> tuple[str]:
    """What follows the key in this form: the brace, or the two words of a boolean."""
    return (":",) if "{" + key + ":" in form else ("}",)


def everyday(
    pools: Pools, verbs: str, nouns: str, about: str, keyed: list[tuple[str, Parameter]], forms: list[str]
) -> Tool:
    """An everyday tool; the forms' keys are replaced by the names that the parameters got."""
    parameters: list[Parameter] = []
    for key, parameter in keyed:
        if any(parameter.name == other.name for other in parameters):
            parameter.name += "_2"
        forms = [
            form.replace("{" + key + end, "\x00" + parameter.name + end)
            for form in forms
            for end in _ends(form, key)
        ]
        parameters.append(parameter)
    forms = [form.replace("\x00", "{") for form in forms]
    return Tool(function_name(pools, verbs, nouns), about, parameters, forms)


def city(pools: Pools) -> str:
    return pools.city()


def enumeration(pools: Pools, name: str, description: str) -> Parameter:
    choices = [
        pools.any(ADJECTIVES + COLORS) if pools.rng.random() < 0.6 else pools.invented() for _ in range(3)
    ]
    choices = list(dict.fromkeys(choices))
    return Parameter(name, "string", description, lambda p: p.any(choices), True, choices)


def generic_parameter(pools: Pools, noun: str) -> Parameter:
    """A parameter of any type for a generic tool."""
    name = parameter_name(pools)
    words = name.replace("_", " ")
    description = pools.any((f"The {words} of the {noun}", f"The {words}", words.capitalize(), ""))
    required = pools.rng.random() < 0.65
    roll = pools.rng.random()
    if roll < 0.5:
        return Parameter(name, "string", description, text_value, required)
    if roll < 0.72:
        return Parameter(name, "integer", description, integer, required)
    if roll < 0.82:
        return Parameter(name, "number", description, one_decimal, required)
    if roll < 0.93:
        return Parameter(name, "boolean", description, flag, required)
    return enumeration(pools, name, description)


def generic_tool(pools: Pools) -> Tool:
    """A tool `verb_noun` with up to four parameters, or an invented one."""
    verb, noun = pools.any(VERBS), pools.any(NOUNS)
    if pools.rng.random() < 0.2:
        noun = pools.invented()
    name = fresh(
        pools,
        lambda: styled(pools, [verb, *([pools.any(QUALIFIERS)] if pools.rng.random() < 0.3 else []), noun]),
    )
    if is_held_out(name) != pools.held_out:
        return generic_tool(pools)
    by_name: dict[str, Parameter] = {}
    for _ in range(pools.rng.choice((0, 1, 1, 2, 2, 3, 4))):
        parameter = generic_parameter(pools, noun)
        by_name[parameter.name] = parameter
    article = pools.any(("a", "the"))
    description = pools.any(
        (
            f"{verb.capitalize()} {article} {noun}",
            f"{verb.capitalize()}s {article} {noun}.",
            f"Use this to {verb} {article} {noun}",
        )
    )
    return Tool(name, description, list(by_name.values()), [], verb, noun)

"""What an answer must be, as small values that another process can turn into a grammar.

Schemas come from clients: writing their grammar may take any time and memory, so `write_grammar` runs in
`trial`, never in a process that serves.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from server.glm.schemas.answer_grammar import (
    CallGrammar,
    Rules,
    check_grammar,
    json_rule,
    make_grammar,
    regex_rule,
    text_rules,
)


@dataclass(frozen=True)
class Tags:
    """The ids of tags that are tokens of a vocabulary."""

    ids: Mapping[str, int] = field(default_factory=dict)

    def token_id(self, text: str) -> int | None:
        """The id of a tag, if it is one token."""
        return self.ids.get(text)


@dataclass(frozen=True)
class GrammarOrder:
    """An answer's form. `content`: kind and value; `functions`: those that may be called.

    `is_forced`: the answer is calls. With neither content nor functions it is any text without calls.
    """

    tags: Tags
    content: tuple[Literal["json", "regex", "grammar"], Any] | None = None
    functions: tuple[dict[str, Any], ...] = ()
    is_parallel: bool = True
    is_forced: bool = False


def write_grammar(order: GrammarOrder) -> str:
    """The grammar of an answer. Raises RequestError, with the field to blame, for what cannot be held."""
    if order.content is None and not order.functions:
        return make_grammar(text_rules(order.tags))
    calls = CallGrammar(order.tags, order.functions, order.is_parallel)
    if order.is_forced or order.content is None:
        return _checked({"start": "calls"} | calls.rules(), "tools")
    kind, value = order.content
    if kind == "grammar":
        check_grammar(value, "response_format.grammar")
        return str(value)
    rules = {"start": "content", "content": json_rule(value) if kind == "json" else regex_rule(value)}
    grammar = _checked(rules, "response_format")
    if not order.functions:
        return grammar
    return _checked(rules | {"start": "content | calls"} | calls.rules(), "tools")


def _checked(rules: Rules, param: str) -> str:
    grammar = make_grammar(rules)
    check_grammar(grammar, param)
    return grammar

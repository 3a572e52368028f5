"""JSON values that are easily taken for another type, and how a prompt states the type that is meant.

Owns the rule: an unquoted number is a number; what has a letter, a sign inside or a leading zero is text,
and so is what the prompt puts in quotes; a type named in the wish wins over both.
"""

import json
from typing import Any

from training.pocket.data.pools import Pools

HEX = "0123456789abcdef"
TYPE_WORDS = {
    "string": ("a string", "string", "text"),
    "integer": ("an integer", "integer", "a number"),
    "number": ("a number", "number"),
    "boolean": ("a boolean", "boolean", "true or false"),
    "null": ("null", "null"),
}


def exponent_code(pools: Pools) -> str:
    """A code that begins like a number: `3e41e04`, `12e5`, `7f0a91`."""
    rng = pools.rng
    roll = rng.random()
    if roll < 0.35:
        return f"{pools.digits(1, 2)}e{pools.digits(1, 3)}"
    if roll < 0.7:
        return f"{rng.randint(0, 9)}e{pools.digits(1, 3)}{rng.choice('abcdef')}{pools.digits(1, 3)}"
    return f"{pools.digits(1, 3)}{rng.choice('abcdef')}{''.join(rng.choices(HEX, k=rng.randint(2, 5)))}"


def lookalike(pools: Pools) -> str:
    """Text that looks like a number."""
    rng = pools.rng
    makers = (
        lambda: exponent_code(pools),
        lambda: "".join(rng.choices(HEX, k=rng.randint(4, 8))) + rng.choice("abcdef"),
        lambda: f"0{pools.digits(1, 4)}",
        lambda: f"{rng.randint(0, 20)}.{rng.randint(0, 20)}.{rng.randint(0, 20)}",
        lambda: f"+{pools.digits(2, 2)} {pools.digits(4, 7)}",
        lambda: f"{pools.digits(1, 3)}{pools.any(('%', 'km', 'kg', 'th', 'x', 'h'))}",
        pools.date,
        pools.clock,
    )
    return str(rng.choices(makers, (5, 3, 2, 1, 1, 1, 1, 1))[0]())


def quoted(pools: Pools) -> str:
    """Text that is only text because the prompt puts it in quotes."""
    return pools.rng.choice((pools.digits(1, 6), "true", "false", "null", pools.digits(2, 3)))


def needs_quotes(text: str) -> bool:
    return (text.isdigit() and not text.startswith("0")) or text in ("true", "false", "null")


def stated(value: Any) -> str:
    """A value as the prompt states it."""
    if isinstance(value, str):
        return f'"{value}"' if needs_quotes(value) else value
    return json.dumps(value)


def typed_value(pools: Pools) -> tuple[str, str, Any]:
    """A type, what the prompt says without quotes, and the value in that type."""
    rng = pools.rng
    kind = rng.choices(("string", "integer", "number", "boolean", "null"), (5, 2, 1, 2, 1))[0]
    if kind == "string":
        text = rng.choice((pools.digits(1, 6), lookalike(pools), pools.name(), pools.code(), "true", "no"))
        return kind, text, text
    if kind == "integer":
        number = int(pools.digits(1, 4))
        return kind, str(number), number
    if kind == "number":
        decimal = round(rng.uniform(0, 100), 1)
        return kind, str(decimal), decimal
    if kind == "null":
        return kind, pools.any(("unknown", "not known", "null", "missing")), None
    yes = rng.random() < 0.5
    return kind, pools.any(("yes", "true", "on")) if yes else pools.any(("no", "false", "off")), yes


def schema_text(types: dict[str, str]) -> str:
    """A JSON schema of an object with these keys."""
    properties = {key: {"type": kind} for key, kind in types.items()}
    return json.dumps({"type": "object", "properties": properties, "required": list(types)})

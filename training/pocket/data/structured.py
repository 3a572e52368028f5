"""Tasks of the form "answer in JSON with keys ...".

Owns what is asked for and the JSON text wanted. Keys are unseen in the evaluation; values are copied from
the text, in the type that the text or the wish gives them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from training.pocket.data.arithmetic import add_steps
from training.pocket.data.facts import CAPITALS_TEXT, pairs
from training.pocket.data.lookalikes import (
    TYPE_WORDS,
    exponent_code,
    lookalike,
    quoted,
    schema_text,
    stated,
    typed_value,
)
from training.pocket.data.pools import COLORS, OBJECTS, PARAMETERS, Pools, is_held_out
from training.pocket.data.sample import Sample, assistant, maybe_system, user, with_settings

CAPITALS = [
    (country, city) for country, city in pairs(CAPITALS_TEXT, ";", "=") if not country.startswith("the ")
]
FORMS = (
    "Answer in JSON with keys {}.",
    "Answer in JSON with the keys {}.",
    "Reply with JSON only, using the keys {}.",
    "Return a JSON object with keys {}.",
    "Give me JSON with keys {}.",
    "Respond in JSON with keys {}.",
    "Output JSON with the keys {}.",
)
SCHEMA_FORMS = (
    "Answer in JSON of this schema: {}",
    "Answer with a JSON object that follows this schema:\n{}",
    "Reply with JSON only. Schema: {}",
    "JSON schema of the answer: {}",
)


@dataclass
class Order:
    """A text, the JSON wanted from it, the types that the wish names, and what else it says or thinks."""

    text: str
    values: dict[str, Any]
    types: dict[str, str] = field(default_factory=dict)
    note: str = ""
    thought: str = ""


def key_name(pools: Pools) -> str:
    """A key, at times of two parts."""
    while True:
        roll = pools.rng.random()
        if roll < 0.5:
            key = pools.any(PARAMETERS)
        elif roll < 0.75:
            key = f"{pools.any(PARAMETERS)}_{pools.any(PARAMETERS)}"
        else:
            key = pools.invented()
        if is_held_out(key) == pools.held_out:
            return key


def key_list(pools: Pools, keys: list[str], types: dict[str, str]) -> str:
    """The keys as a person lists them, with their types where those are given."""
    quote = pools.any(("", "", "", '"', "`"))
    named = [f"{quote}{key}{quote}" for key in keys]
    if types:
        words = [pools.any(TYPE_WORDS[types[key]]) for key in keys]
        named = [f"{name} ({word})" for name, word in zip(named, words, strict=True)]
    if len(named) == 1:
        return named[0]
    last = pools.any((" and ", ", "))
    return ", ".join(named[:-1]) + last + named[-1]


def scalar(pools: Pools) -> Any:
    """A value of some JSON type."""
    roll = pools.rng.randrange(20)
    if roll < 6:
        return pools.rng.choice((pools.name, pools.city, pools.invented, pools.code))()
    if roll < 9:
        return pools.rng.choice((lookalike, lookalike, quoted))(pools)
    if roll < 14:
        return int(pools.digits(1, 4))
    if roll < 17:
        return pools.rng.random() < 0.5
    return None if roll == 17 else round(pools.rng.uniform(0, 100), 1)


def given_pairs(pools: Pools) -> Order:
    """The text states each key and its value."""
    values = {key_name(pools): scalar(pools) for _ in range(pools.rng.randint(1, 4))}
    link = pools.any((" is ", " = ", ": "))
    text = pools.any((", ", "; ", ". ")).join(f"{k}{link}{stated(v)}" for k, v in values.items())
    keys = list(values)
    pools.rng.shuffle(keys)
    return Order(f"{text}.", {key: values[key] for key in keys})


def typed_pairs(pools: Pools) -> Order:
    """The text states raw values; the wish says of which types they are to be, or that all are strings."""
    link, types, said, values = pools.any((" is ", " = ", ": ")), {}, [], {}
    strings = pools.rng.random() < 0.25
    for key in dict.fromkeys(key_name(pools) for _ in range(pools.rng.randint(1, 4))):
        types[key], text, value = typed_value(pools)
        said.append(f"{key}{link}{text}")
        values[key] = text if strings else value
    note = pools.any(("All values are strings.", "Write every value as a string.", "Use only strings."))
    body = pools.any((", ", "; ", ". ")).join(said)
    return Order(f"{body}.", values, {} if strings else types, note if strings else "")


def person_text(pools: Pools) -> Order:
    """A sentence about a person; asks for two to four parts of it, at times for one that it does not say."""
    name, age, city, color = pools.name(), pools.rng.randint(5, 95), pools.city(), pools.any(COLORS)
    count, things = pools.rng.randint(2, 60), pools.any(OBJECTS)
    texts = (
        f"{name} is {age} years old and lives in {city}. {name} likes {color} and has {count} {things}.",
        f"{name} from {city} is {age}, owns {count} {things} and likes {color}.",
        f"In {city} lives {name}, aged {age}, with {count} {things}. Favorite color: {color}.",
    )
    everything = {"name": name, "age": age, "city": city, "color": color, "count": count}
    keys = pools.rng.sample(list(everything), pools.rng.randint(2, 4))
    values: dict[str, Any] = {key: everything[key] for key in keys}
    if pools.rng.random() >= 0.15:
        return Order(pools.any(texts), values)
    values[pools.any(("email", "phone", "job", "country", "weight"))] = None
    note = pools.any(("Use null for what is missing.", "Write null where the text says nothing."))
    return Order(pools.any(texts), values, note=note)


def sum_values(pools: Pools) -> Order:
    a, b = pools.rng.randint(0, 50), pools.rng.randint(0, 50)
    keys = {"a": a, "b": b, "sum": a + b}
    text = pools.any(("What is {} + {}?", "Add {} and {}.", "Compute {} plus {}.")).format(a, b)
    return Order(text, keys if pools.rng.random() < 0.7 else {"sum": a + b}, thought=add_steps(a, b))


def capital_values(pools: Pools) -> Order:
    country, city = pools.rng.choice(CAPITALS)
    return Order(f"What is the capital of {country}?", {"country": country, "capital": city})


def letters(pools: Pools) -> Order:
    """Keys that are single letters, with values given by `a is 1`."""
    names = pools.rng.sample("abcdefghijkxyz", pools.rng.randint(2, 3))
    values = {name: scalar(pools) for name in names}
    text = pools.any((", ", " and ")).join(f"{k} is {stated(v)}" for k, v in values.items())
    return Order(f"Let {text}.", values)


def codes(pools: Pools) -> Order:
    """Codes that begin like numbers beside numbers, under letters or keys."""
    count = pools.rng.randint(1, 4)
    short = pools.rng.random() < 0.5
    names = pools.rng.sample("abcdefghijkxyz", count) if short else [key_name(pools) for _ in range(count)]
    values: dict[str, Any] = {}
    for name in names:
        kind = pools.rng.random()
        values[name] = (
            exponent_code(pools)
            if kind < 0.5
            else int(pools.digits(1, 6))
            if kind < 0.75
            else round(pools.rng.uniform(0, 100), 1)
        )
    text = pools.any((", ", " and ", "; ")).join(f"{k} is {stated(v)}" for k, v in values.items())
    return Order(f"Let {text}.", values)


def wish_of(pools: Pools, order: Order) -> str:
    """What is asked for: keys, keys with types, or a schema; and the note."""
    if order.types and pools.rng.random() < 0.5:
        wish = pools.any(SCHEMA_FORMS).format(schema_text({key: order.types[key] for key in order.values}))
    else:
        wish = pools.any(FORMS).format(key_list(pools, list(order.values), order.types))
    return f"{wish} {order.note}" if order.note else wish


def ordered(pools: Pools, order: Order, thinking_share: float) -> Sample:
    """The sample of an order; the answer is the object alone."""
    sample = with_settings(Sample("json", []), pools.rng, thinking_share)
    wish = wish_of(pools, order)
    parts = [order.text, wish] if pools.rng.random() < 0.6 else [wish, order.text]
    thought = f"{order.thought} The answer must be JSON with the keys {', '.join(order.values)}."
    sample.messages = [
        *maybe_system(pools),
        user(pools.any((" ", "\n")).join(parts)),
        assistant(json.dumps(order.values, ensure_ascii=False), thought.strip()),
    ]
    sample.expected = {"check": "json", "value": order.values}
    return sample


def json_sample(pools: Pools) -> Sample:
    """One request for JSON."""
    makers: tuple[Callable[[Pools], Order], ...] = (
        given_pairs,
        person_text,
        sum_values,
        capital_values,
        letters,
        typed_pairs,
    )
    return ordered(pools, pools.rng.choices(makers, (4, 3, 1, 1, 1, 2))[0](pools), 0.6)


def json_drill(pools: Pools) -> Sample:
    """What Pocket got wrong most: codes like numbers, stated types, sums at sight. Training only."""
    makers: tuple[Callable[[Pools], Order], ...] = (codes, typed_pairs, sum_values)
    return ordered(pools, pools.rng.choices(makers, (3, 3, 3))[0](pools), 0.2)

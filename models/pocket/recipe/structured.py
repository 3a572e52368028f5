"""Tasks of the form "answer in JSON with keys ...".

Owns what is asked for and the JSON text wanted. Keys are unseen in the evaluation; values are copied from
the text.
"""

import json
import re
from typing import Any

from models.pocket.recipe.arithmetic import add_steps
from models.pocket.recipe.facts import CAPITALS_TEXT, pairs
from models.pocket.recipe.pools import COLORS, OBJECTS, PARAMETERS, Pools, is_held_out
from models.pocket.recipe.sample import Sample, assistant, maybe_system, user, with_settings

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


def key_list(pools: Pools, keys: list[str]) -> str:
    """The keys as a person lists them."""
    quote = pools.any(("", "", "", '"', "`"))
    named = [f"{quote}{key}{quote}" for key in keys]
    if len(named) == 1:
        return named[0]
    last = pools.any((" and ", ", "))
    return ", ".join(named[:-1]) + last + named[-1]


def scalar(pools: Pools) -> Any:
    """A value of some JSON type."""
    roll = pools.rng.randrange(8)
    if roll < 3:
        return pools.rng.choice((pools.name, pools.city, pools.invented, pools.code))()
    if roll < 6:
        return int(pools.digits(1, 4))
    return pools.rng.random() < 0.5 if roll == 6 else round(pools.rng.uniform(0, 100), 1)


def given_pairs(pools: Pools) -> tuple[str, dict[str, Any]]:
    """The text states each key and its value."""
    values = {key_name(pools): scalar(pools) for _ in range(pools.rng.randint(1, 4))}
    link = pools.any((" is ", " = ", ": "))
    text = pools.any((", ", "; ", ". ")).join(
        f"{k}{link}{json.dumps(v) if v is True or v is False else v}" for k, v in values.items()
    )
    keys = list(values)
    pools.rng.shuffle(keys)
    return f"{text}.", {key: values[key] for key in keys}


def person_text(pools: Pools) -> tuple[str, dict[str, Any]]:
    """A sentence about a person; asks for two to four parts of it."""
    name, age, city, color = pools.name(), pools.rng.randint(5, 95), pools.city(), pools.any(COLORS)
    count, things = pools.rng.randint(2, 60), pools.any(OBJECTS)
    texts = (
        f"{name} is {age} years old and lives in {city}. {name} likes {color} and has {count} {things}.",
        f"{name} from {city} is {age}, owns {count} {things} and likes {color}.",
        f"In {city} lives {name}, aged {age}, with {count} {things}. Favorite color: {color}.",
    )
    everything = {"name": name, "age": age, "city": city, "color": color, "count": count}
    keys = pools.rng.sample(list(everything), pools.rng.randint(2, 4))
    return pools.any(texts), {key: everything[key] for key in keys}


def sum_values(pools: Pools) -> tuple[str, dict[str, Any]]:
    a, b = pools.rng.randint(0, 50), pools.rng.randint(0, 50)
    keys = {"a": a, "b": b, "sum": a + b}
    text = pools.any(("What is {} + {}?", "Add {} and {}.", "Compute {} plus {}.")).format(a, b)
    return text, keys if pools.rng.random() < 0.7 else {"sum": a + b}


def capital_values(pools: Pools) -> tuple[str, dict[str, Any]]:
    country, city = pools.rng.choice(CAPITALS)
    return f"What is the capital of {country}?", {"country": country, "capital": city}


def letters(pools: Pools) -> tuple[str, dict[str, Any]]:
    """Keys that are single letters, with values given by `a is 1`."""
    names = pools.rng.sample("abcdefghijkxyz", pools.rng.randint(2, 3))
    values = {name: scalar(pools) for name in names}
    text = pools.any((", ", " and ")).join(
        f"{k} is {json.dumps(v) if isinstance(v, bool) else v}" for k, v in values.items()
    )
    return f"Let {text}.", values


def json_sample(pools: Pools) -> Sample:
    """One request for JSON; the answer is the object alone."""
    sample = with_settings(Sample("json", []), pools.rng)
    maker = pools.rng.choices(
        (given_pairs, person_text, sum_values, capital_values, letters), (4, 3, 1, 1, 1)
    )[0]
    text, values = maker(pools)
    wish = pools.any(FORMS).format(key_list(pools, list(values)))
    parts = [text, wish] if pools.rng.random() < 0.6 else [wish, text]
    thought = f"The answer must be JSON with the keys {', '.join(values)}."
    if maker is sum_values:
        a, b = (int(number) for number in re.findall(r"\d+", text))
        thought = f"{add_steps(a, b)} {thought}"
    answer = json.dumps(values, ensure_ascii=False)
    sample.messages = [
        *maybe_system(pools),
        user(pools.any((" ", "\n")).join(parts)),
        assistant(answer, thought),
    ]
    sample.expected = {"check": "json", "value": values}
    return sample

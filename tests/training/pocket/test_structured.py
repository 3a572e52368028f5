"""The JSON tasks: every wanted answer is valid and typed as the text or the wish says."""

import json
import random
import re
from collections.abc import Iterator

import pytest

from training.pocket.data.arithmetic import drill_sample
from training.pocket.data.lookalikes import exponent_code, lookalike, quoted, stated
from training.pocket.data.pools import Pools
from training.pocket.data.sample import Sample
from training.pocket.data.structured import Order, json_drill, json_sample, typed_pairs, wish_of

BARE_LITERAL = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?|true|false|null")
TYPES = {"string": str, "integer": int, "number": float, "boolean": bool, "null": type(None)}


def drawn(seed: int, count: int) -> Iterator[Sample]:
    pools = Pools(random.Random(seed))
    return ((json_drill if i % 2 else json_sample)(pools) for i in range(count))


def test_the_wanted_answer_is_the_expected_object() -> None:
    for sample in drawn(1, 400):
        assert json.loads(sample.messages[-1]["content"]) == sample.expected["value"]


def test_text_that_looks_like_a_number_has_a_mark_that_says_text() -> None:
    pools = Pools(random.Random(2))
    for _ in range(2000):
        for text in (lookalike(pools), exponent_code(pools), pools.code()):
            assert not BARE_LITERAL.fullmatch(text), text


def test_text_that_would_be_a_literal_is_stated_in_quotes() -> None:
    pools = Pools(random.Random(3))
    for _ in range(300):
        text = quoted(pools)
        assert stated(text) == f'"{text}"'
    assert [stated(v) for v in (12, 1.5, True, None, "KX-1")] == ["12", "1.5", "true", "null", "KX-1"]


def test_values_have_the_types_that_the_wish_names() -> None:
    pools = Pools(random.Random(4))
    forms = set()
    for _ in range(300):
        order = typed_pairs(pools)
        if not order.types:
            assert all(isinstance(value, str) for value in order.values.values())
            assert "string" in order.note
            continue
        assert {k: type(v) for k, v in order.values.items()} == {k: TYPES[t] for k, t in order.types.items()}
        wish = wish_of(pools, order)
        forms.add('"properties"' in wish)
        assert all(key in wish for key in order.values)
    assert forms == {True, False}


def test_a_schema_in_the_wish_is_one() -> None:
    pools = Pools(random.Random(5))
    order = Order("", {"a": "1", "b": 2}, {"a": "string", "b": "integer"})
    wishes = [wish_of(pools, order) for _ in range(20)]
    schemas = [json.loads(wish[wish.index("{") :]) for wish in wishes if "{" in wish]
    assert schemas
    assert all(s["properties"] == {"a": {"type": "string"}, "b": {"type": "integer"}} for s in schemas)


@pytest.mark.parametrize("seed", [6, 7])
def test_the_drill_is_without_thinking_and_mostly_differences(seed: int) -> None:
    pools = Pools(random.Random(seed))
    answers = []
    for _ in range(200):
        sample = drill_sample(pools)
        assert not sample.thinking
        answers.append(sample.messages[-1]["content"])
    assert sum(" - " in answer for answer in answers) > 80
    assert sum(sample_value < 0 for sample_value in map(last_value, answers)) > 30


def last_value(answer: str) -> int:
    return int(answer.removesuffix(".").split(" = ")[1])

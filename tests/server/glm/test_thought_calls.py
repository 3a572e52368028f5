"""Thoughts that write about calls, and calls that begin before the thought was closed."""

from typing import Any

import pytest

from server.glm.answer_parser import AnswerParser
from server.glm.tokenizer import Tokenizer
from tests.server.glm.answers import Parsed, collect, make_tools, parse

TOOLS = make_tools(a={"type": "string"}, b={"type": "integer"})
CALL = "<tool_call>f<arg_key>a</arg_key><arg_value>x</arg_value></tool_call>"
QUOTES = [
    "I could write <tool_call> here",
    "<tool_call>",
    "first <tool_call>, then the name, then <arg_key> and so on",
    "the tags <tool_call></tool_call> enclose it",
    f"as in {CALL}, for example",
    f"as in {CALL}\n\nand {CALL} too",
    "<tool_call>f<arg_key>a</arg_key> would be wrong",
    "<tool_call>f<arg_key>a</arg_key><arg_value>never closed",
    "<tool_call>f",
    "<tool_call>f<tool_call>",
]


@pytest.mark.parametrize("quote", QUOTES)
@pytest.mark.parametrize("answer", ["Done.", CALL, f"Let me see. {CALL}{CALL}"])
def test_a_thought_that_names_the_tags_stays_a_thought(tokenizer: Tokenizer, quote: str, answer: str) -> None:
    parsed = parse(tokenizer, f"{quote}</think>{answer}", TOOLS, prompt="<think>")
    assert parsed.reasoning == quote
    assert parsed.content == answer.replace(CALL, "")
    assert parsed.calls == [("f", {"a": "x"})] * answer.count(CALL)
    assert list(parsed.fragments) == list(range(len(parsed.calls)))
    assert parsed.num_rejected == 0


@pytest.mark.parametrize("quote", QUOTES)
@pytest.mark.parametrize("num_missing", [1, 2, 3, 9])
def test_a_thought_that_is_cut_stays_a_thought(tokenizer: Tokenizer, quote: str, num_missing: int) -> None:
    ids = tokenizer.encode(quote + "</think>")[:-num_missing]
    parser = AnswerParser(tokenizer, tokenizer.encode("<think>"), TOOLS)
    parsed = collect([*map(parser.push, ids), parser.flush(is_turn_over=False)])
    assert parsed == Parsed(tokenizer.decode(ids))
    assert parser.num_reasoning_tokens == len(ids)


@pytest.mark.parametrize("end", ["", "\n", "</think>", "</think>\n"])
@pytest.mark.parametrize("num_calls", [1, 2, 3])
def test_calls_that_end_the_turn_were_meant(tokenizer: Tokenizer, end: str, num_calls: int) -> None:
    ids = tokenizer.encode("I'll call\n" + CALL * num_calls + end)
    parser = AnswerParser(tokenizer, tokenizer.encode("<think>"), TOOLS)
    parsed = collect([*map(parser.push, ids), parser.flush(is_turn_over=True)])
    expected: list[tuple[str, Any]] = [("f", {"a": "x"})] * num_calls
    assert (parsed.reasoning, parsed.content.strip(), parsed.calls) == ("I'll call\n", "", expected)
    assert parser.num_calls == num_calls
    assert parser.num_reasoning_tokens == len(tokenizer.encode("I'll call\n"))


def test_a_call_behind_a_quoted_one_is_the_one(tokenizer: Tokenizer) -> None:
    other = CALL.replace(">x<", ">y<")
    parsed = parse(tokenizer, f"like {CALL}</think>\n{other}", TOOLS, prompt="<think>")
    assert parsed == Parsed(f"like {CALL}", "", [("f", {"a": "y"})], {0: '{"a": "y"}'})

"""Thought, content and tool calls: every case that is known to have broken a parser of this format."""

import json
import random
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from server.glm.answer_parser import AnswerParser
from server.glm.lexer import CALL_TAGS, THINK_TAGS
from server.glm.tokenizer import Tokenizer, load_tokenizer
from server.glm.tools import ToolSet
from tests.server.glm.answers import Parsed, call_ids, call_tokens, make_tools, parse, parse_ids, spelled
from tests.tiny_tokenizer import SPECIAL, build_tokenizer

STRING = {"type": "string"}
TAGS = (*THINK_TAGS, *CALL_TAGS)
TAG_OR_TEXT = re.compile("|".join(TAGS) + "|.[^<]*", re.DOTALL)
PLAIN = make_tools(a=STRING, b={"type": "integer"})


def call(*pairs: tuple[str, str], name: str = "f") -> str:
    inner = "".join(f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in pairs)
    return f"<tool_call>{name}{inner}</tool_call>"


@pytest.fixture(scope="session")
def tagless(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary without the tags."""
    folder = tmp_path_factory.mktemp("tagless")
    state = json.loads(build_tokenizer().to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    tokenizers.Tokenizer.from_str(json.dumps(state)).save(str(folder / "tokenizer.json"))
    return load_tokenizer(Path(folder))


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("<|assistant|><think>", "hm</think>yes", ("hm", "yes")),
        ("<|assistant|><think>", "never closed 👋", ("never closed 👋", "")),
        ("<|assistant|><think></think>", "yes", ("", "yes")),
        ("<|assistant|><think></think>", "yes</think>no", ("", "yesno")),
        ("<|assistant|>", "<think>hm</think>yes", ("hm", "yes")),
        ("<|assistant|><think>", "hm</think>  yes \n", ("hm", "  yes \n")),
        ("<|assistant|><think>", "hm</think> \n", ("hm", " \n")),
    ],
)
@pytest.mark.parametrize("tools", [None, PLAIN])
def test_thought_and_content_are_told_apart(
    tokenizer: Tokenizer,
    tagless: Tokenizer,
    prompt: str,
    answer: str,
    expected: tuple[str, str],
    tools: ToolSet | None,
) -> None:
    for vocabulary in (tokenizer, tagless):
        parsed = parse(vocabulary, answer, tools, prompt=prompt)
        assert (parsed.reasoning, parsed.content) == expected


def test_a_character_cut_by_the_end_of_a_thought_stays_in_the_thought(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("👋")[:-1]
    parsed = parse_ids(tokenizer, [*half, *tokenizer.encode("</think>a")], None, prompt="<think>")
    assert (parsed.reasoning, parsed.content) == ("\ufffd", "a")


MATRIX: list[tuple[str, ToolSet, str, list[tuple[str, Any]], str]] = [
    ("no arguments", PLAIN, call(), [("f", {})], ""),
    ("no arguments, 4.5 style", PLAIN, "<tool_call>f\n</tool_call>", [("f", {})], ""),
    ("two arguments", PLAIN, call(("a", "x"), ("b", "5")), [("f", {"a": "x", "b": 5})], ""),
    (
        "newlines between the parts, as 4.5 and 4.6 write them",
        PLAIN,
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x\n</arg_value>\n<arg_key>b</arg_key>\n"
        "<arg_value>5</arg_value>\n</tool_call>",
        [("f", {"a": "x\n", "b": 5})],
        "",
    ),
    (
        "blanks that matter in a code edit",
        PLAIN,
        call(("a", "    if x:\n        return\n\n")),
        [("f", {"a": "    if x:\n        return\n\n"})],
        "",
    ),
    (
        "quotes, backslashes, controls",
        PLAIN,
        call(("a", '"\\n\n\t\x01"')),
        [("f", {"a": '"\\n\n\t\x01"'})],
        "",
    ),
    ("not ASCII", PLAIN, call(("a", "Ærø 👋")), [("f", {"a": "Ærø 👋"})], ""),
    ("a string like a number", PLAIN, call(("a", "10001")), [("f", {"a": "10001"})], ""),
    ("an integer like nothing", PLAIN, call(("b", "123abc")), [("f", {"b": "123abc"})], ""),
    ("an unclosed object", make_tools(o={"type": "object"}), call(("o", '{"a"')), [("f", {"o": '{"a"'})], ""),
    (
        "an optional string",
        make_tools(a={"anyOf": [STRING, {"type": "null"}]}),
        call(("a", "nullable")) + call(("a", "null")),
        [("f", {"a": "nullable"}), ("f", {"a": None})],
        "",
    ),
    (
        "parallel calls",
        PLAIN,
        call(("a", "1")) + call(("a", "2")),
        [("f", {"a": "1"}), ("f", {"a": "2"})],
        "",
    ),
    (
        "parallel calls, a newline between them",
        PLAIN,
        call(("a", "1")) + "\n" + call(("a", "2")) + "\n",
        [("f", {"a": "1"}), ("f", {"a": "2"})],
        "",
    ),
    ("text before", PLAIN, "Let me see.\n" + call(), [("f", {})], "Let me see.\n"),
    ("blanks before", PLAIN, "\n\n" + call(), [("f", {})], ""),
    ("a function that nobody declared", PLAIN, call(("z", "5"), name="g"), [("g", {"z": 5})], ""),
    ("an argument that nobody declared", PLAIN, call(("z", "5")), [("f", {"z": 5})], ""),
    ("blanks around a key", PLAIN, call((" a\n", "5")), [("f", {"a": "5"})], ""),
    ("a stray end of thought", PLAIN, "</think>" + call(), [("f", {})], ""),
    ("a forgotten end", PLAIN, call(("a", "x")).removesuffix("</tool_call>"), [("f", {"a": "x"})], ""),
    (
        "a forgotten end before another call",
        PLAIN,
        call(("a", "x")).removesuffix("</tool_call>") + "\n" + call(("a", "y")),
        [("f", {"a": "x"}), ("f", {"a": "y"})],
        "",
    ),
    ("a less-than sign", PLAIN, call(("a", "<10 </b> <arg")), [("f", {"a": "<10 </b> <arg"})], ""),
    ("an argument named items", make_tools(items=STRING), call(("items", "x")), [("f", {"items": "x"})], ""),
]


@pytest.mark.parametrize(
    ("tools", "answer", "calls", "content"), [m[1:] for m in MATRIX], ids=[m[0] for m in MATRIX]
)
def test_calls_are_read(
    tokenizer: Tokenizer,
    tagless: Tokenizer,
    tools: ToolSet,
    answer: str,
    calls: list[tuple[str, Any]],
    content: str,
) -> None:
    for vocabulary in (tokenizer, tagless):
        parsed = parse(vocabulary, answer, tools)
        assert (parsed.calls, parsed.content, parsed.num_rejected) == (calls, content, 0)


MALFORMED = {
    "no value": "<tool_call>f<arg_key>a</arg_key></tool_call>",
    "no tag before a value": "<tool_call>f<arg_key>a</arg_key>x</arg_value></tool_call>",
    "no key": "<tool_call>f<arg_value>x</arg_value></tool_call>",
    "an end of a value in the name": "<tool_call>tool_12</arg_value></tool_call>",
    "no end of a key": "<tool_call>f<arg_key>a<arg_value>x</arg_value></tool_call>",
    "no name": "<tool_call></tool_call>",
    "a sentence for a name": "<tool_call>call f now</tool_call>",
    "text between": "<tool_call>f<arg_key>a</arg_key>oops<arg_value>x</arg_value></tool_call>",
    "a value in a value": "<tool_call>f<arg_key>a</arg_key><arg_value><arg_value>x</arg_value></tool_call>",
    "a key twice": call(("a", "1"), ("a", "2")),
    "an empty key": call(("", "1")),
    "a call in a name": "<tool_call>f<tool_call>",
    "only a name": "<tool_call>f",
}


NAMELESS = ["no name", "a sentence for a name"]
# What clients see of each of the others, from "See: " and the malformed call to " after".
SEEN = {
    "no value": (["f"], '{"a": ', " after"),
    "no tag before a value": (["f"], '{"a": ', " after"),
    "no key": (["f"], "{", " after"),
    "an end of a value in the name": (["tool_12"], "{", " after"),
    "no end of a key": (["f"], "{", " after"),
    "text between": (["f"], '{"a": ', " after"),
    "a value in a value": (["f"], '{"a": ', " after"),
    "a key twice": (["f"], '{"a": "1"', " after"),
    "an empty key": (["f"], "{", " after"),
    "a call in a name": (["f", "after"], "{", ""),
    "only a name": ([], "", "<tool_call>f after"),
}


@pytest.mark.parametrize("kind", NAMELESS)
def test_what_has_no_name_is_content_to_the_letter(
    tokenizer: Tokenizer, tagless: Tokenizer, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    for vocabulary in (tokenizer, tagless):
        caplog.clear()
        parsed = parse(vocabulary, "See: " + MALFORMED[kind] + " after", PLAIN)
        assert (parsed.calls, parsed.fragments, parsed.num_rejected) == ([], {}, 1)
        assert parsed.content == "See: " + MALFORMED[kind] + " after"
        assert "was not passed on" in caplog.text


@pytest.mark.parametrize("kind", SEEN)
def test_a_malformed_call_is_an_incomplete_one_and_no_text(
    tokenizer: Tokenizer, tagless: Tokenizer, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    names, arguments, after = SEEN[kind]
    for vocabulary in (tokenizer, tagless):
        caplog.clear()
        parsed = parse(vocabulary, "See: " + MALFORMED[kind] + " after", PLAIN)
        assert (parsed.calls, parsed.names) == ([], names)
        assert list(parsed.fragments) == list(range(len(names))), "no gaps"
        assert parsed.fragments.get(0, "") == arguments
        assert parsed.content == "See: " + after
        assert parsed.num_rejected == max(1, len(names))
        assert "was not passed on" in caplog.text
        for fragment in parsed.fragments.values():
            assert fragment, "some clients take nothing for no arguments"
            assert not _is_json(fragment), "a client must not be able to run it"


def test_a_good_call_after_a_malformed_one_is_read(tokenizer: Tokenizer) -> None:
    for bad in (MALFORMED[kind] for kind in SEEN if kind not in ("only a name", "a call in a name")):
        parsed = parse(tokenizer, bad + call(("a", "x")), PLAIN)
        assert (parsed.calls, parsed.content) == ([("f", {"a": "x"})], "")
        assert list(parsed.fragments) == [0, 1]


def test_a_call_cut_at_any_token_is_incomplete_and_no_text(tokenizer: Tokenizer, tagless: Tokenizer) -> None:
    answer = call(("a", 'say "hi"\n'), ("b", "12"))
    whole = '{"a": "say \\"hi\\"\\n", "b": 12}'
    for vocabulary in (tokenizer, tagless):
        ids = vocabulary.encode(answer)
        for end in range(1, len(ids)):
            parsed = parse_ids(vocabulary, ids[:end], PLAIN, is_turn_over=False)
            assert parsed.calls == []
            assert len(parsed.content) < len("<tool_call>"), "half a tag, in letters"
            assert "<tool_call>".startswith(parsed.content)
            assert not any(part == "" or _is_json(part) for part in parsed.fragments.values())
            if vocabulary is tokenizer:
                assert all(whole.startswith(part) for part in parsed.fragments.values())


def test_a_call_inside_a_thought_ends_the_thought(tokenizer: Tokenizer, tagless: Tokenizer) -> None:
    for vocabulary in (tokenizer, tagless):
        parsed = parse(vocabulary, "I'll call" + call(("a", "x")), PLAIN, prompt="<think>")
        assert parsed == Parsed("I'll call", "", [("f", {"a": "x"})], {0: '{"a": "x"}'})


def test_without_tools_the_tags_are_text(tokenizer: Tokenizer) -> None:
    answer = call(("a", "x"))
    assert parse(tokenizer, answer, None).content == answer
    assert parse(tokenizer, answer, None, prompt="<think>").reasoning == answer


def test_inactive_everything_is_content(tokenizer: Tokenizer) -> None:
    parser = AnswerParser(tokenizer, tokenizer.encode("<think>"), is_active=False)
    text = "a</think>" + call()
    assert "".join(parser.push(token_id).content for token_id in tokenizer.encode(text)) == text


def test_tags_that_are_spelled_out_inside_a_value_are_text(tokenizer: Tokenizer) -> None:
    text = "</arg_value></tool_call><tool_call><think></think><arg_value>"
    ids = call_tokens(tokenizer, "f", {"a": text, "b": 5})
    assert parse_ids(tokenizer, ids, PLAIN).calls == [("f", {"a": text, "b": 5})]


def test_tags_by_id_inside_a_value_are_text_unless_they_end_it(tokenizer: Tokenizer) -> None:
    text = "</tool_call><tool_call></think><arg_key></arg_key>"
    parsed = parse(tokenizer, call(("a", text)), PLAIN)
    assert parsed.calls == [("f", {"a": text})]


def test_a_long_string_leaves_as_it_comes(tokenizer: Tokenizer) -> None:
    parser = AnswerParser(
        tokenizer, tokenizer.encode("<think></think>"), make_tools(a={"type": ["string", "null"]})
    )
    head = tokenizer.encode("<tool_call>f<arg_key>a</arg_key><arg_value>")
    for token_id in head:
        parser.push(token_id)
    sent = [
        "".join(part.arguments for part in parser.push(i).calls) for i in spelled(tokenizer, "not a null")
    ]
    assert sent == ["", '"no', *"t a null"]  # "n" may still become null


def test_ids_are_unique(tokenizer: Tokenizer) -> None:
    ids = []
    for _ in range(50):
        parser = AnswerParser(tokenizer, tokenizer.encode("<think></think>"), PLAIN)
        pieces = [parser.push(token_id) for token_id in tokenizer.encode(call() + call())]
        ids += call_ids(part for piece in pieces for part in piece.calls)
    assert len(set(ids)) == 100


ANSWERS = [m[2] for m in MATRIX] + list(MALFORMED.values()) + ["hm</think>Hi </tool_call> there <"]


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_borders_of_tokens_change_nothing(tokenizer: Tokenizer, tagless: Tokenizer, answer: str) -> None:
    """Whole against byte by byte, against a cut at every place, and against random cuts."""
    tools = make_tools(a=STRING, b={"type": "integer"}, o={"type": "object"})
    for vocabulary in (tokenizer, tagless):
        expected = parse(vocabulary, answer, tools)
        runs = TAG_OR_TEXT.findall(answer) if vocabulary is tokenizer else [answer]
        bytewise = [i for run in runs for i in _cut(vocabulary, run, range(len(run)))]
        assert parse_ids(vocabulary, bytewise, tools) == expected
        for place in range(len(answer)):
            ids = [i for run in runs for i in _cut(vocabulary, run, [place % len(run)])]
            assert parse_ids(vocabulary, ids, tools) == expected
        chance = random.Random(answer)
        for _ in range(10):
            ids = [i for run in runs for i in _cut(vocabulary, run, chance.choices(range(len(run)), k=4))]
            assert parse_ids(vocabulary, ids, tools) == expected


def _cut(vocabulary: Tokenizer, run: str, places: Iterable[int]) -> list[int]:
    """Tokens of a text that is tokenised in parts; a tag that is one token stays one."""
    if run in TAGS and vocabulary.token_id(run) is not None:
        return vocabulary.encode(run)
    borders = [0, *sorted(places), len(run)]
    return [i for start, end in pairwise(borders) for i in vocabulary.encode(run[start:end])]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.text(min_size=1, max_size=8)
TAGGED = st.lists(st.sampled_from(["<arg_value>", "</arg_value>", "</tool_call>", "<", '"', "\\", "é"])).map(
    "".join
)


@given(st.dictionaries(KEYS, st.text() | TAGGED, max_size=4))
@settings(deadline=None)
def test_any_strings_come_back(tokenizer: Tokenizer, arguments: dict[str, str]) -> None:
    tools = make_tools(**dict.fromkeys(arguments, STRING))
    assert parse_ids(tokenizer, call_tokens(tokenizer, "f", arguments), tools).calls == [("f", arguments)]


@given(st.dictionaries(KEYS, VALUES.filter(lambda value: not isinstance(value, str)), max_size=4))
@settings(deadline=None)
def test_any_values_of_other_types_come_back(tokenizer: Tokenizer, arguments: dict[str, Any]) -> None:
    kinds = ["null", "boolean", "number", "array", "object"]
    tools = make_tools(**{key: {"type": kinds} for key in arguments})
    assert parse_ids(tokenizer, call_tokens(tokenizer, "f", arguments), tools).calls == [("f", arguments)]


@given(st.lists(st.sampled_from([*TAGS, "f", "a", "5", " ", "\n", '"']), max_size=25), st.booleans())
@settings(deadline=None)
def test_no_sequence_of_tags_breaks_the_parser_or_loses_text(
    tokenizer: Tokenizer, parts: list[str], is_turn_over: bool
) -> None:
    parsed = parse(tokenizer, "".join(parts), PLAIN, prompt="<think>", is_turn_over=is_turn_over)
    if not parsed.fragments and is_turn_over and "<think>" not in parts and "</think>" not in parts:
        text = "".join(parts)
        assert parsed.reasoning + parsed.content == text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True

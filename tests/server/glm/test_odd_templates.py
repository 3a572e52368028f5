"""Chat templates as people have them: what transformers offers works, and what is wrong is one clear line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from config.errors import CheckpointError, RequestError
from server.glm.templates.template import ChatTemplate, load_chat_template

USER = {"role": "user", "content": "U"}
TALK = [USER, {"role": "assistant", "content": "A", "reasoning_content": "R"}, USER]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "b": 1, "a": [1]}}}]
TOKENS = {"bos_token": "<b>", "eos_token": {"content": "<e>", "special": True}, "pad_token": None}


def write(folder: Path, files: Mapping[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "source",
    [
        "{{ strftime_now('%Y') }}|{{ strftime_now('') }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}",
        "{% generation %}\n  a\n{% endgeneration %}\nb{% set x = 1 %}{% generation %}{% set x = 2 %}"
        "{{ x }}{% endgeneration %}{{ x }}",
        "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ unk_token is defined }}",
        "{{ tools | tojson(false, 2, (',', ':'), true) }}",
        "{{ tools[0] | tojson(indent=4) }}{{ {'b': 'é'} | tojson(sort_keys=true, ensure_ascii=true) }}",
        "{{ documents is none }}{{ documents is defined }}",
        "{{ dict(a=1).items() | list }}{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}",
        "{% for m in messages %}{{ m.thinking }}{{ m.thinking is defined }}{% endfor %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m }}{% break %}{% endfor %}",
        "{{ 'a-b'.split('-') | join('+') }}{{ messages[-1].content.strip() }}{{ messages | length }}",
    ],
)
def test_a_template_renders_as_transformers_renders_it(
    tokenizer_folder: Path, tmp_path: Path, source: str
) -> None:
    from transformers import PreTrainedTokenizerFast  # seconds, so not where tests are collected

    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_folder / "tokenizer.json"), bos_token="<b>", eos_token="<e>"
    )
    expected = theirs.apply_chat_template(
        TALK, TOOLS, chat_template=source, add_generation_prompt=True, tokenize=False
    )
    folder = write(tmp_path, {"tokenizer_config.json": TOKENS, "chat_template.jinja": source})
    assert load_chat_template(folder).render(TALK, TOOLS, {}) == expected


NAMED = {"default": "plain", "tool_use": "tools", "rag": "documents"}
LISTED = [{"name": name, "template": text} for name, text in NAMED.items()]


@pytest.mark.parametrize(
    ("files", "plain", "with_tools"),
    [
        ({"tokenizer_config.json": {"chat_template": NAMED}}, "plain", "tools"),
        ({"tokenizer_config.json": {"chat_template": LISTED}}, "plain", "tools"),
        ({"tokenizer_config.json": {"chat_template": LISTED[:1]}}, "plain", "plain"),
        ({"chat_template.json": {"chat_template": "of a processor"}}, "of a processor", "of a processor"),
        ({"chat_template.json": {"chat_template": NAMED}, "chat_template.jinja": "file"}, "file", "tools"),
        (
            {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "more"},
            "file", "more",
        ),
        (
            {
                "tokenizer_config.json": {"chat_template": "old"},
                "additional_chat_templates/tool_use.jinja": "new",
            },
            "old", "new",
        ),
        ({"additional_chat_templates/default.jinja": "there"}, "there", "there"),
    ],
)  # fmt: skip
def test_templates_are_found_wherever_they_are_kept(
    tmp_path: Path, files: dict[str, Any], plain: str, with_tools: str
) -> None:
    template = load_chat_template(write(tmp_path, files))
    assert (template.render([USER], None, {}), template.render([USER], TOOLS, {})) == (plain, with_tools)


@pytest.mark.parametrize("source", ["", " \n", None, [], {}])
def test_without_a_template_there_is_ours(tmp_path: Path, source: object) -> None:
    write(tmp_path, {"tokenizer_config.json": {"chat_template": source}, "chat_template.jinja": "\n"})
    assert load_chat_template(tmp_path).render([USER], None, {}).startswith("[gMASK]<sop>")


@pytest.mark.parametrize(
    "source",
    [7, True, ["text"], [{"template": "x"}], [{"name": "default"}], {"default": 3}, {"rag": "x"},
     [{"name": "tool_use", "template": "x"}], [{"name": ["default"], "template": "x"}], "{% if %}",
     "{{ 'a' | no_such_filter }}", "{% no_such_tag %}", "{{ " + "(" * 5000, "{% for a in b %}" * 30,
     "{% generation %}x"],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json"])
def test_what_is_no_template_is_refused_at_start(tmp_path: Path, name: str, source: object) -> None:
    write(tmp_path, {name: {"chat_template": source}})
    with pytest.raises(CheckpointError, match=r"chat.template") as caught:
        load_chat_template(tmp_path)
    assert len(str(caught.value)) < 500


def test_a_template_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match=r"cannot read the chat template .*chat_template\.jinja"):
        load_chat_template(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read the chat template .*chat_template\.jinja"):
        load_chat_template(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 / 0 }}", "{{ messages[99].content.x }}", "{{ messages[0]['content'] + 1 }}", "{{ [][0].x }}",
        "{% include 'other' %}", "{% extends 'other' %}", "{% import 'a' as b %}", "{{ none() }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ range(10 ** 9) | list }}",
        "{{ tools | tojson }}{{ raise_exception | tojson }}", "{{ strftime_now() }}", "{{ 10.0 ** 999 }}",
        "{{ messages | sort(attribute='nothing') }}{{ {} < {} }}", "{{ '%d' | format('x') }}",
    ],
)  # fmt: skip
def test_a_template_that_fails_is_an_error_of_the_request_and_no_traceback(source: str) -> None:
    with pytest.raises(RequestError, match="the chat template") as caught:
        ChatTemplate(source, "odd").render(TALK, TOOLS, {})
    assert caught.value.param == "messages"

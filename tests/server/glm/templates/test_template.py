"""Chat templates: ours, word for word, and those of checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest

from config.errors import CheckpointError, RequestError
from server.glm.templates.template import OUR_TEMPLATE, ChatTemplate, load_chat_template

START = "[gMASK]<sop>"
MAX = START + "<|system|>Reasoning Effort: Max"
END = "<|assistant|><think>"
TOOLS_HEAD = (
    "<|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
TOOLS_TAIL = (
    "\n</tools>\n\n"
    "For each function call, output the function name and arguments within the following XML format:\n"
    "<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>"
    "<arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call>"
)
USER = {"role": "user", "content": "U"}


def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **options: Any) -> str:
    template = ChatTemplate(OUR_TEMPLATE.read_text(encoding="utf-8"), "ours")
    return template.render(messages, tools, options)


def assistant(content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("options", "start", "end"),
    [
        ({}, MAX, END),
        ({"reasoning_effort": "high"}, START + "<|system|>Reasoning Effort: High", END),
        ({"reasoning_effort": "low"}, MAX, END),
        ({"enable_thinking": True}, MAX, END),
        ({"enable_thinking": False}, START, END + "</think>"),
        ({"enable_thinking": False, "reasoning_effort": "high"}, START, END + "</think>"),
    ],
)
def test_effort_and_generation_prompt(options: dict[str, Any], start: str, end: str) -> None:
    system = {"role": "system", "content": "S\n"}
    assert render([system, USER], **options) == f"{start}<|system|>S\n<|user|>U{end}"


def test_old_thoughts_are_cleared_unless_kept_and_recent_ones_stay() -> None:
    messages = [USER, assistant(" A\n", reasoning_content="R"), USER, assistant("B", reasoning_content="Q")]
    recent = "<|user|>U<|assistant|><think>Q</think>B"
    assert render(messages) == f"{MAX}<|user|>U<|assistant|><think></think>A{recent}{END}"
    kept = f"{MAX}<|user|>U<|assistant|><think>R</think>A{recent}{END}"
    assert render(messages, clear_thinking=False) == kept


def test_a_thought_inside_the_content_is_told_apart() -> None:
    messages = [USER, assistant("<think>R</think>A")]
    assert render(messages) == f"{MAX}<|user|>U<|assistant|><think>R</think>A{END}"


def test_tool_calls_and_results() -> None:
    messages = [
        USER,
        assistant(
            None, reasoning_content="R", tool_calls=[call("f", a=" x\n", n=1, o={"é": [None]}), call("g")]
        ),
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    assert render(messages) == (
        f"{MAX}<|user|>U<|assistant|><think>R</think>"
        "<tool_call>f<arg_key>a</arg_key><arg_value> x\n</arg_value>"
        "<arg_key>n</arg_key><arg_value>1</arg_value>"
        '<arg_key>o</arg_key><arg_value>{"é": [null]}</arg_value></tool_call><tool_call>g</tool_call>'
        f"<|observation|><tool_response>1</tool_response><tool_response>2</tool_response>{END}"
    )


def test_the_tool_list_keeps_order_and_letters_and_drops_what_the_model_must_not_see() -> None:
    parameters = {"type": "object", "properties": {"items": {"type": "array"}}}
    tools: list[dict[str, Any]] = [
        {"type": "function", "function": {"name": "é", "strict": True, "parameters": parameters}},
        {"type": "function", "defer_loading": True, "function": {"name": "hidden"}},
        {"name": "bare", "description": "<d>", "defer_loading": False},
    ]
    lines = [
        '{"name": "é", "parameters": {"type": "object", "properties": {"items": {"type": "array"}}}}',
        '{"name": "bare", "description": "<d>"}',
    ]
    assert render([USER], tools) == MAX + TOOLS_HEAD + "\n".join(lines) + TOOLS_TAIL + "<|user|>U" + END


def test_an_argument_called_like_a_method_is_an_argument() -> None:
    text = render([USER, assistant("", tool_calls=[call("f", items="i", keys="k")])])
    assert "<arg_key>items</arg_key><arg_value>i</arg_value><arg_key>keys</arg_key>" in text


def test_a_template_that_refuses_is_the_requests_fault() -> None:
    with pytest.raises(RequestError, match="unknown role: wizard"):
        render([{"role": "wizard", "content": "x"}])


def test_a_checkpoints_own_template_wins_and_ours_is_the_last_resort(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path).render([USER], None, {}).startswith(MAX)
    configured = {"chat_template": [{"name": "default", "template": "configured"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(configured))
    assert load_chat_template(tmp_path).render([USER], None, {}) == "configured"
    source = (
        "{% for m in messages %}\n{% if loop.first %}{% continue %}{% endif %}\n{{ m | tojson }}\n{%endfor%}"
    )
    (tmp_path / "chat_template.jinja").write_text(source)
    assert load_chat_template(tmp_path).render([USER, {"role": "é"}], None, {}) == '{"role": "é"}\n'


def test_a_template_that_is_no_jinja_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match="chat_template"):
        load_chat_template(tmp_path)


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    with pytest.raises(RequestError):
        ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", "x").render([USER], None, {})

"""The chat template: golden strings, and the renderer of the training data held equal to it."""

import json
import random
from pathlib import Path
from typing import Any

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

import models.pocket
from training.pocket.data.mixture import draw_sample
from training.pocket.data.pools import Pools
from training.pocket.data.render import prompt_text
from training.pocket.data.sample import Sample

TEMPLATE = Path(models.pocket.__file__).with_name("chat_template.jinja")
WEATHER = {
    "type": "function",
    "function": {"name": "wetter", "description": "Grüße", "parameters": {"type": "object"}, "strict": True},
}


def tojson(value: Any, ensure_ascii: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii)


@pytest.fixture(scope="module")
def template() -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = tojson
    return environment.from_string(TEMPLATE.read_text())


def rendered(template: jinja2.Template, sample: Sample) -> str:
    options: dict[str, Any] = {"enable_thinking": sample.thinking}
    if sample.effort:
        options["reasoning_effort"] = sample.effort
    if sample.clear_thinking is not None:
        options["clear_thinking"] = sample.clear_thinking
    thought = ("reasoning_content",) if not sample.thinking else ()
    messages = [{k: v for k, v in m.items() if k not in thought} for m in sample.messages[:-1]]
    return template.render(
        messages=messages, tools=sample.tools or None, add_generation_prompt=True, **options
    )


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_the_shortest_prompt_with_thinking_on_and_off(template: jinja2.Template) -> None:
    on = template.render(messages=[user("hi")], add_generation_prompt=True)
    assert on == "[gMASK]<sop><|system|>Reasoning Effort: Max<|user|>hi<|assistant|><think>"
    off = template.render(messages=[user("hi")], add_generation_prompt=True, enable_thinking=False)
    assert off == "[gMASK]<sop><|user|>hi<|assistant|><think></think>"


@pytest.mark.parametrize(("effort", "word"), [("high", "High"), ("low", "Max"), ("max", "Max")])
def test_only_high_is_high(template: jinja2.Template, effort: str, word: str) -> None:
    text = template.render(messages=[user("hi")], reasoning_effort=effort)
    assert text == f"[gMASK]<sop><|system|>Reasoning Effort: {word}<|user|>hi"


def test_tools_come_after_the_effort_and_before_the_system_prompt(template: jinja2.Template) -> None:
    messages = [{"role": "system", "content": "Short."}, user("hi")]
    text = template.render(messages=messages, tools=[WEATHER])
    start = (
        "[gMASK]<sop><|system|>Reasoning Effort: Max<|system|>\n# Tools\n\nYou may call one or more functions"
    )
    assert text.startswith(start)
    line = '{"name": "wetter", "description": "Grüße", "parameters": {"type": "object"}}'
    assert f"<tools>\n{line}\n</tools>\n\nFor each function call" in text
    assert text.endswith("...</tool_call><|system|>Short.<|user|>hi")


def test_calls_and_a_run_of_results(template: jinja2.Template) -> None:
    calls = [{"function": {"name": "f", "arguments": {"items": "a b", "n": 2, "on": True}}}]
    messages = [
        user("go"),
        {"role": "assistant", "content": " ok ", "reasoning_content": "I call.", "tool_calls": calls},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": [{"type": "text", "text": "2"}]},
    ]
    text = template.render(messages=messages, add_generation_prompt=True)
    assert text.endswith(
        "<|assistant|><think>I call.</think>ok<tool_call>f<arg_key>items</arg_key><arg_value>a b</arg_value>"
        "<arg_key>n</arg_key><arg_value>2</arg_value>"
        "<arg_key>on</arg_key><arg_value>true</arg_value></tool_call>"
        "<|observation|><tool_response>1</tool_response><tool_response>2</tool_response><|assistant|><think>"
    )


def test_earlier_reasoning_is_cleared_unless_asked_for(template: jinja2.Template) -> None:
    messages = [user("a"), {"role": "assistant", "content": "b", "reasoning_content": "why"}, user("c")]
    assert "<|assistant|><think></think>b<|user|>c" in template.render(messages=messages)
    kept = template.render(messages=messages, clear_thinking=False)
    assert "<|assistant|><think>why</think>b<|user|>c" in kept


def test_content_that_holds_its_reasoning_is_split(template: jinja2.Template) -> None:
    messages = [user("a"), {"role": "assistant", "content": "<think>why</think>\nb"}, user("c")]
    assert "<|assistant|><think></think>b<|user|>c" in template.render(messages=messages)


def test_null_content_is_empty_and_developer_is_system(template: jinja2.Template) -> None:
    messages = [{"role": "developer", "content": "D"}, user("a"), {"role": "assistant", "content": None}]
    text = template.render(messages=messages, enable_thinking=False)
    assert text == "[gMASK]<sop><|system|>D<|user|>a<|assistant|><think></think>"


def test_training_data_is_rendered_as_the_template_renders_it(template: jinja2.Template) -> None:
    pools = Pools(random.Random(6))
    for _ in range(300):
        sample = draw_sample(pools, 0.02)
        assert prompt_text(sample) == rendered(template, sample)

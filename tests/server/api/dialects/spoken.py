"""One of each: the objects and events that the dialects speak, as a client gets them over a socket.

`speak` asks for all of them. Each is one `Spoken`, with the kind under which the SDKs' schemas are looked up.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from server.glm.tokenizer import Tokenizer
from tests.server.api.answer.test_tool_calls import BERGEN, OSLO, TOOLS
from tests.server.api.scripted import ScriptedEngine

GLM = "z-ai/glm-5.2"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "model": GLM}
FUNCTION: Any = TOOLS[0]["function"]
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FORMAT: dict[str, Any] = {"name": "a", "schema": SCHEMA}
CALLS = f"ask</think>Let me see.{OSLO}{BERGEN}<|observation|>"
JSON = 'ask</think>{"city": "Oslo"}<|user|>'
PLAIN = "hm</think>Hi Ærø 👋!<|user|>"


@dataclass(frozen=True)
class Spoken:
    """A JSON value, its kind, and what it was an answer to."""

    kind: str
    value: dict[str, Any]
    case: str


@dataclass(frozen=True)
class Case:
    """A request, what the model says to it, and after how many tokens the engine fails."""

    name: str
    fields: dict[str, Any]
    text: str = PLAIN
    fails_after: int | None = None


CHATS = [
    Case("plain", {}),
    Case("calls", {"tools": TOOLS, "tool_choice": "auto", "parallel_tool_calls": True}, CALLS),
    Case("forced", {"tools": TOOLS, "tool_choice": "required"}, f"ask</think>{OSLO}<|observation|>"),
    Case("schema", {"response_format": {"type": "json_schema", "json_schema": FORMAT}}, JSON),
    Case("scores", {"logprobs": True, "top_logprobs": 2}),
    Case("choices", {"n": 2}),
    Case("cut", {"max_tokens": 5}),
    Case("cut in its thought", {"max_tokens": 1}),
    Case("cut in a call", {"tools": TOOLS, "max_tokens": 40}, CALLS),
    Case("no thought", {"reasoning": {"effort": "none"}}, "Hi<|user|>"),
    Case("hidden thought", {"reasoning": {"exclude": True}}),
    Case("nothing", {}, "</think><|user|>"),
    Case("failure", {}, fails_after=3),
]  # fmt: skip
CUSTOM = {"type": "custom", "name": "patch", "description": "d", "format": {"type": "text"}}
SKY_CALLS = CALLS.replace("weather", "sky__weather")
CUSTOM_CALL = (
    "ask</think><tool_call>patch<arg_key>input</arg_key><arg_value>+1</arg_value></tool_call><|observation|>"
)
NAMESPACE = {
    "type": "namespace",
    "name": "sky",
    "description": "d",
    "tools": [{"type": "function", **FUNCTION}],
}
RESPONSES_TOOLS = [{"type": "function", **FUNCTION}, {"type": "function", "name": "bare"}]
RESPONSES = [
    Case("plain", {}),
    Case("calls", {"tools": RESPONSES_TOOLS, "instructions": "S", "parallel_tool_calls": False}, CALLS),
    Case("forced", {"tools": RESPONSES_TOOLS, "tool_choice": {"type": "function", "name": "weather"}}, CALLS),
    Case("strict", {"tools": [RESPONSES_TOOLS[0] | {"strict": True}], "tool_choice": "required"}, CALLS),
    Case("schema", {"text": {"format": {"type": "json_schema", **FORMAT, "strict": True}}}, JSON),
    Case("any JSON", {"text": {"format": {"type": "json_object"}, "verbosity": "low"}}, JSON),
    Case("scores", {"top_logprobs": 2, "include": ["message.output_text.logprobs"]}),
    Case("sealed thought", {"include": ["reasoning.encrypted_content"], "reasoning": {"effort": "high"}}),
    Case("summary", {"reasoning": {"effort": "low", "summary": "auto"}}),
    Case("custom", {"tools": [CUSTOM]}, CUSTOM_CALL),
    Case("namespace", {"tools": [NAMESPACE, {"type": "web_search"}]}, SKY_CALLS),
    Case("cut", {"max_output_tokens": 5}),
    Case("cut in its thought", {"max_output_tokens": 1}),
    Case("cut in a call", {"tools": RESPONSES_TOOLS, "max_output_tokens": 40}, CALLS),
    Case("echoes", {
        "metadata": {"run": "7"}, "user": "u", "safety_identifier": "s", "prompt_cache_key": "k",
        "max_tool_calls": 3, "service_tier": "flex", "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "background": False, "store": False, "truncation": "disabled", "temperature": 0.1, "top_p": 0.9,
    }),
    Case("nothing", {}, "</think><|user|>"),
    Case("failure", {}, fails_after=3),
]  # fmt: skip
ADAPTIVE = {"thinking": {"type": "adaptive"}, "max_tokens": 99}
ANTHROPIC_TOOLS = [{"name": "weather", "input_schema": FUNCTION["parameters"]}]
MESSAGES = [
    Case("plain", ADAPTIVE),
    Case("calls", ADAPTIVE | {"tools": ANTHROPIC_TOOLS}, CALLS),
    Case("forced", {"max_tokens": 99, "tools": ANTHROPIC_TOOLS, "tool_choice": {"type": "any"}}, CALLS[10:]),
    Case("stop", {"max_tokens": 99, "stop_sequences": ["Ærø"]}, "Hi Ærø<|user|>"),
    Case("cut", ADAPTIVE | {"max_tokens": 5}),
    Case("cut in its thought", ADAPTIVE | {"max_tokens": 1}),
    Case("cut in a call", ADAPTIVE | {"max_tokens": 40, "tools": ANTHROPIC_TOOLS}, CALLS),
    Case("nothing", {"max_tokens": 99}, "<|user|>"),
    Case("failure", ADAPTIVE, fails_after=3),
]
COMPLETIONS = [
    Case("plain", {"prompt": "hello"}, "Hi<|user|>"),
    Case("scores", {"prompt": "hello", "logprobs": 2}, "Hi<|user|>"),
    Case("echo", {"prompt": "hello", "echo": True, "logprobs": 1, "n": 2, "max_tokens": 1}, "Hi<|user|>"),
    Case("several", {"prompt": ["a", "b"]}, "Hi<|user|>"),
]
DIALECTS = {
    "chat/completions": ("chat", ASK | {"stream_options": {"include_usage": True}}, CHATS),
    "responses": ("response", {"model": GLM, "input": "hello"}, RESPONSES),
    "messages": ("message", ASK, MESSAGES),
    "completions": ("completion", {"model": GLM}, COMPLETIONS),
}
FAULTS = [
    ("chat/completions", {"messages": []}),
    ("chat/completions", ASK | {"temperature": 3}),
    ("responses", {"input": "hello", "previous_response_id": "resp_1"}),
    ("chat/completions", ASK | {"model": "gpt-9"}),
    ("nowhere", {}),
]


def speak(url: str, engine: ScriptedEngine, tokenizer: Tokenizer) -> Iterator[Spoken]:
    """Everything that is said to all cases, whole and streamed, and to bodies that are wrong."""
    with httpx.Client(base_url=f"{url}/api/v1/", timeout=20) as client:
        for path, (kind, common, cases) in DIALECTS.items():
            for case in cases:
                engine.script, engine.fails_after = tokenizer.encode(case.text), case.fails_after
                body = common | case.fields
                if case.fails_after is None:
                    yield Spoken(kind, client.post(path, json=body).raise_for_status().json(), case.name)
                answer = client.post(path, json=body | {"stream": True}).raise_for_status()
                for event in _events(answer.text):
                    yield Spoken(f"{kind} event", event, f"{case.name}, streamed")
        for path, body in FAULTS:
            yield Spoken("error", client.post(path, json=body).json(), f"{path} {body}")
        for path in ("models", "models/count", "generation?id=gen-none"):
            answer = client.get(path)
            yield Spoken("error" if answer.is_error else path, answer.json(), path)


def _events(text: str) -> Iterator[dict[str, Any]]:
    for line in text.split("\n"):
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))

"""Everything that the dialects say, held to the SDKs' own schemas: pydantic, zod, and TypeScript's types.

Pydantic and zod find values that are wrong, and keys that must be there; only TypeScript's types know which
keys of OpenAI and Anthropic may be null but not absent.
"""

import json
import subprocess
from collections import Counter
from pathlib import Path
from shutil import which
from typing import Any

import anthropic.types
import openai.types.chat
import openai.types.responses
import pydantic
import pytest
from openrouter import components

from server.glm.tokenizer import Tokenizer
from tests.server.api.dialects.spoken import Spoken, speak
from tests.server.api.scripted import ScriptedEngine

NODE = Path(__file__).parents[2] / "serving" / "clients" / "node"
OPENAI = {
    "response": openai.types.responses.Response,
    "response event": openai.types.responses.ResponseStreamEvent,
    "chat": openai.types.chat.ChatCompletion,
    "chat event": openai.types.chat.ChatCompletionChunk,
    "completion": openai.types.Completion,
    "completion event": openai.types.Completion,
}
ANTHROPIC = {
    "message": anthropic.types.Message,
    "message event": anthropic.types.RawMessageStreamEvent,
}
OPENROUTER = {
    "response": components.OpenResponsesResult,
    "response event": components.StreamEvents,
    "chat": components.ChatResult,
    "chat event": components.ChatStreamChunk,
    "models": components.ModelsListResponse,
    "models/count": components.ModelsCountResponse,
}
# The types of openai-node and of Anthropic's SDK.
TYPES = {
    "response": "OpenAI.Responses.Response",
    "response event": "OpenAI.Responses.ResponseStreamEvent",
    "chat": "OpenAI.Chat.ChatCompletion",
    "chat event": "OpenAI.Chat.ChatCompletionChunk",
    "completion": "OpenAI.Completion",
    "completion event": "OpenAI.Completion",
    "message": "Anthropic.Message",
    "message event": "Anthropic.RawMessageStreamEvent",
}
with_node = pytest.mark.skipif(
    not (which("node") and (NODE / "node_modules").exists()),
    reason="`make test` puts node's clients beside it",
)


@pytest.fixture(scope="module")
def spoken(module_url: str, served_engine: ScriptedEngine, tokenizer: Tokenizer) -> list[Spoken]:
    return [one for one in speak(module_url, served_engine, tokenizer) if not _is_failure(one)]


def _is_failure(one: Spoken) -> bool:
    """Whether it is an error in the midst of a stream, which SDKs look for before they look at types."""
    return one.kind in ("chat event", "message event") and "error" in one.value


@pytest.mark.slow
def test_every_kind_of_object_and_event_is_spoken(spoken: list[Spoken]) -> None:
    kinds = Counter(one.kind for one in spoken)
    assert kinds.keys() == {*OPENAI, *ANTHROPIC, *OPENROUTER, "error"}
    events = {one.value["type"] for one in spoken if one.kind == "response event"}
    assert events >= {
        f"response.{name}"
        for name in (
            "created", "in_progress", "completed", "incomplete", "failed", "output_item.added",
            "output_item.done", "content_part.added", "content_part.done", "output_text.delta",
            "output_text.done", "reasoning_text.delta", "reasoning_text.done",
            "function_call_arguments.delta", "function_call_arguments.done", "custom_tool_call_input.delta",
            "custom_tool_call_input.done", "reasoning_summary_part.added", "reasoning_summary_text.delta",
            "reasoning_summary_text.done", "reasoning_summary_part.done",
        )
    }  # fmt: skip


@pytest.mark.parametrize("types", [OPENAI, ANTHROPIC, OPENROUTER], ids=["openai", "anthropic", "openrouter"])
def test_python_sdks_take_it(spoken: list[Spoken], types: dict[str, Any]) -> None:
    adapters = {kind: pydantic.TypeAdapter(type_) for kind, type_ in types.items()}
    refused = []
    for one in spoken:
        if one.kind not in adapters:
            continue
        try:
            taken = adapters[one.kind].validate_python(one.value if types is OPENROUTER else _typed(one))
        except pydantic.ValidationError as error:
            refused += [f"{one.kind} ({one.case}): {fault['loc']} {fault['msg']}" for fault in error.errors()]
        else:
            refused += [f"{one.kind} ({one.case}): not of the SDK: {raw}" for raw in _unknowns(taken)]
    assert not refused, "\n".join(sorted(set(refused)))[:6000]


def _unknowns(value: Any) -> list[Any]:
    """What a union of OpenRouter's SDK took for a kind of the future."""
    if isinstance(value, list):
        return [raw for part in value for raw in _unknowns(part)]
    if isinstance(value, pydantic.BaseModel):
        if getattr(value, "is_unknown", False):
            return [value.raw]  # type: ignore[attr-defined]
        return [raw for name in type(value).model_fields for raw in _unknowns(getattr(value, name))]
    return []


def _typed(one: Spoken) -> Any:
    """The value without what OpenAI's and Anthropic's services say otherwise than their types.

    OpenAI's sends null for what has not come yet and for the first score of an echo, and its SDK itself adds
    `output_text`. Anthropic's leaves `citations` out, and the AI SDK refuses null there.
    """
    value = json.loads(json.dumps(one.value))
    if one.kind.startswith("response") and "output" in (response := value.get("response", value)):
        response["output_text"] = ""
        for name in ("user", "usage", "safety_identifier", "prompt_cache_key"):
            if response[name] is None:
                del response[name]
    for choice in value.get("choices", []) if one.kind.startswith("completion") else ():
        choice["finish_reason"] = choice["finish_reason"] or "stop"
        scores = choice["logprobs"] or {}
        for name, parts in scores.items():
            scores[name] = parts[1:] if parts[:1] == [None] else parts
    for block in (*value.get("content", []), value.get("content_block", {})):
        if one.kind.startswith("message") and block.get("type") == "text":
            block["citations"] = []
    return value


@with_node
def test_zod_takes_it(spoken: list[Spoken]) -> None:
    said = json.dumps([vars(one) for one in spoken])
    checked = subprocess.run(
        ["node", "schemas.mjs"], cwd=NODE, input=said, capture_output=True, text=True, timeout=100
    )
    assert checked.returncode == 0, checked.stderr
    found = json.loads(checked.stdout)
    assert found["count"] > 200
    assert not found["refused"], "\n".join(sorted(set(found["refused"])))[:6000]


@with_node
@pytest.mark.slow
def test_typescripts_types_take_it(spoken: list[Spoken], tmp_path: Path) -> None:
    lines = [
        'import type OpenAI from "openai";',
        'import type Anthropic from "@anthropic-ai/sdk";',
        "function check<T>() { return <const V extends T>(value: V): V => value; }",
    ]
    values = {(one.kind, json.dumps(_typed(one))) for one in spoken if one.kind in TYPES}
    lines += [f"check<{TYPES[kind]}>()({value});" for kind, value in sorted(values)]
    (tmp_path / "spoken.mts").write_text("\n".join(lines))
    (tmp_path / "node_modules").symlink_to(NODE / "node_modules")
    flags = ["--noEmit", "--strict", "--skipLibCheck", "--target", "es2022", "--module", "nodenext"]
    tsc = NODE / "node_modules" / ".bin" / "tsc"
    checked = subprocess.run(
        [tsc, *flags, "spoken.mts"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert checked.returncode == 0, checked.stdout[:20000]

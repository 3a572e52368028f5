"""The body of OpenAI's Responses, and the chat request that it amounts to.

Nothing is stored here, so a conversation comes whole in `input`; what would need the store is refused.
"""

import base64
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from config.errors import RequestError
from server.api.request.chat_parts import JsonSchema, Lenient, read_arguments
from server.api.request.chat_schema import ChatRequest
from server.api.request.common_fields import IGNORED, Exact, GenerationRequest, Listed
from server.glm.effort import Effort

# Of what OpenAI's service does beside answering; nothing is lost without it.
RESPONSES_IGNORED = frozenset(["access_programs", "client_metadata", "max_tool_calls"])
NEEDS_STORE = ("previous_response_id", "conversation", "prompt", "background")
ENCRYPTED = "reasoning.encrypted_content"
LOGPROBS = "message.output_text.logprobs"


class Part(Lenient):
    """A part of an item's content."""

    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(Lenient):
    """One item of the input. Which fields an item has depends on its type."""

    type: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | Listed[Part] | None = None
    summary: Listed[Part] | None = None
    encrypted_content: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: Any = None
    output: str | Listed[Part] | None = None


class FunctionTool(Lenient):
    """A function that the client carries out; OpenAI's own tools have other types."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Lenient):
    """The one function that must be called."""

    type: Literal["function"]
    name: str


class ReasoningChoice(Exact):
    """How hard to think. There are no summaries: the thought itself is sent."""

    ignored: ClassVar[frozenset[str]] = frozenset(["context", "mode"])

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(JsonSchema):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"]


class TextConfig(Exact):
    """Format; verbosity has no counterpart in this model."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponsesRequest(GenerationRequest):
    """The body of POST /responses, with the sampling fields that chat completions have, too."""

    ignored: ClassVar[frozenset[str]] = IGNORED | RESPONSES_IGNORED

    input: str | Annotated[Listed[InputItem], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    tools: Listed[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningChoice | None = None
    text: TextConfig | None = None
    include: Listed[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None

    @model_validator(mode="after")
    def _refuse_what_is_missing(self) -> Self:
        for name in NEEDS_STORE:
            if getattr(self, name):
                raise ValueError(
                    f"'{name}' is not supported: this server stores no responses (store is false always); "
                    "send the whole conversation in 'input'"
                )
        if self.truncation == "auto":
            raise ValueError("'truncation' can only be \"disabled\": nothing of the input is left out")
        if self.n not in (None, 1):
            raise ValueError(f"'n' can only be 1, not {self.n}")
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities go with the text."""
        return bool(self.top_logprobs) or LOGPROBS in (self.include or [])

    @property
    def wants_encrypted_thought(self) -> bool:
        """Whether the client asks for a thought in the one form that it is sure to send back."""
        return ENCRYPTED in (self.include or [])

    def chat(self) -> ChatRequest:
        """The same request as a chat completion. Raises ValidationError, or RequestError."""
        shared = GenerationRequest.model_fields
        fields = self.given(*(name for name in shared if name not in ("n", "stream_options")))
        fields["messages"] = [*self._instructions(), *_messages(self.input)]
        optional = {
            "max_completion_tokens": self.max_output_tokens,
            "tools": [_tool(f"tools[{index}]", tool) for index, tool in enumerate(self.tools or [])] or None,
            "tool_choice": self._tool_choice(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "response_format": self._response_format(),
            "logprobs": self.wants_logprobs or None,
            "top_logprobs": self.top_logprobs if self.wants_logprobs else None,
        }
        fields |= {name: value for name, value in optional.items() if value is not None}
        return ChatRequest.model_validate(fields)

    def _instructions(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.instructions}] if self.instructions is not None else []

    def _tool_choice(self) -> Any:
        if isinstance(self.tool_choice, FunctionChoice):
            return {"type": "function", "function": {"name": self.tool_choice.name}}
        return self.tool_choice

    def _response_format(self) -> dict[str, Any] | None:
        wanted = self.text.format if self.text else None
        if wanted is None:
            return None
        return {"type": wanted.type, "json_schema": {"name": wanted.name, "schema": wanted.json_schema}}


def seal(thought: str) -> str:
    """A thought as `encrypted_content`. It is no secret: the client saw it, and gets it back as it is."""
    return base64.b64encode(thought.encode()).decode()


def _unseal(path: str, sealed: str) -> str:
    try:
        return base64.b64decode(sealed, validate=True).decode()
    except ValueError as error:
        raise RequestError(f"{path}.encrypted_content is not of this server", param=path) from error


def _messages(items: str | list[InputItem]) -> Iterator[dict[str, Any]]:
    """Messages of chat. What a turn of the assistant consists of lies side by side in the input."""
    if isinstance(items, str):
        yield {"role": "user", "content": items}
        return
    turn: dict[str, Any] | None = None
    for index, item in enumerate(items):
        path = f"input[{index}]"
        part = _assistant_part(path, item)
        if part is None:
            if turn:
                yield turn
            turn = None
            yield _other_message(path, item)
            continue
        if turn and not ("tool_calls" in part or turn.keys() == {"role", "reasoning"}):
            yield turn
            turn = None
        turn = _merged(turn or {"role": "assistant"}, part)
    if turn:
        yield turn


def _merged(turn: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    calls = turn.get("tool_calls", []) + part.get("tool_calls", [])
    thought = turn.get("reasoning", "") + part.get("reasoning", "")
    both = turn | part | ({"tool_calls": calls} if calls else {})
    return both | ({"reasoning": thought} if thought else {})


def _assistant_part(path: str, item: InputItem) -> dict[str, Any] | None:
    """What an item adds to a turn of the assistant; None where it is somebody else's."""
    match item.type:
        case "reasoning":
            return {"reasoning": _thought(path, item)}
        case "function_call":
            if not item.name:
                raise RequestError(f"{path}: a function_call needs 'name'", param=path)
            read_arguments(item.arguments, f"{path}.arguments")
            function = {"name": item.name, "arguments": item.arguments}
            return {"tool_calls": [{"id": item.call_id, "type": "function", "function": function}]}
        case "message" | None if item.role == "assistant":
            return {"content": _text(f"{path}.content", item.content)}
    return None


def _thought(path: str, item: InputItem) -> str:
    if item.encrypted_content:
        return _unseal(path, item.encrypted_content)
    parts = item.content if isinstance(item.content, list) else item.summary or []
    return "".join(part.text or "" for part in parts)


def _other_message(path: str, item: InputItem) -> dict[str, Any]:
    if item.type == "function_call_output":
        if item.output is None:
            raise RequestError(f"{path}: a function_call_output needs 'output'", param=path)
        return {"role": "tool", "tool_call_id": item.call_id, "content": _text(f"{path}.output", item.output)}
    if item.type not in ("message", None):
        raise RequestError(f"{path}: items of type {item.type[:40]!r} are not supported", param=path)
    if item.role is None:
        raise RequestError(f"{path}: a message needs 'role'", param=path)
    if item.content is None:
        raise RequestError(f"{path}: a message of role {item.role!r} needs 'content'", param=path)
    return {"role": item.role, "content": _text(f"{path}.content", item.content)}


def _text(path: str, content: str | list[Part] | None) -> Any:
    if not isinstance(content, list):
        return content or ""
    texts = [_part_text(f"{path}[{index}]", part) for index, part in enumerate(content)]
    return [{"type": "text", "text": text} for text in texts]


def _part_text(path: str, part: Part) -> str:
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in ("input_text", "output_text", "text", "refusal") or text is None:
        message = f"{path}: parts of type {part.type[:40]!r} are not supported, this model reads text"
        raise RequestError(message, param=path)
    return text


def _tool(path: str, tool: FunctionTool) -> dict[str, Any]:
    if tool.type != "function" or not tool.name:
        message = f"{path}: tools of type {tool.type[:40]!r} are not supported, only functions with a name"
        raise RequestError(message, param=path)
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": {name: v for name, v in function.items() if v is not None}}

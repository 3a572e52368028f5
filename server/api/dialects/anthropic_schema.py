"""The body of Anthropic's Messages, and the chat request that it amounts to.

Every dialect becomes a `ChatRequest`, so that the same conversation is the same tokens in all of them.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from config.errors import RequestError
from server.api.prompt.replay import BILLING_HEADER
from server.api.request.chat_parts import text_or_placeholder
from server.api.request.chat_schema import ChatRequest
from server.api.request.common_fields import (
    FORMS,
    Count,
    Finite,
    Lenient,
    Listed,
    Options,
    Stop,
    Whole,
    fault,
)

# Billing, placement and caching of Anthropic's service; here they have no meaning.
MESSAGES_IGNORED = frozenset(
    [
        "cache_control",
        "context_management",
        "diagnostics",
        "inference_geo",
        "metadata",
        "service_tier",
        "speed",
        "user_profile_id",
        "workspace_id",
        "betas",
    ]
)
MESSAGES_REFUSED: Mapping[str, str] = {
    **dict.fromkeys((*FORMS, "response_format"), "give the form of the answer in 'output_config.format'"),
    "container": "nothing runs here but the model",
    "mcp_servers": "nothing runs here but the model: offer the tools of those servers in 'tools'",
}


class ContentBlock(Lenient):
    """One content block. Which fields a block has depends on its type."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: Any = None
    tool_use_id: str | None = None
    content: "str | Listed[ContentBlock] | None" = None
    tool_name: str | None = None

    def overlooked(self) -> Iterator[str]:
        """What a tool gave that is no text: a client cannot help that, so a placeholder stands for it."""
        if self.type == "tool_result" and isinstance(self.content, list):
            for index, block in enumerate(self.content):
                if block.type != "text":
                    yield f"content[{index}].{block.type}"


class Turn(Lenient):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: str | Listed[ContentBlock]


class ToolDefinition(Lenient):
    """A tool of the client's own; Anthropic's own tools have other types, and are not here."""

    type: str | None = None
    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def is_hosted(self) -> bool:
        """Whether Anthropic defines it."""
        return self.type not in (None, "custom")

    @model_validator(mode="after")
    def _is_described(self) -> Self:
        for name in ("name", "input_schema"):
            if not self.is_hosted and getattr(self, name) is None:
                raise fault(name, f"a tool needs {name!r}")
        return self

    def overlooked(self) -> Iterator[str]:
        """The type of a hosted tool."""
        if self.type and self.is_hosted:
            yield self.type


class ToolChoice(Lenient):
    """Whether and which tool is called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _names_the_tool(self) -> Self:
        if self.type == "tool" and not self.name:
            raise fault("name", "type 'tool' needs 'name'")
        return self


class ThinkingChoice(Options):
    """Whether to think, and for how many tokens at most."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Count | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Lenient):
    """The schema that the text must follow."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Options):
    """Effort and format."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountRequest(Options):
    """The body of POST /messages/count_tokens: what makes a prompt."""

    ignored: ClassVar[frozenset[str]] = MESSAGES_IGNORED
    refused: ClassVar[Mapping[str, str]] = MESSAGES_REFUSED

    model: str
    messages: Annotated[Listed[Turn], Field(min_length=1)]
    system: str | Listed[ContentBlock] | None = None
    tools: Listed[ToolDefinition] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingChoice | None = None
    output_config: OutputConfig | None = None

    @model_validator(mode="after")
    def _ends_with_the_user(self) -> Self:
        if self.messages[-1].role == "assistant":
            raise fault(
                "messages", "'messages' must end with the user's: this model continues no answer of its own"
            )
        return self

    def fields(self) -> dict[str, Any]:
        """The fields of the chat request, without those that have no value."""
        thinking, output = self.thinking, self.output_config or OutputConfig()
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": [*_system(self.system), *_messages(self.messages)],
            "tools": [_tool(tool) for tool in self.tools or [] if not tool.is_hosted] or None,
            "tool_choice": _tool_choice(self.tool_choice),
            "parallel_tool_calls": False if self._wants_one_call else None,
            "reasoning": {
                "enabled": thinking is not None and thinking.type != "disabled",
                "max_tokens": thinking.budget_tokens if thinking else None,
                "exclude": thinking.display == "omitted" if thinking else None,
                "effort": output.effort,
            },
        }
        if output.format:
            schema = {"schema": output.format.json_schema}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields

    @property
    def _wants_one_call(self) -> bool:
        return bool(self.tool_choice and self.tool_choice.disable_parallel_tool_use)

    def chat(self) -> ChatRequest:
        """The same request as a chat completion. Raises ValidationError, or RequestError."""
        fields = {name: value for name, value in self.fields().items() if value is not None}
        return ChatRequest.model_validate(fields)


class MessagesRequest(CountRequest):
    """The body of POST /messages."""

    max_tokens: Count
    stream: bool | None = None
    stop_sequences: Annotated[Listed[Stop], Field(max_length=64)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, lt=2**31)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None

    def fields(self) -> dict[str, Any]:
        """Those of the prompt, and how it is continued."""
        return super().fields() | {
            "max_tokens": self.max_tokens,
            "stream": self.stream,
            "stop": self.stop_sequences or None,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
        }

    @property
    def user(self) -> str | None:
        """Whom the client names in its metadata."""
        metadata = (self.model_extra or {}).get("metadata")
        name = metadata.get("user_id") if isinstance(metadata, dict) else None
        return name if isinstance(name, str) else None


def _system(system: str | list[ContentBlock] | None) -> list[dict[str, Any]]:
    blocks = [ContentBlock(type="text", text=system)] if isinstance(system, str) else system or []
    kept = [block for block in blocks if not (block.text or "").startswith(BILLING_HEADER)]
    return [{"role": "system", "content": _text_parts("system", kept)}] if kept else []


def _messages(turns: list[Turn]) -> list[dict[str, Any]]:
    return [message for index, turn in enumerate(turns) for message in _of_turn(f"messages[{index}]", turn)]


def _of_turn(path: str, turn: Turn) -> Iterator[dict[str, Any]]:
    """Messages of chat: a result of a tool is a message of its own there."""
    if isinstance(turn.content, str):
        yield {"role": turn.role, "content": turn.content}
    elif turn.role == "assistant":
        yield _assistant(path, turn.content)
    else:
        texts: list[ContentBlock] = []
        for block in turn.content:
            if block.type != "tool_result":
                texts.append(block)
                continue
            if texts:
                yield {"role": turn.role, "content": _text_parts(f"{path}.content", texts)}
                texts = []
            yield _tool_result(block)
        if texts or not turn.content:
            yield {"role": turn.role, "content": _text_parts(f"{path}.content", texts)}


def _assistant(path: str, blocks: list[ContentBlock]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant"}
    thought = "".join(block.thinking or "" for block in blocks if block.type == "thinking")
    texts = [block for block in blocks if block.type not in ("thinking", "redacted_thinking", "tool_use")]
    calls = [_call(f"{path}.content", block) for block in blocks if block.type == "tool_use"]
    if thought:
        message["reasoning"] = thought
    if texts:
        message["content"] = _text_parts(f"{path}.content", texts)
    if calls:
        message["tool_calls"] = calls
    return message


def _call(path: str, block: ContentBlock) -> dict[str, Any]:
    if not block.name:
        raise RequestError(f"{path}: a block of type 'tool_use' needs 'name'", param=path)
    function = {"name": block.name, "arguments": block.input}
    return {"id": block.id, "type": "function", "function": function}


def _tool_result(block: ContentBlock) -> dict[str, Any]:
    content = block.content or ""
    if not isinstance(content, str):
        content = "".join(text_or_placeholder(one.type, one.text, one.tool_name) for one in content)
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}


def _text_parts(path: str, blocks: list[ContentBlock]) -> list[dict[str, Any]]:
    for position, block in enumerate(blocks):
        if block.type != "text" or block.text is None:
            message = f"{path}: blocks of type {block.type[:40]!r} are not supported, this model reads text"
            raise RequestError(message, param=f"{path}[{position}]")
    return [{"type": "text", "text": block.text} for block in blocks]


def _tool(tool: ToolDefinition) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function | {"parameters": tool.input_schema}}


def _tool_choice(choice: ToolChoice | None) -> Any:
    match choice:
        case None:
            return None
        case ToolChoice(type="any"):
            return "required"
        case ToolChoice(type="tool", name=name):
            return {"type": "function", "function": {"name": name}}
        case _:
            return choice.type

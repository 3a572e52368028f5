"""The body of Anthropic's Messages, and the chat request that it amounts to.

Every dialect becomes a `ChatRequest`, so that the same conversation is the same tokens in all of them.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from config.errors import RequestError
from server.api.dialects.client_words import in_words_of
from server.api.prompt.replay import BILLING_HEADER
from server.api.request.chat_parts import read_arguments, text_or_placeholder
from server.api.request.chat_schema import ChatRequest
from server.api.request.common_fields import (
    Count,
    Finite,
    Lenient,
    Listed,
    Options,
    Stop,
    TextRequest,
    Whole,
    fault,
    refusals,
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
FORM = "give the form of the answer in 'output_config.format'"
MESSAGES_REFUSED: Mapping[str, str] = {
    **refusals(FORM),
    "response_format": FORM,
    "container": "nothing runs here but the model",
}
WORDS = {
    "response_format.json_schema.schema": "output_config.format.schema",
    "response_format": "output_config.format",
    "reasoning.max_tokens": "thinking.budget_tokens",
    "reasoning.effort": "output_config.effort",
    "stop": "stop_sequences",
}
# Calls and results of tools that Anthropic carries out, in the history of a client that comes from there.
_HOSTED = re.compile(r"(server|mcp)_tool_use|\w+_tool_result|fallback")


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

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_hosted(cls, value: Any) -> Any:
        """A block of a hosted tool has fields of its own, which are nobody's here."""
        kind = value.get("type") if isinstance(value, dict) else None
        return {"type": kind} if isinstance(kind, str) and _HOSTED.fullmatch(kind) else value

    @property
    def is_hosted(self) -> bool:
        """Whether it tells of a tool that Anthropic carried out."""
        return bool(_HOSTED.fullmatch(self.type))

    def overlooked(self) -> Iterator[str]:
        """A hosted tool's block, or what a tool gave that is no text: a placeholder stands for that."""
        if self.is_hosted:
            yield self.type
        if self.type == "tool_result" and isinstance(self.content, list):
            for index, block in enumerate(self.content):
                if block.type != "text":
                    yield f"content[{index}].{block.type}"


Placed = tuple[str, ContentBlock]  # with the path that leads to it


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


class CountRequest(TextRequest):
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
    output_format: OutputFormat | None = None  # where it was before it moved into `output_config`
    mcp_servers: Any = None

    @model_validator(mode="after")
    def _names_no_servers(self) -> Self:
        if self.mcp_servers:
            reason = "nothing runs here but the model: offer the tools of those servers in 'tools'"
            raise fault("mcp_servers", f"'mcp_servers' is not supported: {reason}")
        return self

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
            "messages": [message for _, message in self._placed_messages()],
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
        if form := output.format or self.output_format:
            schema = {"schema": form.json_schema}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields

    @property
    def _wants_one_call(self) -> bool:
        return bool(self.tool_choice and self.tool_choice.disable_parallel_tool_use)

    def chat(self) -> ChatRequest:
        """The same request as a chat completion. Raises ValidationError, or RequestError."""
        fields = {name: value for name, value in self.fields().items() if value is not None}
        places = {f"messages[{index}]": path for index, (path, _) in enumerate(self._placed_messages())}
        with in_words_of(self.words() | places):
            return ChatRequest.model_validate(fields)

    def words(self) -> dict[str, str]:
        """What the parts of the chat request are called here, but for single messages."""
        own = [index for index, tool in enumerate(self.tools or []) if not tool.is_hosted]
        words = dict(WORDS)
        for index, place in enumerate(own):
            words |= {
                f"tools[{index}].function": f"tools[{place}]",
                f"tools[{index}].function.parameters": f"tools[{place}].input_schema",
            }
        return words

    def _placed_messages(self) -> list[tuple[str, dict[str, Any]]]:
        """The messages of chat, each with the path of what it is made of."""
        return [
            *(("system", message) for message in _system(self.system)),
            *(
                (path, message)
                for path, turn in ((f"messages[{index}]", turn) for index, turn in enumerate(self.messages))
                for message in _of_turn(path, turn)
            ),
        ]


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
    kept = [
        (place, block)
        for place, block in _placed("system", blocks)
        if not (block.text or "").startswith(BILLING_HEADER)
    ]
    return [{"role": "system", "content": _text_parts(kept)}] if kept else []


def _of_turn(path: str, turn: Turn) -> Iterator[dict[str, Any]]:
    """Messages of chat: a result of a tool is a message of its own there."""
    if isinstance(turn.content, str):
        yield {"role": turn.role, "content": turn.content}
    elif turn.role == "assistant":
        yield _assistant(_placed(f"{path}.content", turn.content))
    else:
        texts: list[Placed] = []
        for place, block in _placed(f"{path}.content", turn.content):
            if block.type != "tool_result":
                texts.append((place, block))
                continue
            if texts:
                yield {"role": turn.role, "content": _text_parts(texts)}
                texts = []
            yield _tool_result(block)
        if texts or not turn.content:
            yield {"role": turn.role, "content": _text_parts(texts)}


def _placed(path: str, blocks: list[ContentBlock]) -> list[Placed]:
    """The blocks and where they stand, without those of hosted tools."""
    return [(f"{path}[{index}]", block) for index, block in enumerate(blocks) if not block.is_hosted]


def _assistant(blocks: list[Placed]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant"}
    thought = "".join(block.thinking or "" for _, block in blocks if block.type == "thinking")
    others = ("thinking", "redacted_thinking", "tool_use")
    texts = [(place, block) for place, block in blocks if block.type not in others]
    calls = [_call(place, block) for place, block in blocks if block.type == "tool_use"]
    if thought:
        message["reasoning"] = thought
    if texts:
        message["content"] = _text_parts(texts)
    if calls:
        message["tool_calls"] = calls
    return message


def _call(path: str, block: ContentBlock) -> dict[str, Any]:
    if not block.name:
        raise RequestError(f"{path}: a block of type 'tool_use' needs 'name'", param=f"{path}.name")
    read_arguments(block.input, f"{path}.input")
    function = {"name": block.name, "arguments": block.input}
    return {"id": block.id, "type": "function", "function": function}


def _tool_result(block: ContentBlock) -> dict[str, Any]:
    content = block.content or ""
    if not isinstance(content, str):
        content = "".join(text_or_placeholder(one.type, one.text, one.tool_name) for one in content)
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}


def _text_parts(blocks: list[Placed]) -> list[dict[str, Any]]:
    for path, block in blocks:
        if block.type != "text":
            message = f"{path}: blocks of type {block.type[:40]!r} are not supported, this model reads text"
            raise RequestError(message, param=path)
        if block.text is None:
            raise RequestError(f"{path}: a block of type 'text' needs 'text'", param=f"{path}.text")
    return [{"type": "text", "text": block.text} for _, block in blocks]


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

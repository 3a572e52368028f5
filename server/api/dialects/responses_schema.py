"""The body of OpenAI's Responses, and the chat request that it amounts to.

No response is stored here, so a conversation comes whole in `input`, but for references to recent items; what
would need a store is refused.
"""

import base64
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from config.errors import RequestError
from server.api.dialects.client_words import in_words_of
from server.api.dialects.responses_tools import (
    ResponsesTool,
    ToolChoice,
    ToolToCall,
    custom_arguments,
    flat_name,
    own_tools,
)
from server.api.request.chat_parts import JsonSchema, read_arguments, text_or_placeholder
from server.api.request.chat_schema import ChatRequest
from server.api.request.common_fields import (
    IGNORED,
    Count,
    GenerationRequest,
    Lenient,
    Listed,
    Options,
    Whole,
    fault,
    refusals,
)
from server.glm.templates.template import Effort

# Of what OpenAI's service does beside answering; nothing is lost without it.
RESPONSES_IGNORED = frozenset(["access_programs", "client_metadata", "max_tool_calls"])
NEEDS_STORE = ("previous_response_id", "conversation", "prompt", "background")
Find = Callable[[str], dict[str, Any] | None]
Placed = tuple[str, dict[str, Any]]  # a message, with the path of the item that it begins with
WORDS = {
    "messages": "input",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "max_completion_tokens": "max_output_tokens",
    "tool_choice.function": "tool_choice",
}
FORM = "give the form of the answer in 'text.format'"
ENCRYPTED = "reasoning.encrypted_content"
LOGPROBS = "message.output_text.logprobs"


class ItemPart(Lenient):
    """A part of an item's content."""

    type: str
    text: str | None = None
    refusal: str | None = None


OWN_CALLS = ("function_call", "custom_tool_call", "local_shell_call")
RESULTS = ("function_call_output", "custom_tool_call_output", "local_shell_call_output")
_URL_SAFE = re.compile("[-_]")
_HOSTED = re.compile(r"(_call|_call_output|^tool_search_output|^ghost_snapshot)$|^mcp_")


def _is_hosted(kind: str) -> bool:
    return kind not in (*OWN_CALLS, *RESULTS) and bool(_HOSTED.search(kind))


class InputItem(Lenient):
    """One item of the input. Which fields an item has depends on its type."""

    type: str | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | Listed[ItemPart] | None = None
    summary: Listed[ItemPart] | None = None
    encrypted_content: str | None = None
    call_id: str | None = None
    id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: Any = None
    input: str | None = None
    action: dict[str, Any] | None = None
    output: str | Listed[ItemPart] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_hosted(cls, value: Any) -> Any:
        """An item of a hosted tool has fields of its own, which are nobody's here."""
        kind = value.get("type") if isinstance(value, dict) else None
        return {"type": kind} if isinstance(kind, str) and _is_hosted(kind) else value

    @property
    def is_hosted(self) -> bool:
        """Whether it tells of a tool that is hosted elsewhere."""
        return _is_hosted(self.type or "")

    @property
    def is_reference(self) -> bool:
        """Whether it only names an item of an earlier response."""
        return self.type == "item_reference" or (self.type is None and self.role is None and bool(self.id))

    @model_validator(mode="after")
    def _can_be_read(self) -> Self:
        try:
            _unseal(self.encrypted_content or "")
        except ValueError as error:
            raise fault("encrypted_content", f"this encrypted_content is damaged: {error}") from error
        return self

    @property
    def thought(self) -> str | None:
        """The thought that this server sealed; None where there is none, or another server did."""
        return _unseal(self.encrypted_content) if self.encrypted_content else None

    def overlooked(self) -> Iterator[str]:
        """The item itself, a thought that another server sealed, or what a tool gave that is no text."""
        if self.is_hosted:
            yield self.type or ""
        if self.type == "reasoning" and self.encrypted_content and self.thought is None:
            yield "encrypted_content"
        for index, part in enumerate(self.output if isinstance(self.output, list) else ()):
            if not part.type.endswith("text"):
                yield f"output[{index}].{part.type}"


class ReasoningChoice(Options):
    """How hard to think. A summary is the thought itself."""

    ignored: ClassVar[frozenset[str]] = frozenset(["context", "mode"])

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(JsonSchema):
    """What the text must be."""

    type: Literal["text", "json_object", "json_schema"]

    @model_validator(mode="after")
    def _says_what(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise fault("schema", "a format of type 'json_schema' needs 'schema'")
        return self


class TextConfig(Options):
    """Format; verbosity has no counterpart in this model."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponsesRequest(GenerationRequest):
    """The body of POST /responses, with the sampling fields that chat completions have, too."""

    ignored: ClassVar[frozenset[str]] = IGNORED | RESPONSES_IGNORED
    refused: ClassVar[Mapping[str, str]] = {**refusals(FORM), "response_format": FORM}

    input: str | Listed[InputItem]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    tools: Listed[ResponsesTool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningChoice | None = None
    text: TextConfig | None = None
    include: Listed[str] | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
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
                raise fault(
                    name,
                    f"'{name}' is not supported: this server stores no responses (store is false always); "
                    "send the whole conversation in 'input'",
                )
        if self.truncation == "auto":
            raise fault(
                "truncation", "'truncation' can only be \"disabled\": nothing of the input is left out"
            )
        if self.n not in (None, 1):
            raise fault("n", f"'n' can only be 1, not {self.n}")
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities go with the text."""
        return bool(self.top_logprobs) or LOGPROBS in (self.include or [])

    @property
    def wants_encrypted_thought(self) -> bool:
        """Whether the client asks for a thought in the one form that it is sure to send back."""
        return ENCRYPTED in (self.include or [])

    @property
    def wants_summary(self) -> bool:
        """Whether the client shows summaries of thoughts: it gets the thought itself as one."""
        return bool(self.reasoning and (self.reasoning.summary or self.reasoning.generate_summary))

    def chat(self, find: Find = lambda item_id: None) -> ChatRequest:
        """The same request as a chat completion; `find` gives items that are only referred to.

        Raises ValidationError, or RequestError.
        """
        shared = GenerationRequest.model_fields
        fields = self.given(*(name for name in shared if name not in ("n", "stream_options")))
        items = self.input if isinstance(self.input, str) else _resolved(self.input, find)
        placed = [*self._instructions(), *_messages(items)]
        fields["messages"] = [message for _, message in placed]
        optional = {
            "max_completion_tokens": self.max_output_tokens,
            "tools": [tool.function() for tool in own_tools(self.tools)] or None,
            "tool_choice": self._tool_choice(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "response_format": self._response_format(),
            "logprobs": self.wants_logprobs or None,
            "top_logprobs": self.top_logprobs if self.wants_logprobs else None,
        }
        fields |= {name: value for name, value in optional.items() if value is not None}
        names = {f"messages[{index}]": path for index, (path, _) in enumerate(placed)}
        with in_words_of(self.words() | names):
            return ChatRequest.model_validate(fields)

    def words(self) -> dict[str, str]:
        """What the parts of the chat request are called here, but for single messages."""
        tools = {f"tools[{index}].function": tool.path for index, tool in enumerate(own_tools(self.tools))}
        return WORDS | tools

    def _instructions(self) -> list[Placed]:
        if self.instructions is None:
            return []
        return [("instructions", {"role": "system", "content": self.instructions})]

    def _tool_choice(self) -> Any:
        if isinstance(self.tool_choice, ToolToCall):
            name = flat_name(self.tool_choice.namespace, self.tool_choice.name)
            return {"type": "function", "function": {"name": name}}
        return self.tool_choice

    def _response_format(self) -> dict[str, Any] | None:
        wanted = self.text.format if self.text else None
        if wanted is None:
            return None
        return {"type": wanted.type, "json_schema": {"name": wanted.name, "schema": wanted.json_schema}}


def seal(thought: str) -> str:
    """A thought as `encrypted_content`. It is no secret: the client saw it, and gets it back as it is."""
    return base64.b64encode(thought.encode()).decode()


def _unseal(sealed: str) -> str | None:
    """The thought; None where another server sealed it. ValueError for what no server can have sent."""
    alphabet = b"-_" if _URL_SAFE.search(sealed) else b"+/"
    raw = base64.b64decode(sealed + "=" * (-len(sealed) % 4), altchars=alphabet, validate=True)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _resolved(items: list[InputItem], find: Find) -> list[tuple[str, InputItem]]:
    """The items and where they stand, without those of hosted tools.

    What is referred to stands in the place of the reference.
    """
    placed = [(f"input[{index}]", item) for index, item in enumerate(items) if not item.is_hosted]
    return [(path, _referred(path, item, find) if item.is_reference else item) for path, item in placed]


def _referred(path: str, item: InputItem, find: Find) -> InputItem:
    found = find(item.id or "")
    if found is None:
        raise RequestError(
            f"{path}: there is no item {(item.id or '')[:100]!r} among the recent ones (item_reference); "
            "send the item itself (in the AI SDK: store: false)",
            param=f"{path}.id",
        )
    return InputItem.model_validate(found)


def _messages(items: str | list[tuple[str, InputItem]]) -> Iterator[Placed]:
    """Messages of chat. What a turn of the assistant consists of lies side by side in the input."""
    if isinstance(items, str) or not items:
        yield "input", {"role": "user", "content": items or ""}
        return
    turn: dict[str, Any] | None = None
    begin = ""
    for path, item in items:
        part = _assistant_part(path, item)
        if part is None:
            if turn:
                yield begin, turn
            turn = None
            yield path, _other_message(path, item)
            continue
        if turn and not ("tool_calls" in part or turn.keys() == {"role", "reasoning"}):
            yield begin, turn
            turn = None
        begin = begin if turn else path
        turn = _merged(turn or {"role": "assistant"}, part)
    if turn:
        yield begin, turn


def _merged(turn: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    calls = turn.get("tool_calls", []) + part.get("tool_calls", [])
    thought = turn.get("reasoning", "") + part.get("reasoning", "")
    both = turn | part | ({"tool_calls": calls} if calls else {})
    return both | ({"reasoning": thought} if thought else {})


def _assistant_part(path: str, item: InputItem) -> dict[str, Any] | None:
    """What an item adds to a turn of the assistant; None where it is somebody else's."""
    match item.type:
        case "reasoning":
            return {"reasoning": _thought(item)}
        case "function_call" | "custom_tool_call" | "local_shell_call":
            function = _function(path, item)
            call_id = item.call_id or item.id
            return {"tool_calls": [{"id": call_id, "type": "function", "function": function}]}
        case "message" | None if item.role == "assistant":
            return {"content": _text(f"{path}.content", item.content)}
    return None


def _function(path: str, item: InputItem) -> dict[str, Any]:
    if item.type == "local_shell_call":
        return {"name": "local_shell", "arguments": item.action or {}}
    if not item.name:
        raise RequestError(f"{path}: a {item.type} needs 'name'", param=f"{path}.name")
    name = flat_name(item.namespace, item.name)
    if item.type == "custom_tool_call":
        return {"name": name, "arguments": custom_arguments(item.input or "")}
    read_arguments(item.arguments, f"{path}.arguments")
    return {"name": name, "arguments": item.arguments}


def _thought(item: InputItem) -> str:
    if item.thought is not None:
        return item.thought
    parts = item.content if isinstance(item.content, list) and item.content else item.summary or []
    return "".join(part.text or "" for part in parts)


def _other_message(path: str, item: InputItem) -> dict[str, Any]:
    if item.type in RESULTS:
        return {"role": "tool", "tool_call_id": item.call_id or item.id, "content": _output(item.output)}
    if item.type not in ("message", None):
        raise RequestError(f"{path}: items of type {item.type[:40]!r} are not supported", param=path)
    if item.role is None:
        raise RequestError(f"{path}: a message needs 'role'", param=f"{path}.role")
    if item.content is None:
        message = f"{path}: a message of role {item.role!r} needs 'content'"
        raise RequestError(message, param=f"{path}.content")
    return {"role": item.role, "content": _text(f"{path}.content", item.content)}


def _output(output: str | list[ItemPart] | None) -> str:
    if isinstance(output, list):
        return "".join(text_or_placeholder(part.type, part.text) for part in output)
    return output or ""


def _text(path: str, content: str | list[ItemPart] | None) -> Any:
    if not isinstance(content, list):
        return content or ""
    texts = [_part_text(f"{path}[{index}]", part) for index, part in enumerate(content)]
    return [{"type": "text", "text": text} for text in texts]


def _part_text(path: str, part: ItemPart) -> str:
    text = part.refusal if part.type == "refusal" else part.text
    if part.type not in ("input_text", "output_text", "text", "refusal") or text is None:
        message = f"{path}: parts of type {part.type[:40]!r} are not supported, this model reads text"
        raise RequestError(message, param=path)
    return text

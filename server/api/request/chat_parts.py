"""What the body of a chat completion is made of; `chat_schema` puts it together."""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic_core
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from config.errors import RequestError
from server.api.request.common_fields import Count, Lenient, Listed, Noted, Options, fault
from server.glm.templates.template import Effort


class ContentPart(Lenient):
    """A part of a message's content."""

    type: str
    text: str | None = None
    refusal: str | None = None

    @property
    def said(self) -> str | None:
        """The text of the part."""
        return self.refusal if self.type == "refusal" else self.text


# Parts that hold text, by the names that they have in this dialect and in the others.
TEXTS = ("text", "input_text", "output_text", "refusal")
# What is no text, by words in the names of its parts in all dialects.
_MEDIA = ("image", "file", "document", "audio", "video")


def text_or_placeholder(kind: str, text: str | None, name: str | None = None) -> str:
    """The text of a part of a tool's result, or what the model reads in the place of another kind of part.

    `name` is that of the tool which a reference names.
    """
    if kind in TEXTS:
        return text or ""
    if name is not None:
        return f"[tool: {name}]"
    medium = next((medium for medium in _MEDIA if medium in kind), kind[:40])
    return f"[{medium} left out: this model reads text]"


class FunctionCall(Lenient):
    """A call that the model made; the arguments are JSON in a string, or what became of it on its way."""

    name: str
    arguments: Any = None


def read_arguments(given: Any, param: str) -> tuple[dict[str, Any], str]:
    """The arguments of an earlier call, and as text what is no JSON object: cut, damaged, of another type.

    Raises RequestError for JSON that is nested too deeply; `param` is the client's name of the field.
    """
    if isinstance(given, dict):
        return given, ""
    if not isinstance(given, str):
        return {}, "" if given is None else json.dumps(given, ensure_ascii=False)
    try:
        value = pydantic_core.from_json(given or "{}", allow_inf_nan=False)
    except ValueError as error:
        if "recursion limit" in str(error):
            raise RequestError(f"{param} is nested too deeply: {error}", param=param) from error
        return {}, given
    return (value, "") if isinstance(value, dict) else ({}, given)


class ToolCall(Lenient):
    """A tool call of an earlier turn."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class ReasoningDetail(Lenient):
    """OpenRouter's form of an earlier thought."""

    text: str | None = None


class Reasoning(Options):
    """OpenRouter's `reasoning`. There are no summaries: the thought itself is sent."""

    ignored: ClassVar[frozenset[str]] = frozenset(["summary", "context", "mode"])

    effort: Effort | None = None
    enabled: bool | None = None
    exclude: bool | None = None
    max_tokens: Count | None = None


class ConfigurationUpdate(Lenient):
    """A change of mind in the middle of a conversation."""

    reasoning: Reasoning | None = None


class Message(Lenient):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Listed[ContentPart] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    reasoning_details: Listed[ReasoningDetail] | None = None
    tool_calls: Listed[ToolCall] | None = None
    tool_call_id: str | None = None
    configuration_update: ConfigurationUpdate | None = None
    function_call: None = (
        None  # the old form of a call: whoever still sends one must know that it is not read
    )
    audio: None = None
    images: Any = None  # Ollama's place for them

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role not in ("assistant", "tool"):
            raise fault("content", f"a message of role {self.role!r} needs content")
        if self.images:
            raise fault("images", "a message can only hold text: this model reads no images")
        for index, part in enumerate(self._parts if self.role != "tool" else ()):
            if part.type not in TEXTS:
                message = f"a part can only be of type 'text', not {part.type[:40]!r}: this model reads text"
                raise fault(f"content[{index}].type", message)
            if part.said is None:
                raise fault(f"content[{index}].text", f"a part of type {part.type!r} needs 'text'")
        return self

    @property
    def _parts(self) -> list[ContentPart]:
        return self.content if isinstance(self.content, list) else []

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(text_or_placeholder(part.type, part.said) for part in self.content)
        return self.content or ""

    def overlooked(self) -> Iterator[str]:
        """What a tool gave that is no text: a client cannot help that, so a placeholder stands for it."""
        for index, part in enumerate(self._parts):
            if part.type not in TEXTS:
                yield f"content[{index}].{part.type}"

    @property
    def thought(self) -> str | None:
        """The reasoning of an earlier turn, in whichever form it came back."""
        details = "".join(detail.text or "" for detail in self.reasoning_details or [])
        return self.reasoning_content or self.reasoning or details or None


class Function(BaseModel):
    """What the model is told about a function, keys in the client's order."""

    model_config = ConfigDict(strict=True, extra="allow")

    # the format of calls has no place for blanks or tags in a name
    name: Annotated[str, Field(pattern=r"^[^\s<>]{1,256}$")]


class Tool(Noted):
    """A tool that the model may call; one that is hosted elsewhere has another type, and is not here."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str = "function"
    function: Function | None = None

    @model_validator(mode="after")
    def _has_a_function(self) -> Self:
        if self.type == "function" and self.function is None:
            raise fault("function", "a tool of type 'function' needs 'function'")
        if self.type == "custom":
            raise fault(
                "type", "tools of type 'custom' are not supported here: make it one of type 'function'"
            )
        return self

    def overlooked(self) -> Iterator[str]:
        """The type of a hosted tool."""
        if self.type != "function":
            yield self.type


class TemplateOptions(Options):
    """`chat_template_kwargs`: the template's own switches."""

    enable_thinking: bool | None = None
    clear_thinking: bool | None = None
    reasoning_effort: Effort | None = None


class Thinking(Options):
    """Z.ai's switch."""

    type: Literal["enabled", "disabled"]
    clear_thinking: bool | None = None


class JsonSchema(Lenient):
    """A schema and its name. It is enforced whether `strict` is true or not."""

    name: str | None = None
    strict: bool | None = None
    json_schema: Any = Field(default=None, alias="schema")


class ResponseFormat(Options):
    """What the content must be."""

    refused: ClassVar[Mapping[str, str]] = {"schema": "the schema belongs into 'json_schema'"}

    type: Literal["text", "json_object", "json_schema", "grammar", "regex"]
    json_schema: JsonSchema | None = None
    grammar: str | None = None
    regex: Annotated[str, Field(max_length=4096)] | None = None

    @model_validator(mode="after")
    def _says_what(self) -> Self:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.json_schema is None):
            raise fault("json_schema", "type 'json_schema' needs 'json_schema.schema'")
        if self.type == "grammar" and not self.grammar:
            raise fault("grammar", "type 'grammar' needs 'grammar'")
        if self.type == "regex" and not self.regex:
            raise fault("regex", "type 'regex' needs 'regex'")
        return self


class NamedFunction(Lenient):
    """The name of a tool."""

    name: str


class NamedTool(Lenient):
    """The one tool that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


# Words for whether a tool is called, alone or as the type of an object, and what they mean here.
_WORDS = {"none": "none", "auto": "auto", "required": "required", "any": "required"}


def plain_choice(choice: Any) -> Any:
    """The word of a choice that names no tool, whatever form it has; any other choice as it is."""
    word = choice.get("type") if isinstance(choice, dict) else choice
    return _WORDS.get(word, choice) if isinstance(word, str) else choice


def not_hosted(choice: Any) -> Any:
    """The choice, unless it is of a tool that is hosted elsewhere: nobody here could carry it out."""
    choice = plain_choice(choice)
    kind = choice.get("type", "function") if isinstance(choice, dict) else "function"
    if kind != "function":
        raise fault("", f"a choice of type {str(kind)[:40]!r} is not supported, only a function by its name")
    return choice


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedTool, BeforeValidator(not_hosted)]

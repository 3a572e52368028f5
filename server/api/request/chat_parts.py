"""What the body of a chat completion is made of; `chat_schema` puts it together."""

import json
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, model_validator

from config.errors import RequestError
from server.api.request.common_fields import Exact, Listed
from server.glm.effort import Effort


class Lenient(BaseModel):
    """Parts of a body in which clients send back whatever they once received."""

    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(Lenient):
    """Content in parts. This model reads text only."""

    type: Literal["text"]
    text: str


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


class Reasoning(Exact):
    """OpenRouter's `reasoning`. There are no summaries: the thought itself is sent."""

    ignored: ClassVar[frozenset[str]] = frozenset(["summary", "context", "mode"])

    effort: Effort | None = None
    enabled: bool | None = None
    exclude: bool | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None


class ConfigurationUpdate(Lenient):
    """A change of mind in the middle of a conversation."""

    reasoning: Reasoning | None = None


class Message(Lenient):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Listed[TextPart] | None = None
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

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role!r} needs content")
        return self

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

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


class Tool(BaseModel):
    """A tool that the model may call."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["function"]
    function: Function


class TemplateOptions(Exact):
    """`chat_template_kwargs`: the template's own switches."""

    enable_thinking: bool | None = None
    clear_thinking: bool | None = None
    reasoning_effort: Effort | None = None


class Thinking(Exact):
    """Z.ai's switch."""

    type: Literal["enabled", "disabled"]
    clear_thinking: bool | None = None


class JsonSchema(Lenient):
    """A schema and its name. It is enforced whether `strict` is true or not."""

    name: str | None = None
    strict: bool | None = None
    json_schema: Any = Field(default=None, alias="schema")


class ResponseFormat(Exact):
    """What the content must be."""

    type: Literal["text", "json_object", "json_schema", "grammar", "regex"]
    json_schema: JsonSchema | None = None
    grammar: str | None = None
    regex: Annotated[str, Field(max_length=4096)] | None = None

    @model_validator(mode="after")
    def _says_what(self) -> Self:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.json_schema is None):
            raise ValueError("type 'json_schema' needs 'json_schema.schema'")
        if self.type == "grammar" and not self.grammar:
            raise ValueError("type 'grammar' needs 'grammar'")
        if self.type == "regex" and not self.regex:
            raise ValueError("type 'regex' needs 'regex'")
        return self


class NamedFunction(Lenient):
    """The name of a tool."""

    name: str


class NamedTool(Lenient):
    """The one tool that must be called."""

    type: Literal["function"]
    function: NamedFunction

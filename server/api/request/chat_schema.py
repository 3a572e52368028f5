"""The body of a chat completion, and the form in which a chat template takes its messages."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from server.api.request.chat_parts import (
    Function,
    Message,
    NamedTool,
    Reasoning,
    ResponseFormat,
    TemplateOptions,
    Thinking,
    Tool,
    ToolCall,
    ToolChoice,
    read_arguments,
)
from server.api.request.common_fields import Count, GenerationRequest, Listed, Whole, fault
from server.glm.lexer import THINK_TAGS
from server.glm.templates.template import Effort
from server.glm.tools import ToolSet

REFUSED_IN_CHAT = {
    "functions": "it is the old form of 'tools'",
    "function_call": "it is the old form of 'tool_choice'",
}


class ChatRequest(GenerationRequest):
    """The body of POST /chat/completions."""

    refused: ClassVar[Mapping[str, str]] = {**GenerationRequest.refused, **REFUSED_IN_CHAT}

    messages: Annotated[Listed[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    tools: Listed[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning: Reasoning | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None
    enable_thinking: bool | None = None
    thinking: Thinking | None = None
    chat_template_kwargs: TemplateOptions | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not any(map(_has_turn, self.messages)):
            raise fault("messages", "'messages' only change the configuration: there is nothing to answer")
        return self

    @model_validator(mode="after")
    def _asks_for_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise fault("top_logprobs", "'top_logprobs' needs 'logprobs' to be true")
        return self

    @model_validator(mode="after")
    def _can_choose(self) -> Self:
        names: set[str] = set()
        for name in (function.name for function in self.functions):
            if name in names:  # a call says only the name: nobody knew whose schema it follows
                raise fault("tools", f"'tools' has {name[:100]!r} twice: names of tools must differ")
            names.add(name)
        if self.tool_choice == "required" and not names:
            raise fault(
                "tool_choice", "'tool_choice' is \"required\", but there are no tools of the client's"
            )
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            name = self.tool_choice.function.name[:100]
            raise fault("tool_choice", f"'tool_choice' names {name!r}, which no tool of the client's is")
        return self

    @property
    def _own_tools(self) -> list[Tool]:
        return [tool for tool in self.tools or [] if tool.type == "function"]

    @property
    def functions(self) -> list[Function]:
        """The client's own tools: those that are hosted elsewhere are left out."""
        return [tool.function for tool in self._own_tools if tool.function]

    @property
    def limit(self) -> int | None:
        """Tokens of the answer, thought included."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def max_reasoning_tokens(self) -> int | None:
        """Tokens after which the thought is closed."""
        return self.reasoning.max_tokens if self.reasoning else None

    @property
    def hides_reasoning(self) -> bool:
        """Whether the thought is wanted in the answer."""
        return self.include_reasoning is False or bool(self.reasoning and self.reasoning.exclude)

    @property
    def effort(self) -> Effort | None:
        """How hard to think, from whichever field says so; a later message wins."""
        options = self.chat_template_kwargs
        updates = [message.configuration_update for message in reversed(self.messages)]
        later = [update.reasoning.effort for update in updates if update and update.reasoning]
        nested = self.reasoning.effort if self.reasoning else None
        return (
            next(filter(None, later), None)
            or nested
            or self.reasoning_effort
            or (options.reasoning_effort if options else None)
        )

    @property
    def is_thinking_enabled(self) -> bool | None:
        """Whether to think at all, from whichever field says so."""
        switches = [
            self.reasoning.enabled if self.reasoning else None,
            self.thinking.type == "enabled" if self.thinking else None,
            self.enable_thinking,
            self.chat_template_kwargs.enable_thinking if self.chat_template_kwargs else None,
        ]
        return next((switch for switch in switches if switch is not None), None)

    @property
    def clears_thinking(self) -> bool:
        """Whether thoughts of earlier turns are left out; by default they stay.

        Leaving them out rewrites the prompt at each user message, and what was saved of it is lost.
        """
        of_thinking = self.thinking.clear_thinking if self.thinking else None
        of_template = self.chat_template_kwargs.clear_thinking if self.chat_template_kwargs else None
        return bool(of_thinking or of_template)

    def template_tools(self) -> list[dict[str, Any]] | None:
        """Tools as the template takes them."""
        return [
            {"type": tool.type, **_of_the_tool(tool), "function": _in_order(tool.function)}
            for tool in self._own_tools
            if tool.function
        ] or None

    def forced_functions(self) -> list[dict[str, Any]]:
        """The functions of which one must be called; none where the model may choose."""
        functions = [_in_order(function) for function in self.functions]
        if isinstance(self.tool_choice, NamedTool):
            return [one for one in functions if one["name"] == self.tool_choice.function.name]
        return functions if self.tool_choice == "required" else []

    def tool_set(self) -> ToolSet | None:
        """Tools as the parser of answers takes them; None where no call may be made."""
        tools = self.template_tools()
        return ToolSet(tool["function"] for tool in tools) if tools and not self.forbids_calls else None

    @property
    def forbids_calls(self) -> bool:
        """Whether no tool may be called. The prompt shows them all the same: its saved prefix stays."""
        return self.tool_choice == "none"

    def template_messages(self) -> list[dict[str, Any]]:
        """Messages as the template takes them."""
        return [
            _template_message(f"messages[{index}]", message)
            for index, message in enumerate(self.messages)
            if _has_turn(message)
        ]


def _has_turn(message: Message) -> bool:
    """Whether a message is more than a change of configuration."""
    return bool(message.text) or message.configuration_update is None


def _of_the_tool(tool: Tool) -> dict[str, Any]:
    """What a client adds to a tool; marks for another's cache are not for the model's eyes."""
    return {key: value for key, value in (tool.model_extra or {}).items() if key != "cache_control"}


def _in_order(function: Function) -> dict[str, Any]:
    return {"name": function.name, **(function.model_extra or {})}


def _template_message(path: str, message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    result: dict[str, Any] = {"role": role, "content": message.text}
    if message.role == "assistant":
        thought, result["content"] = _parted(message)
        if thought is not None:
            result["reasoning_content"] = thought
    if message.role == "tool" and message.tool_call_id:
        result["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        result["tool_calls"] = [
            _template_call(f"{path}.tool_calls[{position}]", call)
            for position, call in enumerate(message.tool_calls)
        ]
    return result


def _parted(message: Message) -> tuple[str | None, str]:
    """The thought and the content of a turn; some clients keep the thought in front of the content, in tags.

    A message that only mentions the tags stays whole.
    """
    (start, end), text = THINK_TAGS, message.text.lstrip()
    if message.thought is None and text.startswith(start) and end in text:
        thought, _, content = text.removeprefix(start).partition(end)
        return thought, content
    return message.thought, message.text


def _template_call(path: str, call: ToolCall) -> dict[str, Any]:
    """A call as templates take it. Arguments that are no JSON object stand behind the name, as they are."""
    arguments, rest = read_arguments(call.function.arguments, f"{path}.function.arguments")
    function = {"name": call.function.name + rest, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}

"""Tools of OpenAI's Responses as functions of chat, and calls of those functions as items again.

A namespace is flattened into the names of its functions, and a custom tool is a function with one string.
Tools that are hosted elsewhere are left out. Pure: called by the schema of bodies and by the route.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import pydantic_core
from pydantic import BeforeValidator, model_validator

from server.api.request.chat_parts import plain_choice
from server.api.request.common_fields import Lenient, Listed, fault

OWN = ("function", "custom")
INPUT = "input"


class CustomFormat(Lenient):
    """The language that a custom tool's string is written in."""

    type: str
    syntax: str | None = None
    definition: str | None = None


class ResponsesTool(Lenient):
    """A function, a custom tool, or a namespace of both; OpenAI's own tools have other types."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    format: CustomFormat | None = None
    tools: "Listed[ResponsesTool] | None" = None

    @model_validator(mode="after")
    def _has_a_name(self) -> Self:
        if not self.name and not self.is_hosted:
            raise fault("name", f"a tool of type {self.type!r} needs 'name'")
        return self

    @property
    def is_hosted(self) -> bool:
        """Whether OpenAI carries it out."""
        return self.type not in (*OWN, "namespace")

    def overlooked(self) -> Iterator[str]:
        """The type of a hosted tool."""
        if self.is_hosted:
            yield self.type

    def echo(self) -> dict[str, Any]:
        """The tool as the response repeats it."""
        own = self.model_dump(by_alias=True, exclude_none=True, exclude={"tools"})
        if self.type == "namespace":
            return own | {"tools": [tool.echo() for tool in self.tools or [] if not tool.is_hosted]}
        if self.type == "function":  # clients want both keys, null where nothing was said
            return own | {"parameters": self.parameters, "strict": bool(self.strict)}
        return own


class ToolToCall(Lenient):
    """The one tool that must be called."""

    type: Literal["function", "custom"]
    name: str
    namespace: str | None = None


def _is_own(choice: Any) -> Any:
    choice = plain_choice(choice)
    kind = choice.get("type") if isinstance(choice, dict) else OWN[0]
    if kind not in OWN:
        raise fault("", f"a choice of type {str(kind)[:40]!r} is not supported, only a function by its name")
    return choice


ToolChoice = Annotated[Literal["none", "auto", "required"] | ToolToCall, BeforeValidator(_is_own)]


@dataclass(frozen=True)
class OwnTool:
    """A tool of the client's: `flat_name` is what the model calls it, `path` where the body has it."""

    tool: ResponsesTool
    path: str
    namespace: str | None = None

    @property
    def flat_name(self) -> str:
        """The name that tells it from tools of other namespaces."""
        return flat_name(self.namespace, self.tool.name or "")

    @property
    def is_custom(self) -> bool:
        """Whether it takes a string instead of arguments."""
        return self.tool.type == "custom"

    def function(self) -> dict[str, Any]:
        """The function of chat."""
        description = self._description() if self.is_custom else self.tool.description
        parameters = _one_string() if self.is_custom else self.tool.parameters
        named = {"name": self.flat_name, "description": description, "parameters": parameters}
        return {"type": "function", "function": {name: v for name, v in named.items() if v is not None}}

    def _description(self) -> str | None:
        made = self.tool.format
        if made is None or not made.definition:
            return self.tool.description
        rule = f"The input must match this grammar ({made.syntax or made.type}):\n{made.definition}"
        return "\n\n".join(filter(None, [self.tool.description, rule]))


def own_tools(
    tools: list[ResponsesTool] | None, namespace: str | None = None, path: str = ""
) -> Iterator[OwnTool]:
    """The client's own tools, those in namespaces, too."""
    for index, tool in enumerate(tools or []):
        place = f"{path}tools[{index}]"
        if tool.type == "namespace":
            yield from own_tools(tool.tools, flat_name(namespace, tool.name or ""), f"{place}.")
        elif not tool.is_hosted:
            yield OwnTool(tool, place, namespace)


def flat_name(namespace: str | None, name: str) -> str:
    """The name of a function in a namespace, in one word."""
    if not namespace:
        return name
    has_bar = namespace.endswith("_") or name.startswith("_")
    return f"{namespace}{name}" if has_bar else f"{namespace}__{name}"


def custom_arguments(text: str) -> str:
    """The arguments of the function that a custom tool is, for this input."""
    return json.dumps({INPUT: text}, ensure_ascii=False)


def custom_input(arguments: str) -> str:
    """The input in the arguments of a custom tool's function, as far as there is one.

    What is no such input is given as it is.
    """
    try:
        value = pydantic_core.from_json(arguments, allow_partial="trailing-strings")
    except ValueError:
        return arguments
    text = value.get(INPUT, "" if not value else None) if isinstance(value, dict) else None
    return text if isinstance(text, str) else arguments


def _one_string() -> dict[str, Any]:
    properties = {INPUT: {"type": "string"}}
    return {"type": "object", "properties": properties, "required": [INPUT], "additionalProperties": False}

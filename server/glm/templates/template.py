"""Renders conversations to the text that the model was trained on.

The checkpoint's own template wins; ours, for GLM-5.2 and GLM-5.3-Flash, serves checkpoints that have none.
Templates are foreign programs in jinja, with what transformers 5.24 gives them, run in a sandbox: whatever
one of them does wrong is one error. Nothing here keeps state.
"""

import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from config.errors import CheckpointError, RequestError
from server.glm.templates.template_files import (
    DEFAULT,
    TOOL_USE,
    TemplateSource,
    find_templates,
    special_tokens,
)

# What JSON in ASCII escapes: all but ASCII, and but the stand-ins of `shield`, which nothing may change.
ESCAPED = re.compile("[^\x00-\x7f\udc00-\udfff]")


class _Generation(Extension):
    """The block `generation`, which marks the assistant's words for training: rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)  # what is set inside is not seen behind it


def compile_template(source: str, origin: str) -> jinja2.Template:
    """A template ready to run; CheckpointError names `origin` where the source is no jinja."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except Exception as error:  # jinja compiles it to Python, whose compiler has limits and errors of its own
        raise CheckpointError(f"{origin} is not a jinja template: {_reason(error)}") from error


def run_template(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """What the template makes of the variables; RequestError says why it cannot."""
    try:
        return template.render(variables)
    except jinja2.TemplateError as error:
        message = f"the chat template refused these messages: {_reason(error)}"
        raise RequestError(message, param="messages") from error
    except Exception as error:  # somebody else's program may raise anything
        message = f"the chat template cannot render these messages: {_reason(error)}"
        raise RequestError(message, param="messages") from error


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return ESCAPED.sub(lambda found: json.dumps(found.group())[1:-1], text) if ensure_ascii else text


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def template_options(effort: Effort | None, is_enabled: bool | None) -> dict[str, Any]:
    """The template's variables. In the template itself every word but "high" would mean Max."""
    if is_enabled is False or effort in ("none", "minimal"):
        return {"enable_thinking": False}
    options: dict[str, Any] = {"enable_thinking": True}
    if effort in ("low", "medium", "high"):
        options["reasoning_effort"] = "high"
    elif effort is not None:
        options["reasoning_effort"] = "max"
    return options


def always_thinking_options(effort: Effort | None, is_enabled: bool | None) -> dict[str, Any]:
    """The same for a model that always thinks: a request that wants no thought gets the least."""
    words = {"none": "low", "minimal": "low", "low": "low", "medium": "high", "high": "high"}
    word = "low" if is_enabled is False else words.get(effort or "max", "max")
    return {"enable_thinking": True, "reasoning_effort": word, "always_thinks": True}


OUR_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


class ChatTemplate:
    """A compiled chat template, perhaps with another for requests that bring tools.

    `special`: variables that every rendering sees. `always_thinks`: the model knows no answer without a
    thought.
    """

    def __init__(
        self,
        source: str,
        origin: str,
        tool_use: TemplateSource | None = None,
        special: Mapping[str, Any] | None = None,
        *,
        always_thinks: bool = False,
    ) -> None:
        self.always_thinks = always_thinks
        self._template = compile_template(source, origin)
        self._with_tools = compile_template(tool_use.text, tool_use.origin) if tool_use else self._template
        self._variables = {"documents": None, **(special or {})}

    def options(self, effort: Effort | None, is_enabled: bool | None) -> dict[str, Any]:
        """The template's variables for how hard to think."""
        choose = always_thinking_options if self.always_thinks else template_options
        return choose(effort, is_enabled)

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, options: dict[str, Any]
    ) -> str:
        """The prompt for the next assistant turn. `options` are the template's own variables."""
        variables = {
            **self._variables, **options,
            "messages": [_with_thinking(message) for message in messages], "tools": tools,
            "add_generation_prompt": True,
        }  # fmt: skip
        return run_template(self._with_tools if tools else self._template, variables)


def load_chat_template(checkpoint: Path, *, always_thinks: bool = False) -> ChatTemplate:
    """The template of a checkpoint folder, else ours."""
    found = find_templates(checkpoint)
    source = found.get(DEFAULT) or TemplateSource(OUR_TEMPLATE.read_text(encoding="utf-8"), OUR_TEMPLATE.name)
    tool_use, special = found.get(TOOL_USE), special_tokens(checkpoint)
    return ChatTemplate(source.text, source.origin, tool_use, special, always_thinks=always_thinks)


def _with_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """The thought also under the name that some templates read it by, as in transformers."""
    thought = message.get("reasoning_content")
    return message if thought is None else {"thinking": thought, **message}

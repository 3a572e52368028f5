"""The jinja that chat templates are written in: what transformers gives them, in a sandbox.

Templates are foreign programs: `compile_template` and `run_template` turn whatever one of them does wrong
into one error. Neither keeps state. Names and behaviour are those of transformers 5.24.
"""

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from config.errors import CheckpointError, RequestError

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

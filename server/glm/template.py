"""Renders conversations to the text that the model was trained on.

The checkpoint's own template wins; ours, for GLM-5.2, serves checkpoints that have none. Templates are
foreign programs: they run in a sandbox. Shared by all requests, without state of its own.
"""

import json
import re
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from config.errors import CheckpointError, RequestError
from server.glm.files import read_json

# What JSON in ASCII escapes: all but ASCII, and but the shield's stand-ins.
ESCAPED = re.compile("[^\x00-\x7f\udc00-\udfff]")

OUR_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, origin: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"{origin} is not a jinja template: {error}") from error

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, options: dict[str, Any]
    ) -> str:
        """The prompt for the next assistant turn. `options` are the template's own variables."""
        variables = {**options, "messages": messages, "tools": tools, "add_generation_prompt": True}
        try:
            return self._template.render(variables)
        except jinja2.TemplateError as error:
            raise RequestError(
                f"the chat template refused these messages: {error}", param="messages"
            ) from error
        except (TypeError, ValueError, AttributeError) as error:
            raise RequestError(f"the chat template cannot render these messages: {error}") from error


def load_chat_template(checkpoint: Path) -> ChatTemplate:
    """The template of a checkpoint folder, else ours."""
    own = checkpoint / "chat_template.jinja"
    if own.exists():
        return ChatTemplate(own.read_text(encoding="utf-8"), str(own))
    configured = read_json(checkpoint / "tokenizer_config.json").get("chat_template")
    if isinstance(configured, list):  # several by name
        configured = {item["name"]: item["template"] for item in configured}.get("default")
    if configured:
        return ChatTemplate(configured, "chat_template in tokenizer_config.json")
    return ChatTemplate(OUR_TEMPLATE.read_text(encoding="utf-8"), OUR_TEMPLATE.name)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as transformers' templates get it; stand-ins of the shield are never escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, **options)
    return ESCAPED.sub(lambda found: json.dumps(found.group())[1:-1], text) if ensure_ascii else text


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

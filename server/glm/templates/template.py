"""Renders conversations to the text that the model was trained on.

The checkpoint's own template wins; ours, for GLM-5.2, serves checkpoints that have none. Shared by all
requests, without state of its own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.glm.templates.template_files import (
    DEFAULT,
    TOOL_USE,
    TemplateSource,
    find_templates,
    special_tokens,
)
from server.glm.templates.template_language import compile_template, run_template

OUR_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


class ChatTemplate:
    """A compiled chat template, perhaps with another for requests that bring tools.

    `special`: variables that every rendering sees.
    """

    def __init__(
        self,
        source: str,
        origin: str,
        tool_use: TemplateSource | None = None,
        special: Mapping[str, Any] | None = None,
    ) -> None:
        self._template = compile_template(source, origin)
        self._with_tools = compile_template(tool_use.text, tool_use.origin) if tool_use else self._template
        self._variables = {"documents": None, **(special or {})}

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


def load_chat_template(checkpoint: Path) -> ChatTemplate:
    """The template of a checkpoint folder, else ours."""
    found = find_templates(checkpoint)
    source = found.get(DEFAULT) or TemplateSource(OUR_TEMPLATE.read_text(encoding="utf-8"), OUR_TEMPLATE.name)
    return ChatTemplate(source.text, source.origin, found.get(TOOL_USE), special_tokens(checkpoint))


def _with_thinking(message: dict[str, Any]) -> dict[str, Any]:
    """The thought also under the name that some templates read it by, as in transformers."""
    thought = message.get("reasoning_content")
    return message if thought is None else {"thinking": thought, **message}

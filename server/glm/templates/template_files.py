"""Which chat templates a checkpoint carries, in all the places where transformers and mlx-vlm write them.

Called at start-up. A template file wins over a processor's, and that over the tokenizer's; of templates with
names, `default` renders and `tool_use` does where a request has tools.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from config.errors import CheckpointError
from server.glm.files import read_json

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
DEFAULT, TOOL_USE = "default", "tool_use"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TemplateSource(NamedTuple):
    """The text of a template, and where it was found."""

    text: str
    origin: str


def find_templates(checkpoint: Path) -> dict[str, TemplateSource]:
    """Templates by name, empty where there are none; CheckpointError for what is no template."""
    found: dict[str, TemplateSource] = {}
    for name in ("tokenizer_config.json", "chat_template.json"):
        value = read_json(checkpoint / name).get("chat_template")
        found |= {
            key: TemplateSource(text, f"{checkpoint / name}: chat_template")
            for key, text in _named(value, checkpoint / name)
        }
    folder = checkpoint / TEMPLATE_FOLDER
    for key, path in [
        *((path.stem, path) for path in sorted(folder.glob("*.jinja"))),
        (DEFAULT, checkpoint / TEMPLATE_FILE),
    ]:
        if path.exists():
            found[key] = TemplateSource(_read(path), str(path))
    found = {key: source for key, source in found.items() if source.text.strip()}
    if found and DEFAULT not in found:
        raise CheckpointError(
            f"{checkpoint} has chat templates for {', '.join(sorted(found))} and none called {DEFAULT}; put "
            f"the one to use into {TEMPLATE_FILE}"
        )
    return found


def special_tokens(checkpoint: Path) -> dict[str, Any]:
    """The variables `bos_token`, `eos_token` and others, which transformers gives to every template."""
    values = read_json(checkpoint / "special_tokens_map.json") | read_json(
        checkpoint / "tokenizer_config.json"
    )
    texts = {name: _token_text(values.get(name)) for name in _SPECIAL_TOKENS}
    others = values.get("additional_special_tokens")
    listed = [_token_text(value) for value in others] if isinstance(others, list) else []
    tokens: dict[str, Any] = {name: text for name, text in texts.items() if text is not None}
    return tokens | ({"additional_special_tokens": listed} if listed else {})


def _named(value: Any, path: Path) -> Iterator[tuple[str, str]]:
    """One template, an object of them by name, or a list of objects with `name` and `template`."""
    if isinstance(value, list):
        items = [
            (item.get("name"), item.get("template")) if isinstance(item, Mapping) else (None, item)
            for item in value
        ]
    elif isinstance(value, Mapping):
        items = list(value.items())
    else:
        items = [] if value is None else [(DEFAULT, value)]
    for name, text in items:
        if not isinstance(name, str) or not isinstance(text, str):
            raise CheckpointError(
                f"{path}: chat_template holds {str(text)[:40]!r} under the name {name!r}; a template is text"
            )
        yield name, text


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the chat template {path}: {error}") from error


def _token_text(value: Any) -> str | None:
    """A token as text, which old files write as an object with its `content`."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None

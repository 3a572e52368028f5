"""The text of a checkpoint's tokenizer.json, completed by what its neighbours know.

Converters write some tokens only into tokenizer_config.json (`added_tokens_decoder`) or added_tokens.json, as
transformers would add them when it loads; without them a tag falls into pieces that the model never saw.
Read by the HTTP process for text, and by the engine for grammars.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from config.errors import CheckpointError
from server.glm.files import read_json

_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}

_MOST_DIGITS = 7  # no vocabulary is larger, and holes are filled one by one

Entry = dict[str, Any]  # of `added_tokens` in tokenizer.json


def read_tokenizer_file(checkpoint: Path) -> str:
    """tokenizer.json with all tokens that the folder declares; CheckpointError where they do not fit it."""
    path = checkpoint / "tokenizer.json"
    try:
        text = path.read_text(encoding="utf-8")
        declared = list(_declared(checkpoint))
        return _completed(text, declared, path) if declared else text
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"cannot read the tokenizer {path}: {error}") from error


def _declared(checkpoint: Path) -> Iterator[Entry]:
    """Tokens that the neighbours of tokenizer.json name, in the form that it gives them."""
    path = checkpoint / "tokenizer_config.json"
    decoder = read_json(path).get("added_tokens_decoder") or {}
    others = read_json(checkpoint / "added_tokens.json")
    if not isinstance(decoder, Mapping):
        raise CheckpointError(f"{path}: added_tokens_decoder is {str(decoder)[:40]!r} instead of an object")
    for number, token in decoder.items():
        described = token if isinstance(token, Mapping) else {"content": token}
        yield _entry(path, number, described)
    for content, number in others.items():
        yield _entry(checkpoint / "added_tokens.json", str(number), {"content": content, "special": False})


def _entry(path: Path, number: str, token: Mapping[str, Any]) -> Entry:
    content = token.get("content")
    is_number = number.isascii() and number.isdigit() and len(number) <= _MOST_DIGITS
    if not is_number or not isinstance(content, str) or not content:
        raise CheckpointError(
            f"{path}: added_tokens: token {number[:40]!r} is described by {str(token)[:80]!r}"
        )
    flags = {name: bool(token.get(name, default)) for name, default in _FLAGS.items()}
    return {"id": int(number), "content": content, **flags}


def _completed(text: str, declared: list[Entry], path: Path) -> str:
    document = json.loads(text)
    added: list[Entry] = document.get("added_tokens") or []
    vocabulary: dict[str, int] = document["model"]["vocab"]
    known = {entry["content"] for entry in added}
    missing = {entry["content"]: entry for entry in declared if entry["content"] not in known}
    if not missing:
        return text
    _check_ids(path, missing, added, vocabulary)
    following = max(len(vocabulary), max((entry["id"] + 1 for entry in added), default=0))
    new_ids = sorted(entry["id"] for entry in missing.values() if entry["content"] not in vocabulary)
    document["added_tokens"] = sorted([*added, *missing.values()], key=lambda entry: entry["id"])
    if new_ids != list(range(following, following + len(new_ids))):
        _number(vocabulary, document["added_tokens"])
    return json.dumps(document, ensure_ascii=False)


def _number(vocabulary: dict[str, int], added: list[Entry]) -> None:
    """Enters the added tokens into the vocabulary under their own numbers, and words nobody writes for holes.

    Libraries number what is not in the vocabulary in order, whatever the file says, and count on no holes.
    """
    vocabulary |= {entry["content"]: entry["id"] for entry in added}
    taken = set(vocabulary.values())
    for token_id in range(max(taken)):
        if token_id not in taken:
            vocabulary[f"<|no token {token_id}|>".replace(" ", "\u0120")] = token_id


def _check_ids(
    path: Path, missing: Mapping[str, Entry], added: list[Entry], vocabulary: Mapping[str, int]
) -> None:
    """CheckpointError where a token would take the number of another, or has another already."""
    taken = {token_id: content for content, token_id in vocabulary.items()}
    taken |= {entry["id"]: entry["content"] for entry in added}
    for content, entry in missing.items():
        there, token_id = taken.setdefault(entry["id"], content), vocabulary.get(content, entry["id"])
        if there != content or token_id != entry["id"]:
            raise CheckpointError(
                f"{path.parent}: the token {content!r} is number {entry['id']} in tokenizer_config.json or "
                f"added_tokens.json; in tokenizer.json that is {there!r}"
                + (f", and {content!r} is number {token_id}" if token_id != entry["id"] else "")
            )

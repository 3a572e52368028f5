"""Text to token ids and back, for byte-level BPE as every GLM checkpoint has it.

`Tokenizer` is read once from a checkpoint and shared by all requests; `Detokenizer` belongs to one stream
of text. Ids are never written down in code: tags are looked up by their text.
"""

import codecs
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from config.errors import CheckpointError
from server.glm.files import read_json
from server.glm.pieces import Check, InPieces, unchecked
from server.glm.shield import Shield
from server.glm.tokenizer_file import read_tokenizer_file

ENDS_OF_TURNS = ("<|endoftext|>", "<|user|>", "<|observation|>")
DECODED_AT_ONCE = 2**16
TRANSFORMERS_DEFAULT = 1  # what it writes as eos_token_id where nobody says

log = logging.getLogger(__name__)


class Tokenizer:
    """The vocabulary of a checkpoint."""

    def __init__(self, inner: tokenizers.Tokenizer, eos_token_ids: frozenset[int]) -> None:
        self._inner = inner
        self._inner.no_truncation()
        self._inner.no_padding()
        self._ordinary = _without_added_tokens(inner)
        self._whole, self._parts = InPieces(inner), InPieces(self._ordinary)
        self.shield = Shield(inner.get_added_tokens_decoder())
        self._bytes = _token_bytes(inner)
        self._special_ids = frozenset(
            token_id for token_id, token in inner.get_added_tokens_decoder().items() if token.special
        )
        self.eos_token_ids = eos_token_ids
        self.think_id = self.token_id("<think>")
        self.end_think_id = self.token_id("</think>")

    def token_id(self, text: str) -> int | None:
        """The id of a token that is exactly this text, if the vocabulary has one."""
        token_id: int | None = self._inner.token_to_id(text)
        return token_id

    def encode(self, text: str, check: Check = unchecked) -> list[int]:
        """Ids of a text in which tags and special tokens are recognised wherever they stand.

        `check` is called now and then with the number of ids so far; what it raises ends the work.
        """
        return self._whole.encode([text], check)

    def encode_rendered(self, text: str, check: Check = unchecked) -> list[int]:
        """Ids of what a template rendered from values that the shield hid: only its own markup is markup."""
        return self._parts.encode(self.shield.cut(text), check)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; none for rows beyond the vocabulary."""
        return self._bytes.get(token_id, b"")

    def is_special(self, token_id: int) -> bool:
        """Whether a token is markup that never belongs to an answer. GLM's think and tool tags are not."""
        return token_id in self._special_ids

    def decode(self, token_ids: Sequence[int], check: Check = unchecked) -> str:
        """Text of some tokens, specials included."""
        text = bytearray()
        for start in range(0, len(token_ids), DECODED_AT_ONCE):
            check(start)
            text += b"".join(map(self.token_bytes, token_ids[start : start + DECODED_AT_ONCE]))
        return text.decode("utf-8", "replace")


class Detokenizer:
    """Turns a stream of tokens into text; a character split over tokens comes out whole with the last."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        if self._tokenizer.is_special(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """What is left of a character that was never completed."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(checkpoint: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder."""
    text = read_tokenizer_file(checkpoint)
    try:
        inner = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception, whatever is wrong with the file
        path = checkpoint / "tokenizer.json"
        raise CheckpointError(f"cannot read the tokenizer {path}: {error}") from error
    return Tokenizer(inner, _eos_token_ids(checkpoint, inner))


def _without_added_tokens(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same vocabulary without its added tokens: all text is ordinary there. Both share the model."""
    ordinary = tokenizers.Tokenizer(inner.model)
    ordinary.pre_tokenizer = inner.pre_tokenizer
    if inner.normalizer is not None:
        ordinary.normalizer = inner.normalizer
    added = inner.get_added_tokens_decoder()
    for token in added.values():
        is_markup = token.special or token.content.startswith("<")
        if is_markup and not added.keys().isdisjoint(ordinary.encode(token.content).ids):
            raise CheckpointError(
                f"tokenizer.json: the ordinary vocabulary holds the control token {token.content!r}, too: "
                "text of clients could not be told from it"
            )
    return ordinary


def _eos_token_ids(checkpoint: Path, inner: tokenizers.Tokenizer) -> frozenset[int]:
    """The declared ids together with GLM's ends of turns, found by their text.

    Files often name only one of them, and answers would run on into invented turns.
    """
    ids = map(inner.token_to_id, ENDS_OF_TURNS)
    found: set[int] = {token_id for token_id in ids if token_id is not None}
    for name in ("generation_config.json", "config.json"):
        for token_id in _declared_ends(checkpoint / name):
            if token_id == TRANSFORMERS_DEFAULT and token_id not in inner.get_added_tokens_decoder():
                continue  # nobody chose it: it is an ordinary word here
            if 0 <= token_id < inner.get_vocab_size():
                found.add(token_id)
            else:
                log.warning("%s: eos_token_id %d is beyond the vocabulary", checkpoint / name, token_id)
    return frozenset(found)


def _declared_ends(path: Path) -> list[int]:
    value = read_json(path).get("eos_token_id")
    given = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int for token_id in given):
        raise CheckpointError(f"{path}: eos_token_id {value!r} is no token id, nor a list of them")
    return given


def _token_bytes(inner: tokenizers.Tokenizer) -> dict[int, bytes]:
    if '"ByteLevel"' not in json.dumps(_decoder_of(inner)):
        raise CheckpointError("tokenizer.json is not byte-level BPE, as those of GLM are")
    byte_of = {char: byte for byte, char in _byte_characters().items()}
    added = {token_id: token.content for token_id, token in inner.get_added_tokens_decoder().items()}
    table = {token_id: text.encode() for token_id, text in added.items()}
    for text, token_id in inner.get_vocab(with_added_tokens=False).items():
        if token_id not in table:
            table[token_id] = bytes(byte_of[char] for char in text)
    return table


def _decoder_of(inner: tokenizers.Tokenizer) -> Any:
    state = inner.decoder.__getstate__() if inner.decoder is not None else b"null"
    return json.loads(state)


def _byte_characters() -> dict[int, str]:
    """Byte-level BPE writes each byte as a printable character: itself, or one from 256 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    return characters | {byte: chr(256 + position) for position, byte in enumerate(others)}

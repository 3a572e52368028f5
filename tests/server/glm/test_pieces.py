"""Long texts are encoded piece by piece: the same ids, and no more of them than are wanted."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from server.commands.checkpoint import POCKET
from server.glm import pieces
from server.glm.pieces import InPieces, unchecked

# As GLM, Llama 3 and GPT-2 take words.
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SHORT = r"'s|'t|'re|'ve|'m|'ll|'d"
PATTERNS = {
    "GLM": rf"(?i:{SHORT})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{TAIL}",
    "GPT-2": rf"{SHORT}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+",
    "single digits": rf"\p{{N}}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|{TAIL}",
}
COMMON = st.sampled_from([*"abZ é中😀  \t\n\r019'sL!?<_-.\u0301\u00a0\u2028"])
TEXT = st.text(COMMON | st.characters(codec="utf-8"), max_size=400)


def tokenizer(pattern: str | None) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer.from_file(str(POCKET / "tokenizer.json"))
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return inner


@pytest.fixture(scope="module", params=[None, *PATTERNS.values()], ids=["Pocket", *PATTERNS])
def inner(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    return tokenizer(request.param)


@settings(deadline=None, max_examples=150)
@given(text=TEXT, size=st.integers(20, 200))
def test_pieces_have_the_ids_of_the_whole(inner: tokenizers.Tokenizer, text: str, size: int) -> None:
    whole = inner.encode(text, add_special_tokens=False).ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", size)
        assert InPieces(inner).encode([text], unchecked) == whole


TEXTS = {
    "prose": "The quick brown fox jumps over 13 lazy dogs.\n" * 9000,
    "one word": "a" * 400_000,
    "blanks": " " * 400_000,
    "lines": "\n" * 400_000,
    "marks": "=" * 400_000,
    "Chinese without a mark": "的一是不了人我在有他" * 40_000,
    "emoji": "😀" * 200_000,
    "base64": "QUJD+0/1xyz" * 40_000,
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_work_stops_once_there_are_more_ids_than_wanted(inner: tokenizers.Tokenizer, text: str) -> None:
    class Enough(Exception):
        pass

    counts = []

    def check(num_ids: int) -> None:
        counts.append(num_ids)
        if num_ids > 1000:
            raise Enough

    with pytest.raises(Enough):
        InPieces(inner).encode([text], check)
    assert max(counts) <= 2**18
    assert len(counts) <= 3


def test_thousands_of_short_texts_between_tags_stop_too(inner: tokenizers.Tokenizer) -> None:
    class Enough(Exception):
        pass

    def check(num_ids: int) -> None:
        if num_ids > 1000:
            raise Enough

    for parts in (["hello", 7] * 100_000, [7] * 200_000, ["", 7] * 100_000):
        with pytest.raises(Enough):
            InPieces(inner).encode(parts, check)  # type: ignore[arg-type]


def test_a_word_beyond_all_bounds_is_cut_and_nothing_is_lost() -> None:
    inner = tokenizer(None)
    text = "x" * (2 * pieces.LONGEST_WORD + 5)
    ids = InPieces(inner).encode([text], unchecked)
    assert inner.decode(ids) == text


def test_pieces_between_tags_keep_their_order(inner: tokenizers.Tokenizer) -> None:
    parts: list[int | str] = [5, "hello there " * 20_000, 6, "x", 7, 8, "y z"]
    expected = [
        token_id
        for part in parts
        for token_id in (
            [part] if isinstance(part, int) else inner.encode(part, add_special_tokens=False).ids
        )
    ]
    assert InPieces(inner).encode(parts, unchecked) == expected

"""Long texts are hidden and cut piece by piece, with what comes of them in one go."""

import random

import pytest
import tokenizers

from server.glm import shield
from server.glm.shield import Shield

TOKENS = ("<|user|>", "<|user", "<think>", "</think>", "[gMASK]", "<sop>")
PARTS = (*TOKENS, "<", "|", "us", "er", "é", "\N{PANDA FACE}", " ", "x", "gMASK")


@pytest.mark.parametrize("piece", [1, 3, 7, 64])
def test_pieces_change_nothing(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [tokenizers.AddedToken(text, special=True, normalized=False) for text in TOKENS]
    made = Shield(dict(enumerate(tokens)))
    rng = random.Random(3)
    for _ in range(200):
        text = "".join(rng.choice(PARTS) for _ in range(rng.randrange(1, 30)))
        monkeypatch.setattr(shield, "PIECE", 10**6)
        whole = made.hide(text), made.cut(text), made.cut(made.hide(text) + text)
        monkeypatch.setattr(shield, "PIECE", piece)
        assert (made.hide(text), made.cut(text), made.cut(made.hide(text) + text)) == whole

"""Every known fault can be planted in Pocket and changes what it computes beyond `index_topk` tokens."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from models.attention.attention import Span
from server.commands.checkpoint import POCKET
from tests.models.mutants import MUTANTS
from tests.tiny_glm import Array
from training.pocket.evaluation.decode import open_pocket
from training.pocket.evaluation.planted_faults import PLANTS, RIGHT, table

LENGTH = 300


def last_logits() -> Array:
    model = open_pocket(POCKET)
    ids = [(17 + 31 * i) % model.args.vocab_size for i in range(LENGTH)]
    return np.array(model.logits(model(mx.array(ids), [Span(model.make_cache(), 0, LENGTH)])[-1:]))


@pytest.fixture(scope="module")
def right() -> Array:
    return last_logits()


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in PLANTS if name != RIGHT])
def test_the_fault_changes_pockets_logits(name: str, right: Array, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTS[name](monkeypatch)
    assert np.abs(last_logits() - right).max() > 1e-3


def test_the_table_has_a_row_for_every_fault(tmp_path: Path) -> None:
    (tmp_path / "no_relu.json").write_text('{"needle_2048": [3, 12], "needle_4096": [0, 11]}')
    text = table(tmp_path)
    assert len(text.splitlines()) == 2 + 1 + len(MUTANTS)
    assert "| no relu | 3/12 | 0/11 |" in text

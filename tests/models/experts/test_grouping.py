"""Experts of a prompt that are multiplied together, and rows that look their slots up on the device."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from models.arithmetic import CPU, Quantization
from models.experts.grouping import GROUPED_ROWS, cut_runs, lay_out, ranks_of, rows_by_expert
from streaming.fills import Fetch
from streaming.store import ExpertStore
from streaming.sweep import Place
from tests.checkpoints import greedy, open_model, save_packed
from tests.grids import few
from tests.models.make_golden import SEED
from tests.tiny_glm import WIDER, make_weights, tokens
from tests.tiny_model import logits

ON_DEVICE = replace(CPU, slots_on_device=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def packing(path: str) -> Quantization | None:
        return Quantization(64, 4) if "switch_mlp" in path else None

    return save_packed(tmp_path_factory.mktemp("grouped"), WIDER, make_weights(WIDER, SEED), packing)


def test_runs_keep_the_order_and_end_where_the_bank_changes() -> None:
    bank: dict[str, mx.array] = {}
    ring: dict[str, mx.array] = {}
    group = [Place(0, bank, 0), Place(1, bank, 1), Place(2, ring, 0), Place(5, ring, 1), Place(7, bank, 3)]
    runs = [([p.expert for p in run], together) for run, together in cut_runs(group, lambda p: p.expert != 5)]
    assert runs == [([0, 1], True), ([2], True), ([5], False), ([7], True)]


@pytest.mark.parametrize("num_rows", [1, 16, 17, 50])
def test_each_pair_finds_its_row(num_rows: int) -> None:
    wanted = np.sort(
        np.random.default_rng(num_rows).permuted(np.tile(np.arange(9), (num_rows, 1)), axis=1)[:, :3]
    )
    rows_of = rows_by_expert(wanted.astype(np.int32))
    run = [Place(expert, {}, expert) for expert in sorted(rows_of)[1:]]
    chosen, bases = lay_out(run, rows_of)
    ranks = ranks_of(rows_of, wanted.shape)
    assert chosen.shape[1] % GROUPED_ROWS == 0
    for row, column in np.ndindex(*wanted.shape):
        if (base := bases[wanted[row, column]]) >= 0:
            assert chosen.ravel()[base + ranks[row, column]] == row
    assert bases[min(rows_of)] == -1


@pytest.mark.parametrize("slots", few([None, 5, 11], [5]))
def test_experts_together_give_what_each_gives_alone(slots: int | None, folder: Path) -> None:
    ids = tokens(WIDER, 60)
    alone = logits(open_model(folder, slots).model, ids)
    few = replace(CPU, max_grouped_rows=12, experts_at_once=4)
    together = logits(open_model(folder, slots, few).model, ids)
    assert np.abs(together - alone).max() < 1e-5
    assert np.array_equal(together, logits(open_model(folder, None, few).model, ids))


@pytest.mark.parametrize("num_tokens", few([1, 4, 7], [4]))
def test_looked_up_slots_give_the_bits_of_resident_experts(num_tokens: int, folder: Path) -> None:
    prompt = tokens(WIDER, num_tokens)
    text, rows = greedy(open_model(folder).model, prompt, 12)
    opened = open_model(folder, 16, ON_DEVICE)
    for size in (16, 5, 16):
        for layer in opened.store.layers:
            opened.store.resize(layer, size)
            opened.store.acquire(layer, range(16 - size, 16))  # with 5 slots, other experts come first
        found, found_rows = greedy(opened.model, prompt, 12)
        opened.model.settle()
        assert found == text
        assert mx.array_equal(found_rows, rows)
    opened.store.check_integrity()


def test_a_layer_with_all_experts_asks_for_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_model(folder, 16, ON_DEVICE)
    for layer in opened.store.layers:
        opened.store.acquire(layer, range(16))
    asked: list[int] = []
    begin = ExpertStore.begin

    def noted(store: ExpertStore, layer: int, experts: Sequence[int]) -> Fetch:
        asked.append(layer)
        return begin(store, layer, experts)

    monkeypatch.setattr(ExpertStore, "begin", noted)
    hits = opened.store.statistics().hits
    greedy(opened.model, tokens(WIDER, 3), 5)
    assert not asked
    k = WIDER["num_experts_per_tok"]
    assert opened.store.statistics().hits - hits == (3 + 4) * k * len(opened.store.layers)
    opened.model.settle()
    opened.store.resize(opened.store.layers[0], 15)
    greedy(opened.model, tokens(WIDER, 3), 5)
    assert set(asked) == {opened.store.layers[0]}


@pytest.mark.parametrize("num_tokens", [1, 3, 8])
@pytest.mark.parametrize("slots", few([None, 5, 16], [5]))
def test_what_is_compiled_gives_the_same_bits(num_tokens: int, slots: int | None, folder: Path) -> None:
    prompt, compiled = tokens(WIDER, num_tokens), replace(ON_DEVICE, compiles=True, launches_early=True)
    text, rows = greedy(open_model(folder, slots).model, prompt, 12)
    found, found_rows = greedy(open_model(folder, slots, compiled).model, prompt, 12)
    assert found == text
    assert mx.array_equal(found_rows, rows)


@pytest.mark.parametrize("num_tokens", [33, 40, 60])
@pytest.mark.parametrize("slots", few([None, 5, 11], [5]))
def test_small_experts_are_gathered_in_prompts_too(num_tokens: int, slots: int | None, folder: Path) -> None:
    ids, small = tokens(WIDER, num_tokens), replace(CPU, max_gathered_bytes=2**30)
    expected = logits(open_model(folder, None, small).model, ids)
    opened = open_model(folder, slots, small)
    assert np.array_equal(logits(opened.model, ids), expected)
    assert np.abs(expected - logits(open_model(folder, None).model, ids)).max() < 1e-4
    opened.store.check_integrity()
    assert opened.store.statistics().sweep_reads == 0

"""Streamed experts compute what resident experts compute, bit for bit, whatever the budget."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.arithmetic import CPU, Arithmetic, Quantization
from models.attention.attention import Span
from models.experts.experts import Experts
from models.loading.building import bank_quantizations
from streaming.eviction.policy import LeastNearlyChosen
from streaming.overflow import Turn
from streaming.store import ExpertStore
from tests.checkpoints import Opened, greedy, open_model, save_packed
from tests.grids import few
from tests.models.make_golden import SEED
from tests.tiny_glm import WIDER, make_weights, tokens
from tests.tiny_model import logits

SLOTS = [4, 5, 11, 16]  # the smallest that a token needs, two in the middle, everything
# The packed form for any number of rows, as on a GPU.
PACKED_ONLY = Arithmetic("packed", mx.float32, max_packed_rows=None, min_pairs=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def packing(path: str) -> Quantization:
        return Quantization(64 if "switch_mlp" in path or "shared" in path else 32, 3)

    narrow = (".embed_q", ".unembed_out", "indexer", "q_b_proj", "o_proj")
    return save_packed(
        tmp_path_factory.mktemp("packed"),
        WIDER,
        make_weights(WIDER, SEED),
        lambda path: None if any(part in path for part in narrow) else packing(path),
    )


@pytest.fixture(scope="module")
def resident(folder: Path) -> Opened:
    return open_model(folder)


@pytest.fixture
def streamed(folder: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    opened = open_model(folder, slots=request.param)
    yield opened
    opened.store.check_integrity()
    opened.store.close()


@pytest.mark.parametrize("streamed", SLOTS, indirect=True)
@pytest.mark.slow
def test_logits_of_a_prompt_in_chunks_of_any_size_are_the_same_bits(
    streamed: Opened, resident: Opened
) -> None:
    ids = tokens(WIDER, 36)
    for chunk in (1, 3, 7, 8, 9, 36):  # to 8 rows each pair by itself, from 9 on each expert with its rows
        assert np.array_equal(logits(streamed.model, ids, chunk), logits(resident.model, ids, chunk)), chunk


@pytest.mark.parametrize("streamed", SLOTS, indirect=True)
def test_greedy_decoding_gives_the_same_bits(streamed: Opened, resident: Opened) -> None:
    prompt = tokens(WIDER, 12)
    text, rows = greedy(streamed.model, prompt, 25)
    expected_text, expected_rows = greedy(resident.model, prompt, 25)
    assert text == expected_text
    assert mx.array_equal(rows, expected_rows)


@pytest.mark.parametrize("streamed", [4], indirect=True)
def test_the_bytes_read_are_those_of_the_experts_missed(streamed: Opened) -> None:
    greedy(streamed.model, tokens(WIDER, 12), 25)
    counts = streamed.store.statistics()
    assert counts.misses > 0
    assert counts.hits > 0
    assert counts.sweep_reads > 0
    assert counts.evictions > 0
    index = streamed.checkpoint.experts
    expert_bytes = index.expert_bytes(index.layers[0])
    num_read = counts.misses + counts.ahead_arrived + counts.sweep_reads
    assert counts.payload_bytes == num_read * expert_bytes


@pytest.mark.parametrize("looks_ahead", [False, True])
@pytest.mark.parametrize("slots", few([5, 9], [5]))
def test_looking_ahead_changes_no_bit(folder: Path, resident: Opened, slots: int, looks_ahead: bool) -> None:
    opened = open_model(folder, slots, looks_ahead=looks_ahead)
    prompt = tokens(WIDER, 12)
    text, rows = greedy(opened.model, prompt, 40)
    expected_text, expected_rows = greedy(resident.model, prompt, 40)
    assert text == expected_text
    assert mx.array_equal(rows, expected_rows)
    counts = opened.store.statistics()
    assert (counts.ahead_started > 0) == (looks_ahead and slots > WIDER["num_experts_per_tok"] + 1)
    opened.store.check_integrity()
    opened.store.close()


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_a_sparse_layer_synchronises_once_for_each_token(
    folder: Path, looks_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(folder, 9, replace(CPU, pauses_steps=False), looks_ahead=looks_ahead)
    greedy(opened.model, tokens(WIDER, 12), 1)
    cache, evals, reads = opened.model.make_cache(), mx.eval, []
    mx.eval(opened.model(mx.array([3]), [Span(cache, 0, 1)]))

    def counted(*arrays: mx.array) -> None:
        reads.append(len(arrays))
        evals(*arrays)

    monkeypatch.setattr(mx, "eval", counted)
    hidden = opened.model(mx.array([4]), [Span(cache, 0, 1)])
    # And once before the first of them, which no other sparse layer can guess.
    assert len(reads) == len(opened.checkpoint.args.moe_layers) + looks_ahead
    monkeypatch.undo()
    mx.eval(hidden)
    opened.store.close()


def test_the_guess_is_the_next_routers_own_ranking_of_this_layers_state(resident: Opened) -> None:
    """Where a layer adds nothing to the residual, the guess must be what the next layer then asks for."""
    layer = resident.model.model.layers[6]
    h = mx.array(np.random.default_rng(3).standard_normal((2, 128)).astype(np.float32))
    assert resident.model.model.layers[5]._guess_next is not None
    ranked = np.array(resident.model.model.layers[5]._guess_next(h))
    ids, _, _ = layer.mlp.gate(layer.post_attention_layernorm(h))
    assert np.array_equal(np.sort(ranked, axis=-1), np.array(ids))


def test_the_first_sparse_layer_is_guessed_by_the_dense_one_before_it(folder: Path) -> None:
    opened, guessed = open_model(folder, 9), []
    expect = opened.store.expect

    def noted(layer: int, ranks: Sequence[Sequence[int]], distance: int = 1) -> None:
        guessed.append(layer)
        expect(layer, ranks, distance)

    opened.store.expect = noted  # type: ignore[method-assign]
    greedy(opened.model, tokens(WIDER, 12), 2)
    layers = list(opened.checkpoint.args.moe_layers)
    assert guessed == layers, "each once, for the one token that was decoded"
    opened.store.close()


def test_what_is_guessed_is_read_also_where_more_is_wanted_than_there_are_slots(tmp_path: Path) -> None:
    config = WIDER | {"n_routed_experts": 48}
    folder = save_packed(tmp_path, config, make_weights(config, SEED), lambda path: None)
    opened, resident, ids, in_turns = open_model(folder, 8), open_model(folder), tokens(config, 60), []
    take_turns = opened.store.take_turns

    def note_turns(layer: int, experts: Sequence[int]) -> Iterator[Turn]:
        in_turns.append(layer)
        return take_turns(layer, experts)

    opened.store.take_turns = note_turns  # type: ignore[method-assign]
    assert np.array_equal(logits(opened.model, ids, 4), logits(resident.model, ids, 4))
    num_layers = 60 // 4 * len(opened.checkpoint.args.moe_layers)
    assert len(in_turns) > num_layers / 2, "the test means nothing where all fit"
    assert opened.store.statistics().ahead_started > 0.8 * num_layers, "8 slots have room for one guess"
    opened.store.check_integrity()
    opened.store.close()
    resident.store.close()


def test_the_test_notices_a_slot_that_is_overwritten_too_early(
    folder: Path, resident: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plant the fault: ask for the next turn before the products with the last one are evaluated."""
    right = ExpertStore.take_turns
    monkeypatch.setattr(ExpertStore, "take_turns", lambda *given: iter(list(right(*given))))
    opened = open_model(folder, slots=5)  # fewer than 7 rows want
    ids = tokens(WIDER, 60)
    assert not np.array_equal(logits(opened.model, ids, 7), logits(resident.model, ids, 7))
    opened.store.close()


def layer_of(opened: Opened, store: ExpertStore, arithmetic: Arithmetic) -> Experts:
    layer = 5
    return Experts(layer, store, bank_quantizations(store.bank(layer), opened.checkpoint.args), arithmetic)


@pytest.mark.parametrize("arithmetic", [CPU, PACKED_ONLY], ids=lambda a: a.name)
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 15), min_size=4, max_size=4), min_size=1, max_size=14),
    st.sampled_from(SLOTS),
    st.integers(0, 2**32 - 1),
)
def test_any_routing_gives_the_same_bits(
    resident: Opened, arithmetic: Arithmetic, routing: Sequence[set[int]], slots: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = mx.array(rng.standard_normal((len(routing), 128)).astype(np.float32))
    ids = mx.array([sorted(row) for row in routing], dtype=mx.int32)
    weights = mx.array(rng.random((len(routing), 4)).astype(np.float32))
    scores = mx.array(rng.standard_normal((len(routing), 16)).astype(np.float32))
    store = ExpertStore(
        resident.checkpoint.experts,
        slots,
        float_dtype=mx.float32,
        make_policy=lambda: LeastNearlyChosen(16, 4),
    )
    try:
        streamed = layer_of(resident, store, arithmetic)
        expected = layer_of(resident, resident.store, arithmetic)(x, ids, weights)
        for _ in range(2):
            assert mx.array_equal(streamed(x, ids, weights, scores), expected)
            store.check_integrity()
    finally:
        store.close()


def test_few_rows_together_equal_each_row_alone(resident: Opened) -> None:
    """Up to eight sequences in one flat batch: every row computes what it computes by itself."""
    model, prompts = resident.model, [tokens(WIDER, n, seed=n) for n in (5, 9, 14, 30, 8, 7, 21, 3)]
    caches = [model.make_cache() for _ in prompts]
    alone = [model.make_cache() for _ in prompts]
    for prompt, together, single in zip(prompts, caches, alone, strict=True):
        model(mx.array(prompt), [Span(together, 0, len(prompt))])
        model(mx.array(prompt), [Span(single, 0, len(prompt))])
    spans = [Span(cache, i, i + 1) for i, cache in enumerate(caches)]
    batch = model.logits(model(mx.arange(8), spans))
    for i, cache in enumerate(alone):
        row = model.logits(model(mx.array([i]), [Span(cache, 0, 1)]))
        assert mx.array_equal(batch[i], row[0]), f"sequence {i} of the batch"


def test_spans_of_several_sequences_share_one_forward(resident: Opened) -> None:
    """Ragged prompts, some beyond index_topk, as one flat batch; equal to each alone within rounding."""
    model, prompts = resident.model, [tokens(WIDER, n, seed=n) for n in (3, 25, 11)]
    spans, start = [], 0
    for prompt in prompts:
        spans.append(Span(model.make_cache(), start, start + len(prompt)))
        start += len(prompt)
    together = np.array(model.logits(model(mx.array([t for p in prompts for t in p]), spans)))
    for span, prompt in zip(spans, prompts, strict=True):
        assert np.abs(together[span.start : span.stop] - logits(model, prompt)).max() < 1e-5

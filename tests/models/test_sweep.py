"""A prompt reads each expert once, whatever is resident, and computes what it computes in any other form."""

import errno
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from config.errors import DiskError
from models.arithmetic import CPU, Quantization
from models.attention.attention import Span, make_parts
from models.loading.loading import make_geometry
from streaming.eviction.policy import OBSERVED_ROWS, LeastNearlyChosen
from streaming.files.floats import Bytes
from streaming.store import ExpertStore
from streaming.sweep import ADMITTED_SHARE
from tests.checkpoints import Opened, greedy, open_model, save_packed
from tests.grids import few
from tests.memory import start_measuring
from tests.models.make_golden import SEED
from tests.streaming.faulty_disk import FaultyDisk
from tests.tiny_glm import WIDER, make_weights, tokens
from tests.tiny_model import logits

EXPERTS = WIDER["n_routed_experts"]


# Nothing is chosen, so no rounding can choose otherwise.
CHOOSES_ALL = WIDER | {"num_experts_per_tok": EXPERTS, "index_topk": 256}


def save(directory: Path, config: dict[str, Any]) -> Path:
    narrow = (".embed_q", ".unembed_out", "indexer", "q_b_proj", "o_proj")
    return save_packed(
        directory,
        config,
        make_weights(config, SEED),
        lambda path: None if any(part in path for part in narrow) else Quantization(32, 4),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("packed"), WIDER)


@pytest.fixture(scope="module")
def resident(folder: Path) -> Opened:
    return open_model(folder)


@pytest.fixture
def streamed(folder: Path) -> Iterator[Opened]:
    opened = open_model(folder, slots=6, looks_ahead=False)
    yield opened
    opened.store.check_integrity()
    opened.store.close()


def sweep(opened: Opened, ids: list[int]) -> mx.array:
    hidden = opened.model(mx.array(ids), [Span(opened.model.make_cache(), 0, len(ids))])
    mx.eval(hidden)
    return hidden


@pytest.mark.parametrize("length", few([500, 1500], [500]))
def test_each_expert_that_is_not_resident_is_read_once(streamed: Opened, length: int) -> None:
    index, num_layers = streamed.checkpoint.experts, len(streamed.checkpoint.experts.layers)
    expert_bytes = index.expert_bytes(index.layers[0])
    for _ in range(3):
        resident, before = streamed.store.num_resident, streamed.store.statistics()
        sweep(streamed, tokens(WIDER, length))
        after = streamed.store.statistics()
        missing = num_layers * EXPERTS - resident
        assert after.sweep_reads - before.sweep_reads == missing
        assert after.payload_bytes - before.payload_bytes == missing * expert_bytes
        assert after.sweep_hits - before.sweep_hits == resident
    assert resident == num_layers * 6, "the first sweep fills what is free"


def test_few_rows_read_only_what_they_want(streamed: Opened) -> None:
    sweep(streamed, tokens(WIDER, 9))
    counts = streamed.store.statistics()
    assert 0 < counts.sweep_reads < 0.9 * len(streamed.checkpoint.experts.layers) * EXPERTS
    assert counts.payload_bytes == counts.sweep_reads * streamed.checkpoint.experts.expert_bytes(3)


def test_a_sweep_admits_the_hottest_and_leaves_decode_the_rest(streamed: Opened) -> None:
    greedy(streamed.model, tokens(WIDER, 6), 30)  # few rows: fills the banks by use
    layer = streamed.checkpoint.experts.layers[2]
    books = streamed.store._layers[layer].books
    before = set(books._slot_of)
    sweep(streamed, tokens(WIDER, 300))
    assert 0 < len(set(books._slot_of) - before) <= int(ADMITTED_SHARE * 6)


def test_rows_in_parts_give_the_same_within_rounding(
    resident: Opened, streamed: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, model = tokens(WIDER, 230), open_model(save(tmp_path, CHOOSES_ALL)).model
    whole = logits(model, ids)
    monkeypatch.setattr("models.glm_moe_dsa.make_parts", partial(make_parts, num_rows=50))
    assert np.abs(logits(model, ids) - whole).max() < 1e-5
    expected = logits(resident.model, ids)
    assert np.array_equal(logits(streamed.model, ids), expected), "streamed is not resident"


@pytest.mark.parametrize("gather_from", [1, 1000])
def test_gathered_and_masked_attention_agree(folder: Path, resident: Opened, gather_from: int) -> None:
    opened = open_model(folder, arithmetic=replace(CPU, gather_from=gather_from))
    # Few rows and many round differently, and seed 7 (of 1 to 10 the only one) has keys that tie within that.
    ids = tokens(WIDER, 300, seed=1)
    assert np.abs(logits(opened.model, ids) - logits(resident.model, ids, 8)).max() < 1e-5
    opened.store.close()


@pytest.mark.slow
def test_a_sweep_can_pause_for_decode_steps_of_others(resident: Opened, streamed: Opened) -> None:
    """In each pause, amid layers too, another sequence decodes; neither changes a bit of the other."""
    ids, other = tokens(WIDER, 60), tokens(WIDER, 20, seed=5)

    def together(opened: Opened, pauses: bool) -> tuple[np.ndarray, list[np.ndarray]]:
        model, cache = opened.model, opened.model.make_cache()
        mx.eval(model(mx.array(other), [Span(cache, 0, len(other))]))
        steps: list[np.ndarray] = []
        layers = model.forward(mx.array(ids), [Span(model.make_cache(), 0, len(ids))])
        try:
            while True:
                next(layers)
                if pauses:
                    step = model(mx.array([len(steps) % 64]), [Span(cache, 0, 1)])
                    steps.append(np.array(model.logits(step)))
        except StopIteration as end:
            hidden: mx.array = end.value
        return np.array(model.logits(hidden)), steps

    alone, _ = together(resident, pauses=False)
    _, expected = together(resident, pauses=True)
    swept, steps = together(streamed, pauses=True)
    assert len(steps) > 50, "amid layers too"
    assert streamed.store.statistics().evictions > 100, "steps change what the sweep finds"
    streamed.store.check_integrity()
    assert np.array_equal(swept, alone)
    assert all(np.array_equal(a, b) for a, b in zip(steps, expected, strict=True))


def test_an_abandoned_sweep_leaves_nothing_behind(streamed: Opened, resident: Opened) -> None:
    ids = tokens(WIDER, 150)
    layers = streamed.model.forward(mx.array(ids), [Span(streamed.model.make_cache(), 0, len(ids))])
    for _ in range(6):
        next(layers)
    layers.close()
    other = tokens(WIDER, 40, seed=3)
    assert np.array_equal(logits(streamed.model, other), logits(resident.model, other))


def test_a_read_that_fails_ends_the_sweep_and_not_the_store(folder: Path, resident: Opened) -> None:
    def broken(number: int, buffer: Bytes, offset: int) -> int | None:
        if number > 40:
            raise OSError(errno.EIO, "Input/output error")
        return None

    disk = FaultyDisk(broken)
    opened = open_model(folder, slots=6, disk=disk)
    ids = tokens(WIDER, 150)
    with pytest.raises(DiskError, match=r"layer \d+, expert \d+: .*Input/output error"):
        logits(opened.model, ids)
    opened.store.check_integrity()
    disk.fault = None
    assert np.array_equal(logits(opened.model, ids), logits(resident.model, ids))
    opened.store.close()


def test_the_tests_notice_a_ring_slot_that_is_overwritten_too_early(
    streamed: Opened, resident: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plant the fault: ask for all groups before the products with the first are evaluated."""
    right = ExpertStore.sweep
    monkeypatch.setattr(ExpertStore, "sweep", lambda *given: iter(list(right(*given))))
    ids = tokens(WIDER, 60)
    assert not np.array_equal(logits(streamed.model, ids), logits(resident.model, ids))


@pytest.mark.slow
def test_what_grows_with_a_prompt_is_in_the_plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.glm_moe_dsa.make_parts", partial(make_parts, num_rows=250))
    tiled = open_model(folder, arithmetic=replace(CPU, tile_elements=2**17))  # full for both lengths
    monkeypatch.setattr("models.experts.experts.EXPERT_ROWS", 64)
    peaks = {}
    for length in (1000, 2000):
        ids, cache = mx.array(tokens(WIDER, length)), tiled.model.make_cache()
        before = start_measuring()
        hidden = tiled.model(ids, [Span(cache, 0, length)])
        mx.eval(hidden)
        peaks[length] = mx.get_peak_memory() - before - cache.nbytes
        del hidden
    planned = make_geometry(tiled.checkpoint, CPU).sweep_row_bytes
    assert (peaks[2000] - peaks[1000]) / 1000 < planned
    queries = 4 * WIDER["num_attention_heads"] * tiled.checkpoint.args.latent_dim
    assert planned < 3 * queries, "the test could not tell if all queries lay in memory"


@pytest.mark.parametrize("num_rows", [32, 500])
def test_the_disk_works_while_a_prompt_goes_through_the_dense_layers(streamed: Opened, num_rows: int) -> None:
    """Where so many rows are sure to want all experts; what was read then is not read again."""
    model, store = streamed.model, streamed.store
    steps = model.forward(mx.array(tokens(WIDER, num_rows)), [Span(model.make_cache(), 0, num_rows)])
    next(steps)
    assert store._ring.is_idle == (num_rows == 32)
    for _ in steps:
        pass
    counts = store.statistics()
    assert counts.payload_bytes == counts.sweep_reads * streamed.checkpoint.experts.expert_bytes(3)


@pytest.mark.parametrize("length", [513, 600, 1100])
def test_of_a_prompts_scores_the_policy_sees_the_last(
    folder: Path, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of rows a layer would hold up the engine's thread, with nothing queued on the GPU."""
    opened, seen = open_model(folder, slots=6, looks_ahead=False), list[int]()
    opened.store.follow(partial(LeastNearlyChosen, EXPERTS, WIDER["num_experts_per_tok"]))
    monkeypatch.setattr(opened.store, "observe", lambda layer, scores: seen.append(len(scores)))
    sweep(opened, tokens(WIDER, length))
    opened.store.close()
    assert set(seen) == {OBSERVED_ROWS}

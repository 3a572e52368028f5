"""What holds for every architecture: parity, planted faults, streamed == resident, batch == alone, saved ==
computed. Parametrised over the registry: a family without a case fails."""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from models.arithmetic import CPU, Quantization
from models.attention.attention import Span
from models.attention.cache import SequenceCache
from models.attention.cache_blocks import fill_blocks, read_blocks
from models.convert.align import align
from models.families import FAMILIES
from models.glm_moe_dsa import Model
from tests.checkpoints import greedy, open_model, save_packed
from tests.models.families.family_cases import CASES, Case
from tests.models.mutants import Plant
from tests.tiny_glm import Array, tokens
from tests.tiny_model import logits, make_model, run

TOLERANCE = 1e-4  # in log-probabilities
NOTICED = 30 * TOLERANCE
SEED = 3
# Around a pool's end, around where selection begins, across chunks of linear layers and their slices.
# The longest prompt has a prefix of every length: each row is a prediction behind one.
LENGTHS = (11, 70)
CHUNKS = (None, 5, 32)
needs_reference = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch not installed")
every_family = pytest.mark.parametrize("family", CASES)


def log_probabilities(values: Array) -> Any:
    exact = values.astype(np.float64)
    exact = exact - exact.max(axis=-1, keepdims=True)
    return exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))


def distance(ours: Array, theirs: Array) -> float:
    return float(np.abs(log_probabilities(ours) - log_probabilities(theirs)).max())


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest) -> Model:
    case = CASES[request.param]
    config = case.schedules[case.planted_in]
    return make_model(config, case.make_weights(config, SEED))


def prompt_of(model: Model, length: int, seed: int = 7) -> list[int]:
    return tokens({"vocab_size": model.args.vocab_size}, length, seed)


def test_every_family_has_a_case() -> None:
    assert [family.model_type for family in FAMILIES] == list(CASES)


SCHEDULE_NAMES = [(family, name) for family, case in CASES.items() for name in case.schedules]


@pytest.mark.reference
@pytest.mark.slow
@needs_reference
@pytest.mark.parametrize(("family", "schedule"), SCHEDULE_NAMES)
def test_logits_equal_the_reference_however_the_prompt_is_cut(family: str, schedule: str) -> None:
    case = CASES[family]
    config = case.schedules[schedule]
    weights = case.make_weights(config, SEED)
    reference, ours = case.make_reference(config, weights), make_model(config, weights)
    for length in LENGTHS:
        ids = tokens(config, length)
        expected = case.reference_logits(reference, ids)
        for chunk in CHUNKS:
            assert distance(logits(ours, ids, chunk), expected) <= TOLERANCE, (length, chunk)


PLANTS = [(family, plant) for family, case in CASES.items() for plant in case.mutants]


@pytest.fixture(scope="module")
def expected() -> dict[str, Array]:
    return {}


@pytest.mark.reference
@pytest.mark.slow
@needs_reference
@pytest.mark.parametrize(("family", "plant"), PLANTS, ids=lambda value: getattr(value, "__name__", value))
def test_parity_notices_the_mutant(
    family: str, plant: Plant, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Array]
) -> None:
    case = CASES[family]
    config = case.schedules[case.planted_in]
    weights, ids = case.make_weights(config, SEED), tokens(config, 70)
    if family not in expected:
        expected[family] = case.reference_logits(case.make_reference(config, weights), ids)
    plant(monkeypatch)
    error = distance(logits(make_model(config, weights), ids), expected[family])
    assert error > NOTICED, f"{plant.__name__} changes the log-probabilities by {error:.1e} only"


def pack(case: Case, folder: Path) -> Path:
    weights = case.make_weights(case.wide, SEED)

    def packing(path: str) -> Quantization | None:
        width = weights.get(f"{path}.weight", np.zeros((1, 1))).shape[-1]
        if "switch_mlp" in path:
            return Quantization(64, 3)
        return Quantization(32, 4) if width % 32 == 0 and "indexer" not in path else None

    return save_packed(folder, case.wide, weights, packing)


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("slots", [4, 5, 11])
def test_streamed_experts_give_the_bits_of_resident_ones(family: str, slots: int, tmp_path: Path) -> None:
    folder = pack(CASES[family], tmp_path)
    resident, streamed = open_model(folder), open_model(folder, slots)
    ids = tokens(CASES[family].wide, 70)
    for chunk in (1, 7, 9, 70):
        assert np.array_equal(logits(streamed.model, ids, chunk), logits(resident.model, ids, chunk)), chunk
    text, rows = greedy(streamed.model, ids[:12], 12)
    expected_text, expected_rows = greedy(resident.model, ids[:12], 12)
    assert text == expected_text
    assert mx.array_equal(rows, expected_rows)
    streamed.store.check_integrity()
    streamed.store.close()


def forward(model: Model, spans: Sequence[tuple[SequenceCache, Sequence[int]]]) -> list[Array]:
    """One forward over the next tokens of several sequences: logits of each."""
    flat: list[int] = []
    cut: list[Span] = []
    out: list[Array] = []
    for cache, ids in spans:
        cut.append(Span(cache, len(flat), len(flat) + len(ids)))
        flat += list(ids)
    rows = np.array(model.logits(model(mx.array(flat, dtype=mx.int32), cut)))
    for span in cut:
        out.append(rows[span.start : span.stop])
    return out


@pytest.mark.parametrize("lengths", [(40, 41, 70), (33, 129, 34), (3, 2, 3)])
def test_a_batch_gives_each_member_its_bits_alone(model: Model, lengths: tuple[int, ...]) -> None:
    prompts = [prompt_of(model, length, seed) for seed, length in enumerate(lengths)]
    together, alone, mixed = [[model.make_cache() for _ in prompts] for _ in range(3)]
    read = forward(model, list(zip(mixed, prompts, strict=True)))
    for ids, rows, *caches in zip(prompts, read, together, alone, strict=True):
        for cache in caches:
            assert distance(run(model, ids, cache), rows) <= 1e-5
    for step in range(6):
        batch = [(cache, [step + i]) for i, cache in enumerate(together)]
        for i, rows in enumerate(forward(model, batch)):
            assert np.array_equal(rows, run(model, [step + i], alone[i])), step


@pytest.mark.parametrize(("length", "more"), [(64, 30), (128, 1), (70, 33), (71, 1), (130, 5)])
def test_saved_rows_and_states_go_on_with_the_same_bits(model: Model, length: int, more: int) -> None:
    ids = prompt_of(model, length + more)
    cache, restored = model.make_cache(), model.make_cache()
    run(model, ids[:length], cache)
    sizes = [64] * (length // 64) + ([length % 64] if length % 64 else [])
    fill_blocks(restored, read_blocks(cache, 0, sizes), sizes)
    state = cache.read_state(length)
    if state is not None:
        restored.fill_state(state, length)
    assert restored.length == length
    restored.check_integrity()
    assert np.array_equal(run(model, ids[length:], restored), run(model, ids[length:], cache))


@pytest.mark.parametrize("length", [33, 64, 100, 129])
def test_what_was_decoded_goes_on_like_a_prompt_within_the_tolerance(model: Model, length: int) -> None:
    ids = prompt_of(model, length + 40)
    cache = model.make_cache()
    run(model, ids[: length - 20], cache)
    for token in ids[length - 20 : length]:
        run(model, [token], cache)
    assert distance(run(model, ids[length:], cache), logits(model, ids)[length:]) <= 1e-5


@pytest.mark.parametrize("begun", [0, 64, 128])
def test_a_follower_goes_on_behind_its_leader_in_one_forward(model: Model, begun: int) -> None:
    leader_ids = prompt_of(model, 200)
    follower_ids = leader_ids[:128] + prompt_of(model, 50, seed=5)
    leader, follower = model.make_cache(), model.make_cache()
    if begun:
        run(model, leader_ids[:begun], leader)
    if begun == 128:
        assert leader.can_lend(128)
    flat = leader_ids[begun:] + follower_ids[128:]
    num_leading = 200 - begun
    spans = [Span(leader, 0, num_leading), Span(follower, num_leading, len(flat), leader, 128)]
    rows = np.array(model.logits(model(mx.array(flat, dtype=mx.int32), spans)))[num_leading:]
    assert distance(rows, logits(model, follower_ids)[128:]) <= 1e-5
    follower.check_integrity()


@pytest.mark.parametrize("length", [1, 30, 64, 90])
def test_a_forward_that_is_given_up_leaves_the_cache_as_it_was(model: Model, length: int) -> None:
    ids = prompt_of(model, length + 50)
    cache, other = model.make_cache(), model.make_cache()
    run(model, ids[:length], cache)
    run(model, ids[:length], other)
    steps = model.forward(mx.array(ids[length:]), [Span(cache, 0, 50)])
    for _ in range(3):
        next(steps)
    steps.close()
    cache.trim(length)
    cache.check_integrity()
    assert np.array_equal(run(model, ids[length:], cache), run(model, ids[length:], other))


def test_a_prompt_cut_at_multiples_of_the_grain_keeps_its_bits(model: Model) -> None:
    ids, cache = prompt_of(model, 256), model.make_cache()
    parts = [run(model, ids[start:stop], cache) for start, stop in ((0, 64), (64, 192), (192, 256))]
    assert distance(np.concatenate(parts), logits(model, ids)) <= 1e-5


def test_compiled_steps_give_the_bits_of_described_ones(family_weights: tuple[Any, dict[str, Array]]) -> None:
    config, weights = family_weights
    plain, compiled = make_model(config, weights), make_model(config, weights, replace(CPU, compiles=True))
    ids = tokens(config, 40)
    assert np.array_equal(logits(compiled, ids, 1), logits(plain, ids, 1))
    assert distance(logits(compiled, ids, 7), logits(plain, ids, 7)) <= 1e-5


@pytest.fixture(params=CASES)
def family_weights(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Array]]:
    case = CASES[request.param]
    config = case.schedules[case.planted_in]
    return config, case.make_weights(config, SEED)


@pytest.mark.slow
@every_family
def test_an_aligned_checkpoint_computes_the_same_bits(family: str, tmp_path: Path) -> None:
    folder, ids = pack(CASES[family], tmp_path), tokens(CASES[family].wide, 30)
    before = logits(open_model(folder).model, ids)
    assert align(folder) > 0
    streamed = open_model(folder, 5)
    assert np.array_equal(logits(streamed.model, ids), before)
    streamed.store.close()

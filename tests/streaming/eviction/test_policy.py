from pathlib import Path

import numpy as np
import pytest

import benchmarks
from benchmarks.policies import UnjudgedNearness, belady_hits, count_hits
from benchmarks.rig.routing import Routing, load_routing, make_routing
from streaming.eviction.policy import OBSERVED_ROWS, LeastNearlyChosen, LeastRecentlyUsed
from tests.grids import few


def test_the_expert_that_came_least_near_goes_though_it_was_used_last() -> None:
    policy = LeastNearlyChosen(num_experts=5, k=2)
    for _ in range(30):
        policy.observe(np.array([[0.9, 0.8, 0.1, 0.75, 0.0]], np.float32))
    policy.use([2])
    assert sorted(range(5), key=policy.worth) == [4, 2, 3, 1, 0]


def test_many_rows_count_as_so_many_tokens_and_ruled_out_experts_as_far_off() -> None:
    together, single = LeastNearlyChosen(4, 1), LeastNearlyChosen(4, 1)
    row = np.array([0.9, 0.1, 0.5, 0.0], np.float32)
    together.observe(np.stack([row] * 10))
    for _ in range(10):
        single.observe(row[None])
    np.testing.assert_allclose(together._worth, single._worth)
    together.observe(np.array([[0.9, -np.inf, 0.5, -np.inf]], np.float32))
    assert np.isfinite(together._worth).all()


def test_an_expert_that_is_always_near_and_never_chosen_goes_before_one_that_is_chosen_at_times() -> None:
    policy = LeastNearlyChosen(num_experts=4, k=1)
    for token in range(100):
        policy.observe(np.array([[0.9, 0.85, 0.95 if token % 3 == 0 else 0.1, 0.0]], np.float32))
    assert policy.worth(1) < policy.worth(2)


def test_scores_that_are_no_numbers_say_nothing() -> None:
    policy, row = LeastNearlyChosen(4, 1), np.array([[0.9, 0.1, 0.5, 0.0]], np.float32)
    policy.observe(np.concatenate([row, np.full((1, 4), np.nan, np.float32)]))
    policy.observe(row)
    assert np.isfinite(policy._worth).all()
    assert policy.worth(1) < policy.worth(2) < policy.worth(0)


def test_nearness_beats_least_recently_used_and_nobody_beats_belady() -> None:
    routing = make_routing(300, 2, 256, 8)
    lru = count_hits(routing, 64, LeastRecentlyUsed, 75)
    near = count_hits(routing, 64, lambda: LeastNearlyChosen(256, 8), 75)
    assert lru + 0.01 < near < belady_hits(routing, 64, 75)


@pytest.mark.parametrize("name", ["many-chat", "many-sources"])
def test_nearness_is_judged_where_a_trained_router_leaves_experts_near_for_nothing(name: str) -> None:
    whole = load_routing(Path(benchmarks.__file__).parent / "traces" / f"{name}.npz", 8)
    routing = Routing(whole.experts[:400], whole.scores[:400])
    lru = count_hits(routing, 64, LeastRecentlyUsed, 100)
    unjudged = count_hits(routing, 64, lambda: UnjudgedNearness(256, 8), 100)
    near = count_hits(routing, 64, lambda: LeastNearlyChosen(256, 8), 100)
    assert max(lru + 0.01, unjudged + 0.04) < near


@pytest.mark.parametrize(
    ("rows", "num_experts", "k"), [(513, 16, 4), (2000, 64, 8), (32_768, 32, 2), (600, 256, 8)]
)
def test_of_a_prompts_rows_the_last_count(rows: int, num_experts: int, k: int) -> None:
    rng = np.random.default_rng(rows)
    scores = rng.standard_normal((rows, num_experts)).astype(np.float32)
    whole, last = LeastNearlyChosen(num_experts, k), LeastNearlyChosen(num_experts, k)
    whole.observe(scores)
    last.observe(scores[-OBSERVED_ROWS:])
    assert [whole.worth(e) for e in range(num_experts)] == [last.worth(e) for e in range(num_experts)]


@pytest.mark.parametrize(
    "name", few(["many-sources", "many-chat", "pocket-router", "pocket-live", "pocket-shared"], ["many-chat"])
)
def test_the_last_rows_of_a_prompt_say_as_much_as_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three quarters of each recorded routing as one prompt, the rest decoded after it."""
    whole = load_routing(Path(benchmarks.__file__).parent / "traces" / f"{name}.npz", 8)
    start = len(whole.experts) * 3 // 4
    num_experts = whole.scores.shape[-1]
    rates = []
    for most in (OBSERVED_ROWS, len(whole.experts)):
        monkeypatch.setattr("streaming.eviction.policy.OBSERVED_ROWS", most)
        hits = 0.0
        for share in (0.15, 0.25, 0.5):
            made: list[LeastNearlyChosen] = []

            def make(made: list[LeastNearlyChosen] = made) -> LeastNearlyChosen:
                made.append(LeastNearlyChosen(num_experts, 8))
                made[-1].observe(whole.scores[:start, len(made) - 1])
                return made[-1]

            decoded = Routing(whole.experts[start:], whole.scores[start:])
            hits += count_hits(decoded, max(8, round(share * num_experts)), make) / 3
        rates.append(hits)
    assert rates[0] > rates[1] - 0.001

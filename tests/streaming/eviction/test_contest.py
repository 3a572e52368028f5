"""LRU or nearness: whichever hits more decides, by books that know ids only."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import benchmarks
from benchmarks.policies import TUNED_SHARES, _step, count_hits
from benchmarks.rig.routing import Routing, load_routing, make_routing
from config.settings import Settings
from server.link.messages import EngineConfig
from streaming.eviction.contest import COUNTED_STEPS, MARGIN, WARM_STEPS, Contest, make_rule
from streaming.eviction.policy import LeastNearlyChosen, LeastRecentlyUsed
from tests.grids import few

TRACES = Path(benchmarks.__file__).parent / "traces"
TRIAL = WARM_STEPS + COUNTED_STEPS


def recorded(name: str) -> Routing:
    """Every second layer of at most 800 tokens."""
    whole = load_routing(TRACES / f"{name}.npz", 8)
    return Routing(whole.experts[:800, ::2], whole.scores[:800, ::2])


def rates(routing: Routing, share: float, warm: int) -> tuple[float, float, float]:
    """Hit rates of LRU, of nearness and of whichever decides, after so many tokens."""
    num_experts, k = routing.scores.shape[-1], routing.experts.shape[-1]
    slots = max(k, round(share * num_experts))
    lru = count_hits(routing, slots, LeastRecentlyUsed, warm)
    near = count_hits(routing, slots, partial(LeastNearlyChosen, num_experts, k), warm)
    return lru, near, count_hits(routing, slots, partial(Contest, num_experts, k), warm)


@pytest.mark.parametrize(
    "name",
    few(
        ["many-sources", "many-chat", "pocket-router", "pocket-live", "pocket-shared", "synthetic", "slow"],
        ["many-chat", "pocket-live", "slow"],
    ),
)
@pytest.mark.slow
def test_in_the_second_half_of_each_routing_the_better_policy_decides(name: str) -> None:
    if name == "synthetic":
        routing = make_routing(400, 3, 256, 8)
    elif name == "slow":
        routing = make_routing(400, 3, 256, 8, topic=0.12, drift=0.75, drift_tokens=8)
    else:
        routing = recorded(name)
    half = len(routing.experts) // 2
    means = np.mean([rates(routing, share, half) for share in TUNED_SHARES], axis=0)
    assert max(means[:2]) - means[2] < 0.003


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_the_better_policy_decides_once_a_trial_is_over(share: float) -> None:
    for seed in (1, 2):
        routing = make_routing(TRIAL + 160, 2, 64, 4, seed=seed)
        lru, near, auto = rates(routing, share, TRIAL + 32)
        assert max(lru, near) - auto < 0.004


def feed(contest: Contest, routings: Sequence[Routing], slots: int) -> list[str]:
    """Replays one after the other; which policy decided at the end of each."""
    layers = routings[0].experts.shape[1]
    policies, residents = [contest() for _ in range(layers)], [dict[int, None]() for _ in range(layers)]
    decided: list[str] = []
    for routing in routings:
        for token, rows in enumerate(routing.experts.tolist()):
            for layer, (policy, resident, row) in enumerate(zip(policies, residents, rows, strict=True)):
                if policy.watches_scores:
                    policy.observe(routing.scores[token, layer, None])
                _step(policy, resident, row, slots)
        decided.append(contest.decides)
    return decided


def misleading(routing: Routing) -> Routing:
    """The same choices, and scores that have nothing to do with what comes next."""
    rng = np.random.default_rng(5)
    scores = rng.uniform(0, 0.5, routing.scores.shape).astype(np.float32)
    np.put_along_axis(scores, routing.experts.astype(np.int64), 0.6, axis=-1)
    shift = rng.integers(1, routing.scores.shape[-1], (*scores.shape[:2], 1))
    index = (np.arange(scores.shape[-1]) + shift) % scores.shape[-1]
    return Routing(routing.experts, np.take_along_axis(scores, index, axis=-1))


def test_it_changes_to_nearness_and_back_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    routing = make_routing(TRIAL + 1, 2, 64, 4, seed=3)
    contest = Contest(64, 4)
    with caplog.at_level(logging.INFO):
        decided = feed(contest, [routing, misleading(routing), misleading(routing)], 16)
    assert decided[0] == "nearness"
    assert decided[-1] == "lru"
    first, back = [record.message for record in caplog.records]
    assert "nearness decides now" in first
    assert f"in {COUNTED_STEPS} steps" in first
    assert "lru decides now" in back
    assert contest.gain is not None
    assert contest.gain < -MARGIN


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_gain_is_what_banks_of_either_policy_would_have_hit(seed: int) -> None:
    routing = make_routing(TRIAL + 1, 3, 64, 4, seed=seed)
    counted = Routing(routing.experts[:-1], routing.scores[:-1])
    contest = Contest(64, 4)
    feed(contest, [routing], 16)
    lru = count_hits(counted, 16, LeastRecentlyUsed, WARM_STEPS)
    near = count_hits(counted, 16, partial(LeastNearlyChosen, 64, 4), WARM_STEPS)
    assert contest.gain == pytest.approx(near - lru, abs=1e-9)


def test_between_trials_scores_are_not_looked_at_where_lru_decides() -> None:
    routing = misleading(make_routing(2 * TRIAL + 5, 2, 64, 4))
    contest = Contest(64, 4)
    policies = [contest() for _ in range(2)]
    watched = []
    for token, rows in enumerate(routing.experts.tolist()):
        watched.append(policies[1].watches_scores)
        for layer, policy in enumerate(policies):
            if policy.watches_scores:
                policy.observe(routing.scores[token, layer, None])
            policy.ask(rows[layer], (), 16)
            policy.use(rows[layer])
    assert watched[0]
    assert not watched[-1]


@pytest.mark.parametrize("name", ["lru", "nearness"])
def test_a_fixed_policy_stays(name: str) -> None:
    rule = make_rule("lru" if name == "lru" else "nearness", 64, 4)
    assert isinstance(rule(), LeastRecentlyUsed if name == "lru" else LeastNearlyChosen)
    assert (rule.decides, rule.gain) == (name, None)


def test_without_a_word_the_policy_is_chosen_by_what_is_measured() -> None:
    assert Settings().expert_policy == "auto"
    fields = EngineConfig.__dataclass_fields__
    assert fields["expert_policy"].default == "auto"
    rule = make_rule(Settings().expert_policy, 64, 4)
    assert rule.decides == "lru", "the card's default, until another is seen to be better"


def test_a_step_that_wants_more_than_a_bank_holds_says_nothing() -> None:
    contest = Contest(64, 4)
    policy = contest()
    for _ in range(TRIAL + 1):
        policy.ask(range(20), (), 16)
    assert (contest.decides, contest.gain) == ("lru", 0.0)

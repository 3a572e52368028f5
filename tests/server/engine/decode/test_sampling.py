"""Drawing tokens, against what can be computed by hand."""

import math

import mlx.core as mx
import numpy as np
import pytest

from server.engine.decode.sampling import (
    apply_bias,
    apply_penalties,
    draw,
    filter_logits,
    score_tokens,
    start_sampling,
)
from server.link.messages import Sampling

PROBS = [0.4, 0.3, 0.15, 0.1, 0.05]
LOGITS = mx.array([math.log(p) for p in PROBS])


def draws(
    sampling: Sampling, count: int, logits: mx.array = LOGITS, prompt: tuple[int, ...] = ()
) -> list[int]:
    state = start_sampling(sampling, prompt, logits.size)
    result = []
    for _ in range(count):
        token, state = draw(logits, sampling, state)
        result.append(int(str(token.item())))
    return result


def kept(sampling: Sampling, logits: mx.array = LOGITS) -> list[int]:
    return np.flatnonzero(np.array(filter_logits(logits, sampling)) != -math.inf).tolist()


def test_temperature_zero_takes_the_likeliest_and_the_lower_of_two_equals() -> None:
    assert draws(Sampling(temperature=0), 3) == [0, 0, 0]
    assert draws(Sampling(temperature=0), 1, mx.array([1.0, 3.0, 3.0])) == [1]


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-38, 1e-320])
def test_next_to_zero_it_is_still_the_likeliest(temperature: float) -> None:
    logits = mx.array([5.0, 40.0, 39.0])
    assert draws(Sampling(temperature=temperature, top_p=0.9), 5, logits) == [1] * 5


def test_a_seed_repeats_and_another_seed_differs() -> None:
    first, again, other = (draws(Sampling(seed=seed), 40) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_steps_of_one_request_draw_with_different_keys() -> None:
    assert len(set(draws(Sampling(seed=1), 60))) > 2


def test_an_answer_without_chance_does_not_pile_up_keys() -> None:
    sampling = Sampling(temperature=0)
    before = start_sampling(sampling, (), LOGITS.size)
    token, after = draw(LOGITS, sampling, before)
    mx.eval(token)
    assert after.key is before.key, "nothing would ever evaluate another one"


@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1])
def test_any_64_bit_seed_is_taken(seed: int) -> None:
    assert len(draws(Sampling(seed=seed), 2)) == 2


def test_draws_follow_the_distribution_and_the_temperature() -> None:
    at_one = draws(Sampling(seed=3), 1500)
    assert at_one.count(0) / 1500 == pytest.approx(0.4, abs=0.05)
    weights = [p**2 for p in PROBS]
    at_half = draws(Sampling(seed=3, temperature=0.5), 1500)
    assert at_half.count(0) / 1500 == pytest.approx(weights[0] / sum(weights), abs=0.05)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(top_k=2), [0, 1]),
        (Sampling(top_k=0), [0, 1, 2, 3, 4]),
        (Sampling(top_k=-1), [0, 1, 2, 3, 4]),
        (Sampling(top_k=99), [0, 1, 2, 3, 4]),
        (Sampling(top_p=0.0), [0]),
        (Sampling(top_p=0.39), [0]),
        (Sampling(top_p=0.6), [0, 1]),
        (Sampling(top_p=0.8), [0, 1, 2]),
        (Sampling(min_p=0.3), [0, 1, 2]),
        (Sampling(min_p=1.0), [0]),
        (Sampling(top_k=3, top_p=0.8), [0, 1]),  # 0.4 and 0.3 of the 0.85 that top_k leaves
    ],
)
def test_filters_keep_what_they_say(sampling: Sampling, expected: list[int]) -> None:
    assert kept(sampling) == expected


def test_filters_do_not_depend_on_the_order_of_the_vocabulary() -> None:
    assert kept(Sampling(top_p=0.6), LOGITS[::-1]) == [3, 4]


def test_logit_bias_is_added() -> None:
    assert apply_bias(mx.array([1.0, 2.0]), ((0, 5.0),)).tolist() == [6.0, 2.0]
    assert draws(Sampling(temperature=0, logit_bias=((4, 100.0),)), 2) == [4, 4]
    assert draws(Sampling(seed=1, logit_bias=((0, -100.0),)), 50).count(0) == 0


def test_repetition_penalty_counts_prompt_and_answer_and_knows_the_sign() -> None:
    sampling = Sampling(repetition_penalty=2.0)
    state = start_sampling(sampling, (0, 1), 3)
    assert apply_penalties(mx.array([4.0, -4.0, 4.0]), sampling, state).tolist() == [2.0, -8.0, 4.0]
    greedy = Sampling(temperature=0, repetition_penalty=2.0)
    assert draws(greedy, 3, mx.array([4.0, 3.0, 2.5])) == [0, 1, 2]


def test_presence_and_frequency_count_the_answer_only() -> None:
    presence = Sampling(temperature=0, presence_penalty=1.0)
    assert draws(presence, 3, mx.array([4.0, 3.5]), prompt=(0,)) == [0, 1, 0]
    frequency = Sampling(temperature=0, frequency_penalty=0.3)
    assert draws(frequency, 5, mx.array([4.0, 3.5]), prompt=(0,)) == [0, 0, 1, 0, 1]


def test_log_probabilities_are_those_of_the_model() -> None:
    [score] = score_tokens(LOGITS[None] + 3.0, mx.array([2]), 2)
    assert score.logprob == pytest.approx(math.log(0.15), abs=1e-5)
    assert [token for token, _ in score.top] == [0, 1]
    assert score.top[1][1] == pytest.approx(math.log(0.3), abs=1e-5)


def test_no_alternatives_are_listed_when_none_are_asked_for_and_at_most_the_vocabulary() -> None:
    assert score_tokens(LOGITS[None], mx.array([0]), 0)[0].top == ()
    assert len(score_tokens(LOGITS[None], mx.array([0]), 20)[0].top) == 5

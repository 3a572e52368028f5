"""Prompts with a beginning in common that come at the same moment: one pass over the layers reads all."""

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import pytest

from models.attention.attention import Span
from server.engine.decode.constraint import Constraint
from server.engine.decode.sampling import start_sampling
from server.engine.schedule.sequence import Sequence as Request
from server.engine.schedule.shared_prefixes import SavedPrefixes
from server.link.messages import (
    Cancel,
    Command,
    Event,
    Generate,
    Started,
)
from tests.grids import few
from tests.server.engine.prefix.prefix_runs import (
    CONFIG,
    GREEDY,
    CountedModel,
    Outcome,
    answer,
    ask,
    make_counted_model,
    open_prefix,
    run_script,
)
from tests.tiny_glm import make_weights, tokens
from tests.tiny_model import make_model

NUM_LAYERS = CONFIG["num_hidden_layers"]
# A tenth of so many is more than one.
DEEP = CONFIG | {"num_hidden_layers": 11, "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 8}
SHARED = tuple(tokens(CONFIG, 256))
TAILS = [tuple(tokens(CONFIG, 70, seed=20 + i)) for i in range(4)]
OTHER = tuple(tokens(CONFIG, 320, seed=9))
PROMPTS = {f"agent {i}": (*SHARED, *tail) for i, tail in enumerate(TAILS)}


@pytest.fixture(scope="module")
def model() -> CountedModel:
    return make_counted_model()


@pytest.fixture(scope="module")
def deep() -> CountedModel:
    return CountedModel(make_model(DEEP, make_weights(DEEP, 3)))


@pytest.fixture(scope="module")
def uncached(model: CountedModel) -> Callable[[tuple[int, ...]], list[int]]:
    known: dict[tuple[int, ...], list[int]] = {}

    def ask_once(prompt: tuple[int, ...]) -> list[int]:
        if prompt not in known:
            known[prompt] = ask(model, None, prompt, 4).tokens
        return known[prompt]

    return ask_once


def requests(prompts: dict[str, tuple[int, ...]]) -> list[Generate]:
    return [Generate(name, prompt, 4, GREEDY, agent=name) for name, prompt in prompts.items()]


def run(
    model: CountedModel,
    prompts: dict[str, tuple[int, ...]],
    script: Callable[[int], Sequence[Command]] = lambda layer: [],
    awaited: set[str] | None = None,
    rows: int = 2048,
) -> tuple[dict[str, Outcome], list[int]]:
    """What became of requests that are all there from the start, and the rows of each pass over prompts."""
    model.take_rows()
    outcomes = run_script(
        model, open_prefix(), requests(prompts), script, set(prompts) if awaited is None else awaited, rows
    )
    return outcomes, [count for count in model.rows if count > len(prompts)]


def test_what_all_share_and_what_each_has_of_its_own_is_one_pass(
    model: CountedModel, uncached: Callable[[tuple[int, ...]], list[int]]
) -> None:
    outcomes, passes = run(model, PROMPTS)
    assert passes == [256 + 4 * 70]
    assert {name: one.tokens for name, one in outcomes.items()} == {
        name: uncached(prompt) for name, prompt in PROMPTS.items()
    }
    cached = [outcomes[name].usage.num_cached_tokens for name in PROMPTS]
    assert cached == [0, 256, 256, 256]


def test_the_same_prompt_twice_among_others_is_read_once(
    model: CountedModel, uncached: Callable[[tuple[int, ...]], list[int]]
) -> None:
    """Two that share more than all do: the second goes on behind the first, which follows as well."""
    long = (*SHARED, *tokens(CONFIG, 128, seed=30), *TAILS[0][:10])
    prompts = {"first": PROMPTS["agent 0"], "long": long, "again": long, "last": PROMPTS["agent 1"]}
    outcomes, passes = run(model, prompts)
    assert passes == [256 + 70 + (128 + 10) + 10 + 70]
    assert {name: one.tokens for name, one in outcomes.items()} == {
        name: uncached(prompt) for name, prompt in prompts.items()
    }
    assert outcomes["again"].usage.num_cached_tokens == 256 + 128


def test_a_prompt_of_whole_blocks_leaves_its_last_token_to_be_read(
    model: CountedModel, uncached: Callable[[tuple[int, ...]], list[int]]
) -> None:
    outcomes, passes = run(model, {"first": SHARED, "again": SHARED})
    assert passes == [256 + 1]
    assert outcomes["first"].tokens == outcomes["again"].tokens == uncached(SHARED)
    assert outcomes["again"].usage.num_cached_tokens == 255


@pytest.mark.parametrize(("rows", "expected"), [(400, [400, 136]), (326, [326, 210]), (200, [200, 200, 136])])
def test_whoever_finds_no_room_comes_with_the_next_pass(
    model: CountedModel,
    uncached: Callable[[tuple[int, ...]], list[int]],
    rows: int,
    expected: list[int],
) -> None:
    outcomes, passes = run(model, PROMPTS, rows=rows)
    assert passes == expected
    assert all(outcomes[name].tokens == uncached(prompt) for name, prompt in PROMPTS.items())


def test_who_comes_before_a_tenth_of_the_pass_is_done_is_taken_along(deep: CountedModel) -> None:
    alone = {name: ask(deep, None, prompt, 4).tokens for name, prompt in PROMPTS.items()}
    first, *others = requests(PROMPTS)
    deep.take_rows()
    answers = answer(deep, [first], lambda event: others if event == Started("agent 0") else [])
    assert [count for count in deep.rows if count > 8] == [326, 256 + 4 * 70]
    assert answers == alone


def test_a_pass_does_not_start_again_for_each_of_many_that_come_one_by_one(deep: CountedModel) -> None:
    """A first layer that was begun counts as lost: two that come meanwhile are taken along, no more."""
    first, *others = requests(PROMPTS)

    def react(event: Event) -> list[Generate]:
        return [others.pop(0)] if isinstance(event, Started) and others else []

    deep.take_rows()
    answer(deep, [first], react)
    assert [count for count in deep.rows if count > 8] == [326, 326 + 2 * 70, 70]


def test_no_pass_starts_again_for_whoever_follows_one_that_has_left(deep: CountedModel) -> None:
    """The next attempt of a client that gave up: it reads its rest when the pass is through."""
    other, first = requests({"other": OTHER, "first": PROMPTS["agent 0"]})
    [again] = requests({"again": PROMPTS["agent 0"]})
    coming: list[Command] = [Cancel("first"), again]
    deep.take_rows()
    answer(deep, [other, first], lambda event: coming if event == Started("first") else [])
    assert [count for count in deep.rows if count > 8] == [320 + 326]


def test_whoever_followed_one_that_has_left_is_in_the_pass_that_starts_again(deep: CountedModel) -> None:
    *both, other = requests({name: PROMPTS[name] for name in ("agent 0", "agent 1")} | {"other": OTHER})
    coming: list[Command] = [Cancel("agent 0"), other]
    deep.take_rows()
    answer(deep, both, lambda event: coming if event == Started("agent 1") else [])
    assert [count for count in deep.rows if count > 8] == [326 + 70, 326 + 320]


def test_a_tiny_prompt_does_not_wait_for_one_that_follows_it(model: CountedModel) -> None:
    long = (*SHARED[:64], *tokens(CONFIG, 2400, seed=31))
    _, passes = run(model, {"tiny": SHARED[:74], "long": long}, rows=4096)
    assert passes == [74, 2400]


def test_two_that_go_on_from_within_a_block_share_what_is_new(
    model: CountedModel, uncached: Callable[[tuple[int, ...]], list[int]]
) -> None:
    """As the next turn of a conversation does, asked for twice."""
    prefix, turn = open_prefix(), (*SHARED, *TAILS[0], *TAILS[1])
    ask(model, prefix, (*SHARED, *TAILS[0]), 1)  # 326 tokens
    model.take_rows()
    both = requests({"first": turn, "again": turn})
    outcomes = run_script(model, prefix, both, lambda layer: [], {"first", "again"})
    assert [count for count in model.rows if count > 8] == [70 + 396 % 64]
    assert outcomes["first"].tokens == outcomes["again"].tokens == uncached(turn)
    assert outcomes["again"].usage.num_cached_tokens == 384


def test_what_is_adopted_is_saved_once(model: CountedModel) -> None:
    """Of each its own block of 64 and a tail of 6, and what the answers add to that."""
    prefix = open_prefix()
    run_script(model, prefix, requests(PROMPTS), lambda layer: [], set(PROMPTS))
    assert prefix.num_saved_tokens == 256 + 4 * (64 + 6 + 9)


def test_what_is_adopted_twice_is_cached_once(model: CountedModel) -> None:
    """Its cache was taken away, and what it had adopted was never saved."""
    prefixes = SavedPrefixes(open_prefix(memory=0))
    leader, follower = (
        Request(one, start_sampling(GREEDY, one.token_ids, 64), Constraint(one, None))
        for one in requests(PROMPTS)[:2]
    )
    for _ in range(2):
        follower.follow(leader, 256)
        prefixes.note_followed(follower, 0)
    assert follower.num_cached_tokens == 256


@pytest.mark.parametrize("layer", range(1, NUM_LAYERS + 1))
@pytest.mark.parametrize("leaving", ["agent 0", "agent 1", "agent 3"])
def test_whoever_leaves_amid_the_pass_takes_nobody_along(
    model: CountedModel, uncached: Callable[[tuple[int, ...]], list[int]], layer: int, leaving: str
) -> None:
    awaited = PROMPTS.keys() - {leaving}
    outcomes, passes = run(model, PROMPTS, lambda at: [Cancel(leaving)] if at == layer else [], awaited)
    assert passes == [256 + 4 * 70]
    assert all(outcomes[name].tokens == uncached(PROMPTS[name]) for name in awaited)


@dataclass
class Damaged(CountedModel):
    """The model, whose passes fail where `fails` says so of their spans, and whose rows may be damaged."""

    fails: Callable[[Sequence[Span]], bool] = lambda spans: False
    damaged: list[int] = field(default_factory=list)  # rows of the next pass over a prompt

    def forward(self, tokens: mx.array, spans: Sequence[Span]) -> Generator[int | None, None, mx.array]:
        if self.fails(spans):
            yield None
            raise OSError("the disk gave up")
        hidden = yield from super().forward(tokens, spans)
        if tokens.shape[0] > 8 and self.damaged:
            hidden[mx.array(self.damaged)] = float("nan")
            self.damaged.clear()
        return hidden


@pytest.mark.parametrize("length", [256 + 70, 70])
def test_a_failed_pass_is_taken_apart_and_those_go_on_that_can(
    model: CountedModel, uncached: Callable[[tuple[int, ...]], list[int]], length: int
) -> None:
    """The leader's own part fails alone, or those of its followers."""
    num_left = [2 if length > 256 else 4]  # times that something fails

    def fails(spans: Sequence[Span]) -> bool:
        is_hit = num_left[0] > 0 and any(span.rows == length for span in spans)
        num_left[0] -= is_hit
        return is_hit

    answers = answer(Damaged(model.inner, fails=fails), requests(PROMPTS))
    gone = {"agent 0"} if length > 256 else PROMPTS.keys() - {"agent 0"}
    assert answers.keys() == PROMPTS.keys() - gone
    assert all(answers[name] == uncached(PROMPTS[name]) for name in answers)


def test_damaged_rows_of_a_leader_are_nobody_elses(
    model: CountedModel, uncached: Callable[[tuple[int, ...]], list[int]]
) -> None:
    """What they took over from it is not saved either: they read it again, together."""
    damaged = Damaged(model.inner, damaged=[17])
    answers = answer(damaged, requests(PROMPTS))
    assert [count for count in damaged.rows if count > 8] == [256 + 4 * 70, 256 + 3 * 70]
    assert answers.keys() == PROMPTS.keys() - {"agent 0"}
    assert all(answers[name] == uncached(PROMPTS[name]) for name in answers)


@pytest.mark.parametrize("seed", few(range(12), range(4)))
def test_whatever_shares_what_and_comes_or_goes_when(
    model: CountedModel, uncached: Callable[[tuple[int, ...]], list[int]], seed: int
) -> None:
    """Prompts of a random tree of beginnings; small passes; some leave. All who stay get their own text."""
    draw = random.Random(seed)
    stems = [SHARED[:128], (*SHARED[:128], *TAILS[0], *TAILS[1]), (*SHARED, *TAILS[2])]
    prompts = {
        f"{i}": (*draw.choice(stems), *draw.choice(TAILS)[: draw.choice([0, 10, 64, 70])]) for i in range(7)
    }
    names = list(prompts)
    first = {name: prompts[name] for name in names[: draw.randint(1, 7)]}
    late = requests({name: prompts[name] for name in names[len(first) :]})
    events: dict[int, list[Command]] = {}
    for one in late:
        events.setdefault(draw.randint(1, 12), []).append(one)
    gone = set(draw.sample(names, 2))
    for name in gone:
        events.setdefault(draw.randint(13, 20), []).append(Cancel(name))
    rows, awaited = draw.choice([100, 300, 2048]), set(names) - gone
    outcomes, _ = run(model, first, lambda at: events.get(at, []), awaited, rows)
    assert all(outcomes[name].tokens == uncached(prompts[name]) for name in awaited)

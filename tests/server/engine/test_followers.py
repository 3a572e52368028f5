"""Prompts with a beginning in common that come at the same moment: one pass over the layers reads all."""

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import mlx.core as mx
import pytest

from models.attention import Span
from server.engine.messages import (
    Cancel,
    Command,
    Event,
    Failed,
    Finished,
    Generate,
    Shutdown,
    Started,
    Token,
)
from tests.server.engine.prefix_runs import (
    CONFIG,
    GREEDY,
    CountedModel,
    Outcome,
    ask,
    make_counted_model,
    make_loop,
    open_prefix,
    run_script,
)
from tests.tiny_glm import tokens

NUM_LAYERS = CONFIG["num_hidden_layers"]
SHARED = tuple(tokens(CONFIG, 256))
TAILS = [tuple(tokens(CONFIG, 70, seed=20 + i)) for i in range(4)]
PROMPTS = {f"agent {i}": (*SHARED, *tail) for i, tail in enumerate(TAILS)}


@pytest.fixture(scope="module")
def model() -> CountedModel:
    return make_counted_model()


@pytest.fixture(scope="module")
def uncached(model: CountedModel) -> Callable[[tuple[int, ...]], list[int]]:
    known: dict[tuple[int, ...], list[int]] = {}

    def answer(prompt: tuple[int, ...]) -> list[int]:
        if prompt not in known:
            known[prompt] = ask(model, None, prompt, 4).tokens
        return known[prompt]

    return answer


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


def serve(
    model: CountedModel,
    first: Sequence[Generate],
    react: Callable[[Event], Sequence[Command]] = lambda event: [],
) -> dict[str, list[int]]:
    """Answers to those that got one; `react` says what comes after an event."""
    inbox: SimpleQueue[Command] = SimpleQueue()
    answers: dict[str, list[int]] = {}
    open_ids = {one.request_id for one in first}

    def send(event: Event) -> None:
        for command in react(event):
            inbox.put(command)
            open_ids.update([command.request_id] if isinstance(command, Generate) else [])
        if isinstance(event, Token):
            answers.setdefault(event.request_id, []).append(event.score.token_id)
        if isinstance(event, Finished | Failed):
            open_ids.discard(event.request_id)
            if not open_ids:
                inbox.put(Shutdown())

    for one in first:
        inbox.put(one)
    loop = make_loop(model, open_prefix(), inbox, send, 2048)
    loop.run()
    loop.check_integrity()
    return answers


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


def test_who_comes_before_a_tenth_of_the_pass_is_done_is_taken_along(
    model: CountedModel, uncached: Callable[[tuple[int, ...]], list[int]]
) -> None:
    first, *others = requests(PROMPTS)
    model.take_rows()
    answers = serve(model, [first], lambda event: others if event == Started("agent 0") else [])
    assert [count for count in model.rows if count > 8] == [326, 256 + 4 * 70]
    assert all(answers[name] == uncached(prompt) for name, prompt in PROMPTS.items())


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

    answers = serve(Damaged(model.inner, fails=fails), requests(PROMPTS))
    gone = {"agent 0"} if length > 256 else PROMPTS.keys() - {"agent 0"}
    assert answers.keys() == PROMPTS.keys() - gone
    assert all(answers[name] == uncached(PROMPTS[name]) for name in answers)


def test_damaged_rows_of_a_leader_are_nobody_elses(
    model: CountedModel, uncached: Callable[[tuple[int, ...]], list[int]]
) -> None:
    """What they took over from it is not saved either: they read it again, together."""
    damaged = Damaged(model.inner, damaged=[17])
    answers = serve(damaged, requests(PROMPTS))
    assert [count for count in damaged.rows if count > 8] == [256 + 4 * 70, 256 + 3 * 70]
    assert answers.keys() == PROMPTS.keys() - {"agent 0"}
    assert all(answers[name] == uncached(PROMPTS[name]) for name in answers)


@pytest.mark.parametrize("seed", range(12))
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

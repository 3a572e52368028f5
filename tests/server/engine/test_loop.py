"""The engine's loop over a model that counts."""

import math
from queue import SimpleQueue

import pytest

from server.engine.loop import EngineLoop
from server.link.messages import (
    Cancel,
    Command,
    Event,
    Failed,
    Finished,
    Generate,
    Progress,
    PromptScored,
    Sampling,
    Shutdown,
    Started,
    Token,
    TokenScore,
)
from tests.server.engine.events import events_of, tokens_of
from tests.server.engine.fakes import NUM_LAYERS, VOCAB, CountingModel, make_backend

GREEDY = Sampling(temperature=0)


def run(*commands: Command, model: CountingModel | None = None, rows: int = 2048) -> list[Event]:
    """All events of a loop over these."""
    backend = make_backend(model, rows=rows)
    return events_of(lambda inbox, send: EngineLoop(backend, inbox, send), commands)


def last(events: list[Event]) -> Event:
    return events[-1]


def test_tokens_follow_the_prompt_until_max_tokens() -> None:
    events = run(Generate("a", (1, 2, 3), 4, GREEDY))
    assert tokens_of(events) == [4, 5, 6, 7]
    end = last(events)
    assert isinstance(end, Finished)
    assert (end.reason, end.usage.num_prompt_tokens, end.usage.num_completion_tokens) == ("length", 3, 4)


def test_a_stop_token_ends_the_answer_and_is_not_handed_out() -> None:
    events = run(Generate("a", (1,), 10, GREEDY, stop_token_ids=frozenset({4})))
    assert tokens_of(events) == [2, 3]
    end = last(events)
    assert isinstance(end, Finished)
    assert (end.reason, end.stop_token_id, end.usage.num_completion_tokens) == ("stop", 4, 3)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 100])
def test_a_prompt_is_read_in_chunks_and_the_answer_does_not_depend_on_their_size(rows: int) -> None:
    model = CountingModel()
    events = run(Generate("a", (1, 2, 3, 4, 5), 2, GREEDY), model=model, rows=rows)
    assert tokens_of(events) == [6, 7]
    assert max(model.forwards) == min(rows, 5)
    progress = [item.num_prefilled for item in events if isinstance(item, Progress)]
    assert progress == [*range(rows, 5, rows), 5]


def test_requests_are_served_in_the_order_of_arrival() -> None:
    events = run(Generate("a", (1,), 2, GREEDY), Generate("b", (9,), 2, GREEDY))
    assert tokens_of(events, "a") == [2, 3]
    assert tokens_of(events, "b") == [10, 11]
    assert [item.request_id for item in events if isinstance(item, Finished)] == ["a", "b"]


def test_a_failing_step_fails_its_request_only() -> None:
    model = CountingModel(fails_at_token=3)
    events = run(Generate("a", (1,), 5, GREEDY), Generate("b", (9,), 2, GREEDY), model=model)
    failed = [item for item in events if isinstance(item, Failed)]
    assert failed == [Failed("a", "engine", "token 3 cannot be read")]
    assert tokens_of(events, "b") == [10, 11]


def test_numbers_that_are_not_numbers_are_an_error_and_not_an_answer() -> None:
    end = last(run(Generate("a", (1,), 5, GREEDY), model=CountingModel(damaged_token=3)))
    assert isinstance(end, Failed)
    assert "NaN" in end.message


@pytest.mark.parametrize("cancel_after", [Progress, Token])
def test_a_cancelled_request_ends_within_one_step(cancel_after: type[Event]) -> None:
    inbox: SimpleQueue[Command] = SimpleQueue()
    events: list[Event] = []
    model = CountingModel()

    def send(event: Event) -> None:
        events.append(event)
        if isinstance(event, cancel_after) and event.request_id == "a":  # type: ignore[union-attr]
            inbox.put(Cancel("a"))
        if isinstance(event, Finished):
            inbox.put(Shutdown())

    inbox.put(Generate("a", tuple(range(10)), 20, GREEDY))
    inbox.put(Generate("b", (1,), 2, GREEDY))
    EngineLoop(make_backend(model, rows=4), inbox, send).run()
    assert [item.request_id for item in events if isinstance(item, Finished)] == ["b"]
    assert len(tokens_of(events, "a")) <= 1
    assert len(model.forwards) <= 4 + 2


def test_a_cancel_takes_effect_between_layers() -> None:
    inbox: SimpleQueue[Command] = SimpleQueue()
    model = CountingModel()

    def on_layer() -> None:
        if model.num_layers_run == 1:
            inbox.put(Cancel("a"))
            inbox.put(Generate("b", (1, 2, 3), 5, GREEDY))
        else:
            inbox.put(Shutdown())

    model.on_layer = on_layer
    inbox.put(Generate("a", (1, 2, 3), 5, GREEDY))
    events: list[Event] = []
    EngineLoop(make_backend(model), inbox, events.append).run()
    assert model.num_layers_run == 2, "one layer of a, one of b"
    assert events == [Started("a"), Started("b")]


@pytest.mark.parametrize("num_layers", [1, NUM_LAYERS + 1])
def test_a_shutdown_takes_effect_between_layers(num_layers: int) -> None:
    """In the pass over the prompt, and in a decode step."""
    inbox: SimpleQueue[Command] = SimpleQueue()
    model = CountingModel()

    def on_layer() -> None:
        if model.num_layers_run == num_layers:
            inbox.put(Shutdown())

    model.on_layer = on_layer
    inbox.put(Generate("a", (1, 2, 3), 5, GREEDY))
    EngineLoop(make_backend(model), inbox, lambda event: None).run()
    assert model.num_layers_run == num_layers


def test_a_request_that_waits_can_be_cancelled() -> None:
    model = CountingModel()
    events = run(Generate("a", (1,), 2, GREEDY), Generate("b", (9,), 2, GREEDY), Cancel("b"), model=model)
    assert tokens_of(events, "b") == []
    assert sum(model.forwards) == 2


def test_cancelling_an_unknown_request_changes_nothing() -> None:
    assert tokens_of(run(Cancel("x"), Generate("a", (1,), 1, GREEDY))) == [2]


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_a_prompt_is_scored_once_at_every_position(rows: int) -> None:
    prompt = (1, 2, 4, 5)
    events = run(Generate("a", prompt, 0, GREEDY, num_top_logprobs=2, score_prompt=True), rows=rows)
    scores = [score for item in events if isinstance(item, PromptScored) for score in item.scores]
    assert [score.token_id for score in scores] == list(prompt)
    assert scores[0] == TokenScore(1, None)
    total = math.log(sum(math.exp(5 - 0.1 * step) for step in range(VOCAB)))
    assert scores[1].logprob == pytest.approx(5 - total, abs=1e-5)
    assert scores[2].logprob == pytest.approx(4.9 - total, abs=1e-5)
    assert [token for token, _ in scores[2].top] == [3, 4]
    assert scores[3].top[0] == (5, scores[3].logprob)
    end = last(events)
    assert isinstance(end, Finished)
    assert end.usage.num_completion_tokens == 0


def test_a_request_beyond_the_context_is_refused_with_the_numbers() -> None:
    end = last(run(Generate("a", (1,) * 60, 5, GREEDY)))
    assert end == Failed("a", "request", "65 tokens do not fit a context of 64")

"""Prompts in flight at the same time: what they share is read once, also when its first reader leaves."""

import pytest

from benchmarks.rig.drive import Served, drive
from server.engine.model_protocol import Backend
from server.engine.schedule.limits import Limits
from server.engine.schedule.shared_prefixes import SavedPrefixes
from server.link.messages import Cancel, Command, Finished, Generate, ModelInfo, Token
from tests.server.engine.prefix.prefix_runs import (
    CONFIG,
    GREEDY,
    CountedModel,
    Outcome,
    ask,
    make_counted_model,
    open_prefix,
    run_script,
)
from tests.tiny_glm import tokens

NUM_LAYERS = CONFIG["num_hidden_layers"]
PROMPT = tuple(tokens(CONFIG, 320))
OTHER = tuple(tokens(CONFIG, 320, seed=9))


@pytest.fixture(scope="module")
def model() -> CountedModel:
    made = make_counted_model()
    ask(made, None, PROMPT[:40])  # compiles, and is no part of the counts
    made.take_rows()
    return made


def request(name: str, prompt: tuple[int, ...] = PROMPT) -> Generate:
    return Generate(name, prompt, 4, GREEDY)


@pytest.fixture(scope="module")
def uncached(model: CountedModel) -> dict[tuple[int, ...], list[int]]:
    made = {prompt: ask(model, None, prompt, 4).tokens for prompt in (PROMPT, OTHER)}
    model.take_rows()
    return made


def run(
    model: CountedModel, events: dict[int, list[Command]], awaited: set[str], rows: int = 2048
) -> tuple[dict[str, Outcome], int]:
    """What became of the requests, and how many rows were computed."""
    model.take_rows()
    outcomes = run_script(
        model, open_prefix(), [request("first")], lambda layer: events.get(layer, []), awaited, rows
    )
    return outcomes, model.take_rows()


@pytest.mark.parametrize("layer", [1, 3, 5])
def test_whoever_asks_the_same_while_it_is_read_waits_for_it(
    model: CountedModel, uncached: dict[tuple[int, ...], list[int]], layer: int
) -> None:
    events: dict[int, list[Command]] = {layer: [request("second"), request("third")]}
    outcomes, num_rows = run(model, events, {"first", "second", "third"})
    assert {name: one.tokens for name, one in outcomes.items()} == dict.fromkeys(
        ["first", "second", "third"], uncached[PROMPT]
    )
    assert num_rows <= 320 + 2 * 64 + 3 * 3
    assert outcomes["second"].usage.num_cached_tokens >= 256


@pytest.mark.parametrize("layer", [1, 3, 4])
def test_a_pass_goes_on_after_its_client_left_and_the_next_attempt_finds_it(
    model: CountedModel, uncached: dict[tuple[int, ...], list[int]], layer: int
) -> None:
    events: dict[int, list[Command]] = {layer: [Cancel("first"), request("again")]}
    outcomes, num_rows = run(model, events, {"again"})
    assert outcomes["again"].tokens == uncached[PROMPT]
    assert num_rows <= 320 + 64 + 3


def test_a_prompt_left_at_three_fifths_is_complete_after_the_other_two(model: CountedModel) -> None:
    prompt, counts = tuple(tokens(CONFIG, 1280, seed=5)), [0]
    alone = ask(model, None, prompt, 4).tokens
    start = model.row_layers

    def leave(layer: int) -> list[Command]:
        if layer != 3:
            return []
        counts.append(model.row_layers - start)
        return [Cancel("first"), request("again", prompt)]

    outcomes = run_script(model, open_prefix(), [request("first", prompt)], leave, {"again"})
    whole = 1280 * NUM_LAYERS
    assert counts[1] == 0.6 * whole
    second = model.row_layers - start - counts[1] - 3 * NUM_LAYERS  # the answer is no part of it
    assert second <= 0.45 * whole
    assert outcomes["again"].tokens == alone
    assert outcomes["again"].usage.num_cached_tokens >= 1280 - 64


def test_a_later_turn_of_a_session_waits_for_the_pass_that_its_client_left(
    model: CountedModel, uncached: dict[tuple[int, ...], list[int]]
) -> None:
    """Another body that begins with the same tokens: what both share is read once."""
    turn = (*PROMPT, *OTHER[:30])
    alone = ask(model, None, turn, 4).tokens
    outcomes, num_rows = run(model, {3: [Cancel("first"), request("next", turn)]}, {"next"})
    assert outcomes["next"].tokens == alone
    assert outcomes["next"].usage.num_cached_tokens == 320
    assert num_rows == 320 + 30 + 3


@pytest.mark.parametrize(("layer", "goes_on"), [(2, False), (3, True)])
def test_a_pass_that_nobody_waits_for_gives_way_to_others_while_less_than_half_is_done(
    model: CountedModel, uncached: dict[tuple[int, ...], list[int]], layer: int, goes_on: bool
) -> None:
    prefix = open_prefix()
    coming: list[Command] = [Cancel("long"), request("other", OTHER)]
    outcomes = run_script(
        model, prefix, [request("long")], lambda at: coming if at == layer else [], {"other"}
    )
    assert outcomes["other"].tokens == uncached[OTHER]
    assert (prefix.count_saved(PROMPT) == 320) == goes_on


def test_a_pass_that_its_clients_next_attempt_waits_for_goes_on_whoever_else_waits(
    model: CountedModel, uncached: dict[tuple[int, ...], list[int]]
) -> None:
    coming: list[Command] = [Cancel("first"), request("again"), request("other", OTHER)]
    outcomes, num_rows = run(model, {2: coming}, {"again", "other"})
    assert outcomes["again"].tokens == uncached[PROMPT]
    assert outcomes["other"].tokens == uncached[OTHER]
    assert num_rows <= 320 + 64 + 320 + 2 * 3


def test_when_the_reader_of_a_long_prompt_leaves_another_takes_over(
    model: CountedModel, uncached: dict[tuple[int, ...], list[int]]
) -> None:
    """Parts of 64 rows: the first leaves in the middle, and nothing is read twice but the part under way."""
    events: dict[int, list[Command]] = {2: [request("second")], 12: [Cancel("first")]}
    outcomes, num_rows = run(model, events, {"second"}, rows=64)
    assert outcomes["second"].tokens == uncached[PROMPT]
    assert num_rows <= 320 + 2 * 64 + 3


def test_prompts_that_part_share_what_they_have_in_common(
    model: CountedModel, uncached: dict[tuple[int, ...], list[int]]
) -> None:
    parting = (*PROMPT[:200], *OTHER[:50])
    alone = ask(model, None, parting, 4).tokens
    outcomes, num_rows = run(model, {2: [request("second", parting)]}, {"first", "second"})
    assert outcomes["second"].tokens == alone
    assert outcomes["second"].usage.num_cached_tokens == 192
    assert num_rows == 320 + (250 - 192) + 2 * 3


def test_a_prompt_that_shares_nothing_does_not_wait(
    model: CountedModel, uncached: dict[tuple[int, ...], list[int]]
) -> None:
    outcomes, num_rows = run(model, {2: [request("second", OTHER)]}, {"first", "second"})
    assert outcomes["second"].tokens == uncached[OTHER]
    assert outcomes["second"].usage.num_cached_tokens == 0
    assert num_rows == 640 + 2 * 3


def test_a_prompt_that_gave_its_place_away_before_it_was_read_does_not_wait_for_itself(
    model: CountedModel, uncached: dict[tuple[int, ...], list[int]]
) -> None:
    """One more token of the talk, while the long prompt is read, and there is no room for the last one."""
    talk = Generate("talk", tuple(tokens(CONFIG, 40, seed=5)), 280, GREEDY)
    long, late, count = Generate("long", (*OTHER, *OTHER), 2, GREEDY), request("late"), 260
    room = (40 + count + 1) + (640 + 2 + 1) + (320 + 4 + 1)
    limits = Limits(pass_rows=640, kv_tokens=room)

    def react(served: Served, event: Token | Finished) -> list[Generate]:
        is_time = isinstance(event, Token) and len(served.tokens["talk"]) == count and not served.usage
        return [long, late] if is_time and event.request_id == "talk" else []

    def look(served: Served) -> list[Generate]:
        assert len(served.beats) < 20_000, "nobody goes on"
        return []

    backend = Backend(model, ModelInfo(CONFIG["vocab_size"], 2000), limits=limits)
    served = drive(backend, [talk], react, prefixes=SavedPrefixes(open_prefix()), on_beat=look)
    assert served.tokens["late"] == uncached[PROMPT]

"""Who runs with whom: decode in flat batches, prompts that share a pass, steps between its layers."""

import math
from itertools import pairwise

import pytest

from server.engine.schedule.limits import Limits
from server.link.messages import Cancel, Event, Failed, Finished, Progress, Started, Token
from tests.grids import few
from tests.server.engine.driven import TimedModel, World, answer, ask, longest_gap

STEP_S = 0.1  # ten layers


def row_cost(rows: int) -> float:
    """A layer of a decode step takes 10 ms whatever its width; a row of a prompt 1 ms."""
    return 0.01 if rows <= 8 else 0.001 * rows


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def model(world: World) -> TimedModel:
    return TimedModel(world=world, cost=row_cost)


def test_answers_of_different_lengths_share_steps_and_whoever_is_done_leaves(
    world: World, model: TimedModel
) -> None:
    lengths = {"a": 3, "b": 5, "c": 9}
    world.at(0, *(ask(name, 20, n) for name, n in lengths.items()))
    world.run(model)
    assert model.forwards == [60, *[3] * 2, *[2] * 2, *[1] * 4]
    for name, n in lengths.items():
        assert world.tokens_of(name) == answer(20, n)


def test_a_newcomer_joins_the_batch_that_is_running(world: World, model: TimedModel) -> None:
    world.at(0, ask("a", 20, 30))
    world.at(1, ask("b", 12, 4))
    world.run(model)
    assert 2 in model.forwards
    assert world.tokens_of("a") == answer(20, 30)
    assert world.tokens_of("b") == answer(12, 4)


def test_prompts_that_wait_board_one_pass_up_to_its_rows(world: World, model: TimedModel) -> None:
    world.at(0, *(ask(name, 40, 1) for name in "abcde"))
    world.run(model, limits=Limits(pass_rows=100))
    assert model.forwards == [100, 100], "two and a half prompts each"
    assert all(world.tokens_of(name) == answer(40, 1) for name in "abcde")


def test_a_long_prompt_is_read_in_parts(world: World, model: TimedModel) -> None:
    world.at(0, ask("a", 250, 2))
    world.run(model, limits=Limits(pass_rows=100))
    assert model.forwards == [100, 100, 50, 1]
    progress = [event.num_prefilled for _, event in world.events if isinstance(event, Progress)]
    assert progress == [100, 200, 250]


def test_prompts_that_come_in_the_first_layers_make_the_pass_start_again_with_all(
    world: World, model: TimedModel
) -> None:
    model.num_layers = 30
    world.at(0, ask("first", 100, 1))  # after it the number of layers is known
    world.at(100, ask("a", 100, 1))
    world.at(100.15, ask("b", 100, 1))  # in the second of 30 layers
    world.at(103, ask("c", 100, 1))  # too late
    world.run(model)
    assert model.forwards == [100, 100, 200, 100]
    assert world.tokens_of("a") == world.tokens_of("b") == answer(100, 1)


def test_a_flood_of_prompts_does_not_make_a_pass_start_again_for_ever(
    world: World, model: TimedModel
) -> None:
    model.num_layers = 30
    world.at(0, ask("first", 100, 1))
    world.at(100, *(ask(f"a{i}", 100, 1) for i in range(2)))
    for i in range(20):
        world.at(100.01 + 0.25 * i, ask(f"b{i}", 9, 1))
    world.run(model, limits=Limits(pass_rows=1000))
    assert sum(rows >= 200 for rows in model.forwards) <= 4, "three layers are lost, no more"


@pytest.mark.parametrize(("rows", "length"), few([(20, 400), (400, 16_000), (2000, 16_000)], [400]))
def test_steps_run_between_the_layers_of_a_pass(
    world: World, model: TimedModel, rows: int, length: int
) -> None:
    """The issue's bounds: gap <= 3 steps + a layer, rate >= 0.3, and the newcomer waits <= 1.6 x alone."""
    agents = [f"agent{i}" for i in range(4)]
    world.at(0, *(ask(name, 20, 250 + length // 20) for name in agents))
    world.at(10, ask("long", length, 1))
    world.run(model, limits=Limits(pass_rows=rows, kv_tokens=100_000))
    layer_s, alone_s = row_cost(rows), length * 0.001 * 10
    [end_s] = world.times_of("long")
    for name in agents:
        times = [time_s for time_s in world.times_of(name) if 9 < time_s < end_s]
        assert longest_gap(times) <= 3 * STEP_S + layer_s + 1e-9
        assert len(times) / (end_s - 10) >= 0.3 * (1 / STEP_S) * 0.99
    assert end_s - 10 <= 1.6 * alone_s


def test_steps_run_amid_the_layers_of_a_pass(world: World, model: TimedModel) -> None:
    """A layer of 16k rows takes 16 s here: nobody waits for more than a part of it."""
    model.num_parts = 20
    world.at(0, ask("a", 20, 3000))
    world.at(10, ask("long", 16_000, 1))
    world.run(model, limits=Limits(pass_rows=16_000, kv_tokens=100_000))
    [end_s] = world.times_of("long")
    times = [time_s for time_s in world.times_of("a") if 9 < time_s < end_s]
    assert longest_gap(times) <= 3 * STEP_S + row_cost(16_000) / 20 + 1e-9
    assert len(times) / (end_s - 10) >= 0.3 / STEP_S * 0.99
    assert end_s - 10 <= 1.6 * 160


def test_passes_change_places_between_layers_only(world: World, model: TimedModel) -> None:
    """Amid a layer the experts on their way are those that this pass will want."""
    model.num_parts = 5
    world.at(0, ask("long", 16_000, 1), ask("other", 600, 2))
    world.at(21, ask("short", 200, 1))
    world.run(model, limits=Limits(pass_rows=16_600, kv_tokens=100_000))
    large = [(rows, pause) for rows, pause in model.parts if rows > 8]
    changes = [(a, b) for a, b in pairwise(large) if a[0] != b[0]]
    assert len(changes) == 2, "the short one goes between"
    assert all(pause is not None for (_, pause), _ in changes)


@pytest.mark.parametrize(("slower", "rate"), [(1.2, 0.3), (5, 0.3 * 1.25 / 5)])
def test_steps_that_a_pass_slows_down_keep_their_rate_but_not_at_any_price(
    world: World, model: TimedModel, slower: float, rate: float
) -> None:
    def cost(rows: int) -> float:
        return row_cost(rows) * (slower if rows <= 8 and world.now_s > 10.2 else 1)

    model.cost = cost
    world.at(0, ask("a", 20, 500))
    world.at(10, ask("long", 2000, 1))
    world.run(model, limits=Limits(pass_rows=400))
    [end_s] = world.times_of("long")
    times = [time_s for time_s in world.times_of("a") if 10 < time_s < end_s]
    assert len(times) * STEP_S / (end_s - 10) >= rate * 0.97
    assert end_s - 10 <= 1.6 * 20 + 2 * slower * STEP_S


@pytest.mark.parametrize("share", few([0.1, 0.5, 0.9], [0.5]))
def test_the_share_of_decode_is_what_was_asked_for(world: World, model: TimedModel, share: float) -> None:
    world.at(0, ask("a", 20, 1100))
    world.at(10, ask("long", 1000, 1))
    world.run(model, limits=Limits(pass_rows=100, decode_share=share))
    [end_s] = world.times_of("long")
    times = [time_s for time_s in world.times_of("a") if 10 < time_s < end_s]
    used = len(times) * STEP_S / (end_s - 10)
    assert share - 1e-9 <= used <= share + 0.05, "also at the end, not on the way only"
    layer_s = row_cost(100)
    assert longest_gap(times) <= math.floor(1 / share) * STEP_S + layer_s + 1e-9


def test_a_short_prompt_is_read_amid_a_step_and_many_leave_steps_their_share(
    world: World, model: TimedModel
) -> None:
    world.at(0, ask("a", 20, 60))
    world.at(1.05, ask("b", 5, 1))
    for i in range(20):
        world.at(2.05 + 0.1 * i, ask(f"c{i}", 5, 1))
    world.run(model)
    layer_s, own_s = row_cost(1), 10 * row_cost(5)
    assert world.times_of("b")[0] - 1.05 <= own_s + layer_s + 1e-9, "it waits for a layer, not for a step"
    times = world.times_of("a")
    assert longest_gap(times) <= 3 * STEP_S + layer_s + 1e-9
    assert len([time_s for time_s in times if 2.05 < time_s < 4.05]) * STEP_S >= 0.3 * 2 - STEP_S


def test_a_short_prompt_overtakes_a_long_one_between_its_layers(world: World, model: TimedModel) -> None:
    """200 tokens behind 16k: a layer of the long pass, twice its own time, and a layer more."""
    world.at(0, ask("long", 16_000, 1, agent="same"))
    world.at(3, ask("short", 200, 1, agent="same"))
    world.run(model, limits=Limits(pass_rows=16_384, kv_tokens=100_000))
    own_s, layer_s = 10 * row_cost(200), row_cost(16_000)
    [first_s] = world.times_of("short")
    assert first_s - 3 <= 2 * own_s + 2 * layer_s
    [end_s] = world.times_of("long")
    assert end_s == pytest.approx(160 + own_s), "the long one loses what the short one took, and no more"


@pytest.mark.parametrize("behind_s", [0, 0.5, 3])
@pytest.mark.parametrize("pass_rows", [16_384, 40_000])
def test_a_tiny_prompt_needs_no_more_where_the_pass_has_room_for_it(
    world: World, model: TimedModel, behind_s: float, pass_rows: int
) -> None:
    """Reading the experts once more takes less time than computing the whole of a long pass."""
    model.num_parts = 5
    world.at(0, ask("first", 30, 1))  # the loop knows how many layers there are
    world.at(10, ask("long", 16_000, 1))
    world.at(10 + behind_s, ask("short", 200, 1))
    world.run(model, limits=Limits(pass_rows=pass_rows, kv_tokens=100_000))
    own_s, layer_s = 10 * row_cost(200), row_cost(16_000)
    assert world.times_of("short")[0] - 10 - behind_s <= 2 * own_s + 2 * layer_s
    assert world.times_of("long")[0] == pytest.approx(170 + own_s)


def test_a_short_prompt_behind_a_long_one_in_parts_is_in_its_next_part(
    world: World, model: TimedModel
) -> None:
    world.at(0, ask("long", 1600, 1, agent="same"))
    world.at(0.5, ask("short", 20, 1, agent="same"))
    world.run(model, limits=Limits(pass_rows=160))
    [first_s] = world.times_of("short")
    assert first_s <= 2 * 1.6 + 1e-9, "within two parts of the long one"


def test_a_short_prompt_that_waits_with_a_long_one_needs_no_pass_of_its_own(
    world: World, model: TimedModel
) -> None:
    """Where experts are read from disk, a pass of its own would read them all once more."""
    world.at(0, ask("long", 1600, 1, agent="same"), ask("short", 20, 1, agent="same"))
    world.run(model, limits=Limits(pass_rows=160))
    assert model.forwards == [160] * 10 + [20]
    assert world.times_of("short")[0] == pytest.approx(1.6)


def test_short_prompts_for_ever_do_not_stop_a_long_one(world: World, model: TimedModel) -> None:
    world.at(0, ask("long", 4000, 1))
    for i in range(60):
        world.at(1.5 * i, ask(f"short{i}", 200, 1))
    world.run(model, limits=Limits(pass_rows=4096, kv_tokens=100_000))
    assert world.times_of("long")[0] <= 2.5 * 40


def test_a_tiny_prompt_is_read_amid_a_layer_of_a_long_one(world: World, model: TimedModel) -> None:
    model.num_parts = 5
    world.at(0, ask("long", 16_000, 1))
    world.at(20, ask("tiny", 20, 1))
    world.run(model, limits=Limits(pass_rows=16_384, kv_tokens=100_000))
    own_s, part_s = 10 * row_cost(20), row_cost(16_000) / 5
    assert world.times_of("tiny")[0] - 20 <= own_s + part_s + 1e-9


def test_tiny_prompts_for_ever_leave_a_long_one_half_of_the_time(world: World, model: TimedModel) -> None:
    model.num_parts = 50
    world.at(0, ask("long", 1000, 1))
    for i in range(200):
        world.at(1.5 + 0.21 * i, ask(f"tiny{i}", 20, 1))
    world.run(model, limits=Limits(pass_rows=4096, kv_tokens=100_000))
    assert world.times_of("long")[0] <= 2.2 * 10


def test_a_sequence_whose_kv_does_not_fit_now_waits_and_then_runs(world: World, model: TimedModel) -> None:
    world.at(0, ask("a", 60, 20), ask("b", 60, 20))
    world.run(model, limits=Limits(kv_tokens=100))
    assert world.times_of("b", Started)[0] >= world.finished_s("a")
    assert world.tokens_of("b") == answer(60, 20)


def test_a_kv_that_never_fits_is_refused_with_the_numbers(world: World, model: TimedModel) -> None:
    world.at(0, ask("a", 90, 20))
    world.run(model, limits=Limits(kv_tokens=100))
    assert [event for _, event in world.events] == [
        Failed("a", "request", "110 tokens do not fit a context of 100")
    ]
    assert model.forwards == []


def test_what_outgrows_the_kv_waits_and_goes_on_with_the_same_text(world: World, model: TimedModel) -> None:
    world.at(0, ask("a", 300, 600), ask("b", 300, 600))
    world.run(model, limits=Limits(kv_tokens=1300))
    assert len(world.times_of("b", Started)) == 2, "it lost its place once"
    for name in "ab":
        assert world.tokens_of(name) == answer(300, 600)


def test_more_than_the_width_take_turns(world: World, model: TimedModel) -> None:
    world.at(0, *(ask(name, 20, 40) for name in "abcdef"))
    world.run(model, limits=Limits(batch_width=2))
    assert set(model.forwards[1:]) <= {1, 2}
    ends = [world.finished_s(name) for name in "abcdef"]
    assert max(ends) - min(ends) <= 0.3 * max(ends), "they end close together"
    assert all(world.tokens_of(name) == answer(20, 40) for name in "abcdef")


def test_a_step_that_fails_is_taken_apart(world: World, model: TimedModel) -> None:
    """The counting model fails at token 15, which only one of them comes to."""
    model.fails_at_token = 15
    world.at(0, ask("a", 5, 6), ask("b", 10, 9), ask("c", 3, 8))
    world.run(model)
    assert world.tokens_of("a") == answer(5, 6)
    assert world.tokens_of("c") == answer(3, 8)
    assert world.tokens_of("b") == [10, 11, 12, 13, 14, 15]
    failed = [event for _, event in world.events if isinstance(event, Failed)]
    assert failed == [Failed("b", "engine", "token 15 cannot be read")]


def test_a_pass_that_fails_is_taken_apart(world: World, model: TimedModel) -> None:
    model.fails_at_token = 15
    world.at(0, ask("a", 5, 2), ask("b", 20, 2), ask("c", 3, 2))
    world.run(model)
    assert world.tokens_of("a") == answer(5, 2)
    assert world.tokens_of("c") == answer(3, 2)
    assert [event.request_id for _, event in world.events if isinstance(event, Failed)] == ["b"]


def test_one_that_leaves_a_shared_pass_harms_nobody(world: World, model: TimedModel) -> None:
    world.at(0, ask("a", 40, 3), ask("b", 40, 3))
    world.at(0.2, Cancel("a"))
    world.run(model)
    assert world.tokens_of("a") == []
    assert not world.times_of("a", Finished)
    assert world.tokens_of("b") == answer(40, 3)


def test_the_place_of_one_that_leaves_in_decode_is_free_in_the_next_step(
    world: World, model: TimedModel
) -> None:
    world.at(0, ask("a", 60, 30), ask("b", 60, 30))
    left_s: list[float] = []

    def on_event(event: Event) -> None:
        if isinstance(event, Token) and event.request_id == "a" and not left_s:
            left_s.append(world.now_s)
            world.at(world.now_s, Cancel("a"))

    world.on_event = on_event
    world.run(model, limits=Limits(kv_tokens=100))
    assert world.times_of("b", Started)[0] - left_s[0] <= STEP_S

"""Agents share the engine by time, whatever the number of their requests, and none waits for ever."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from server.engine.schedule.fairness import AGING_S
from server.engine.schedule.limits import Limits
from server.link.messages import Event, Finished, Queued, Started
from tests.server.engine.driven import TimedModel, World, ask

STEP_S = 0.1


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def model(world: World) -> TimedModel:
    """A decode step takes 0.1 s, a prompt's row 10 ms."""
    return TimedModel(world=world, cost=lambda rows: 0.01 if rows <= 8 else 0.001 * rows)


def test_seven_agents_behind_one_with_fifty_requests(world: World, model: TimedModel) -> None:
    """The bound: the two prompts that have begun, all first requests, one more pair, stretched by decode."""
    world.at(0, *(ask(f"hog{i}", 100, 20, agent="hog") for i in range(50)))
    world.at(0.5, *(ask(f"small{i}", 100, 20) for i in range(7)))
    world.run(model, limits=Limits(agent_inflight=2))
    bound_s = 1.6 * (2 * 1.0 + (7 + 2) * 1.0) + STEP_S
    for i in range(7):
        assert world.times_of(f"small{i}")[0] - 0.5 <= bound_s
    assert len(world.times_of("hog49", Finished)) == 1


def test_an_agent_has_no_more_in_flight_than_it_may(world: World, model: TimedModel) -> None:
    in_flight: Counter[str] = Counter()
    most: Counter[str] = Counter()

    def on_event(event: Event) -> None:
        if isinstance(event, Started | Finished):
            agent = event.request_id[0]
            in_flight[agent] += 1 if isinstance(event, Started) else -1
            most[agent] = max(most[agent], in_flight[agent])

    world.on_event = on_event
    world.at(0, *(ask(f"a{i}", 30, 5, agent="a") for i in range(9)))
    world.at(0, *(ask(f"b{i}", 30, 5, agent="b") for i in range(2)))
    world.run(model, limits=Limits(agent_inflight=3))
    assert most == {"a": 3, "b": 2}


def test_who_waits_is_told_its_place_in_the_order_of_turns(world: World, model: TimedModel) -> None:
    """There is room for one at a time; an agent has asked four times before another comes."""
    world.at(0, *(ask(f"a{i}", 30, 5, agent="a") for i in range(4)), ask("b", 30, 5, agent="b"))
    world.run(model, limits=Limits(kv_tokens=40))
    told: dict[str, list[int]] = {}
    for _, event in world.events:
        if isinstance(event, Queued):
            told.setdefault(event.request_id, []).append(event.num_before)
    assert told.pop("b")[0] <= 1, "it came last, and is not the last"
    assert all(places[-1] == 0 for places in told.values()), told
    assert all(one != other for places in told.values() for one, other in pairwise(places)), "only changes"


def test_the_measure_is_time_and_not_requests(world: World, model: TimedModel) -> None:
    """One asks for prompts of 1000 tokens, the other of 100, and there is room for one at a time."""
    world.at(0, *(ask(f"long{i}", 1000, 1, agent="long") for i in range(30)))
    world.at(0, *(ask(f"short{i}", 100, 1, agent="short") for i in range(300)))
    world.run(model, limits=Limits(kv_tokens=1100, agent_inflight=1))
    in_time = [
        event.request_id for time_s, event in world.events if isinstance(event, Finished) and time_s < 200
    ]
    num_long = sum(name.startswith("long") for name in in_time)
    share = num_long * 10 / (num_long * 10 + (len(in_time) - num_long))
    assert 0.4 < share < 0.6


def test_time_that_was_not_asked_for_is_not_saved_up(world: World, model: TimedModel) -> None:
    world.at(0, ask("early", 100, 1, agent="idle"))
    world.at(0, *(ask(f"busy{i}", 100, 1, agent="busy") for i in range(150)))
    world.at(100, *(ask(f"idle{i}", 100, 1, agent="idle") for i in range(40)))
    world.run(model, limits=Limits(pass_rows=100, agent_inflight=1))
    later = [e.request_id for t, e in world.events if isinstance(e, Finished) and 101 < t < 131]
    assert 12 <= sum(name.startswith("busy") for name in later) <= 18, "half of the time since the other came"


def test_interactive_goes_before_background(world: World, model: TimedModel) -> None:
    world.at(0, ask("first", 100, 1))
    world.at(0.5, replace(ask("later", 100, 1), priority="background"), ask("now", 100, 1))
    world.run(model, limits=Limits(kv_tokens=110))
    assert world.finished_s("now") < world.finished_s("later")


@pytest.mark.parametrize("agent", ["", "fleet"])
def test_background_is_not_put_off_for_ever(world: World, model: TimedModel, agent: str) -> None:
    """Room for one at a time, and somebody new each second: a second is what each takes.

    Whether all are agents of their own or one that always has something that runs.
    """
    for i in range(100):
        world.at(0.9 * i, ask(f"agent{i}", 100, 1, agent))
    world.at(1, replace(ask("background", 100, 1, agent), priority="background"))
    world.run(model, limits=Limits(kv_tokens=110))
    waited_s = world.times_of("background", Started)[0] - 1
    assert AGING_S <= waited_s <= AGING_S + 2 * 1.1


def test_small_ones_do_not_overtake_a_large_one_for_ever(world: World, model: TimedModel) -> None:
    """The large one needs nearly all of the KV; whoever came later waits for it once it has aged."""
    for i in range(120):
        world.at(0.7 * i, ask(f"small{i}", 100, 5))
    world.at(2, ask("large", 800, 5))
    world.run(model, limits=Limits(kv_tokens=1000))
    waited_s = world.times_of("large", Started)[0] - 2
    assert waited_s <= AGING_S + 10
    assert waited_s >= AGING_S / 2, "the test means nothing where it need not wait"


def test_small_ones_of_the_same_agent_do_not_overtake_a_large_one_for_ever(
    world: World, model: TimedModel
) -> None:
    """A fleet without sessions is one agent, which always has something that runs."""
    for i in range(120):
        world.at(0.7 * i, ask(f"small{i}", 100, 5, agent="fleet"))
    world.at(2, ask("large", 800, 5, agent="fleet"))
    world.run(model, limits=Limits(kv_tokens=1000))
    assert world.times_of("large", Started)[0] - 2 <= AGING_S + 10


def test_who_found_no_room_in_a_pass_does_not_make_it_start_again(world: World) -> None:
    """The tiny one takes two rows, and leaves them when it turns out to be tiny beside the long one.

    So the pass seems to have room, which nobody gets: it would start again for ever, within its first layer.
    """

    def cost(rows: int) -> float:
        assert world.now_s < 100, "it starts again and again"
        return 0.001 * rows

    model = TimedModel(world=world, cost=cost, num_parts=3)
    world.at(0, ask("first", 100, 1))
    world.at(5, ask("long", 171, 1), ask("tiny", 2, 1), ask("short", 18, 1), ask("last", 329, 1))
    world.run(model, limits=Limits(pass_rows=130))
    assert world.finished_s("last") < 20


@pytest.mark.parametrize("num_agents", [3, 9])
def test_agents_with_equal_wishes_end_together(world: World, model: TimedModel, num_agents: int) -> None:
    for i in range(num_agents):
        world.at(0, *(ask(f"{i}-{j}", 50, 30, agent=str(i)) for j in range(4)))
    world.run(model, limits=Limits(batch_width=2))
    ends = [max(world.finished_s(f"{i}-{j}") for j in range(4)) for i in range(num_agents)]
    assert max(ends) - min(ends) <= 0.2 * max(ends)

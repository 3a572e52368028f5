"""Banks that follow the memory there is: they shrink, nobody fails, no bit changes, and they grow back."""

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import mlx.core as mx
import pytest

from server.engine.decode.constraint import Constraint
from server.engine.decode.sampling import start_sampling
from server.engine.memory.governor import LONGEST_PAUSE_S, PAUSE_S, Governor, Ungoverned
from server.engine.schedule import sequence
from server.engine.schedule.passes import Pass
from server.engine.schedule.sequence import PassPart
from server.link.messages import (
    Event,
    Failed,
    Finished,
    Generate,
    Replan,
    Replanned,
    Shutdown,
    Token,
    TokenScore,
)
from tests.grids import few
from tests.memory import start_measuring
from tests.server.engine.driven import World
from tests.server.engine.memory.governed import Governed, K, Machine, open_governed, save, serve
from tests.server.engine.test_loop_on_glm import PROMPTS, SAMPLINGS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("governed"))


@pytest.fixture(params=[True, False], ids=["in place", "staged"])
def governed(folder: Path, request: pytest.FixtureRequest) -> Iterator[Governed]:
    opened = open_governed(folder, in_place=request.param)
    with closing(opened.store):
        yield opened


@pytest.fixture
def machine(folder: Path) -> Iterator[Machine]:
    opened = open_governed(folder)
    with closing(opened.store):
        yield Machine(opened, World())


def busy_world(end_s: float, *more: tuple[float, Replan]) -> World:
    """Eight agents who come while others decode, or read."""
    world = World(arrivals=list(more))
    for number, (name, prompt) in enumerate(PROMPTS.items()):
        ask = Generate(name, prompt, 12, SAMPLINGS[name], num_top_logprobs=2, agent=name)
        world.at(20.0 * number, ask)
    world.at(end_s, Shutdown())
    return world


def answers(world: World) -> dict[str, list[TokenScore]]:
    assert not [event for _, event in world.events if isinstance(event, Failed)]
    assert sum(isinstance(event, Finished) for _, event in world.events) == len(PROMPTS)
    tokens = [event for _, event in world.events if isinstance(event, Token)]
    return {name: [event.score for event in tokens if event.request_id == name] for name in PROMPTS}


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, list[TokenScore]]:
    """What is answered where nothing ever moves."""
    world, opened = busy_world(1000), open_governed(folder)
    with closing(opened.store):
        serve(opened, world)
    return answers(world)


def rest(governor: Governor, machine: Machine, seconds: int) -> list[int]:
    """So long nothing but looks, one in a second; the slots there were after each."""
    slots = []
    for _ in range(seconds):
        while governor.govern():
            pass
        machine.world.now_s += 1.0
        slots.append(machine.governed.store.total_slots)
    return slots


def settle(governor: Governor) -> None:
    """Until all banks are where they shall be."""
    while governor.govern() or governor.pause_s == 0:
        pass


@pytest.mark.slow
def test_under_pressure_banks_shrink_nobody_fails_no_bit_changes_and_they_recover(
    governed: Governed, expected: dict[str, list[TokenScore]]
) -> None:
    world = busy_world(3000)
    machine = Machine(governed, world, lambda now_s: 1.0 if 30 < now_s < 150 else 0.0)
    governor, slots = governed.govern(machine), []
    planned = governed.store.total_slots
    serve(governed, world, governor, lambda: slots.append(governed.store.total_slots))
    assert answers(world) == expected
    assert min(slots) < planned / 2, "the neighbour got what it wanted"
    assert governed.store.total_slots == planned, "and what it gave back was taken again"
    assert governor.measure()["shrinks"] >= 1
    finished = [time_s for time_s, event in world.events if isinstance(event, Finished)]
    assert sum(30 < time_s < 150 for time_s in finished) >= 2, "the test means nothing where nobody worked"


def test_a_neighbour_that_wants_everything_leaves_what_a_token_needs(
    machine: Machine, expected: dict[str, list[TokenScore]]
) -> None:
    machine.world, machine.neighbour = busy_world(1000), lambda now_s: 5.0
    governed = machine.governed
    governor = governed.govern(machine)
    serve(governed, machine.world, governor)
    assert {governed.store.num_slots(layer) for layer in governed.store.layers} == {K}
    assert answers(machine.world) == expected


def test_every_layer_gives_up_the_same_share_in_one_go(machine: Machine) -> None:
    governed = machine.governed
    governor = governed.govern(machine)
    before = {layer: governed.store.num_slots(layer) for layer in governed.store.layers}
    machine.neighbour = lambda now_s: 0.5
    num_moves = 1
    while governor.govern():
        num_moves += 1
    assert num_moves == len(before), "no step comes between"
    after = {layer: governed.store.num_slots(layer) for layer in governed.store.layers}
    assert max(after.values()) - min(after.values()) <= max(before.values()) - min(before.values())
    assert max(after.values()) < min(before.values())


@pytest.mark.parametrize("num_layers", few([7, 9, 10], [9]))
@pytest.mark.parametrize("in_place", [True, False])
def test_what_banks_give_up_goes_back_while_a_pass_is_paused(
    folder: Path, in_place: bool, num_layers: int
) -> None:
    """A pass over few rows is lazy: its last products, with more experts than slots, would hold a bank."""
    governed = open_governed(folder, more_slots=4, in_place=in_place)
    machine = Machine(governed, World())
    governor = governed.govern(machine)
    rows = run_paused(governed, num_layers, lambda: None)
    fell: list[tuple[int, int]] = []

    def press() -> None:
        machine.neighbour = lambda now_s: 1.0
        machine.world.now_s += 1
        before, bytes_before = start_measuring(), governed.store.slot_bytes
        settle(governor)
        fell.append((before - mx.get_active_memory(), bytes_before - governed.store.slot_bytes))

    assert mx.array_equal(run_paused(governed, num_layers, press), rows)
    [(active, banks)] = fell
    assert banks >= governed.plan.lines["experts"] / 8
    assert active > 0.95 * banks
    governed.store.check_integrity()
    governed.store.close()


def run_paused(governed: Governed, num_layers: int, at_pause: Callable[[], object]) -> mx.array:
    """Hidden rows of a short prompt, with something happening in the middle of its layers."""
    model, prompt = governed.model, PROMPTS["agent3"][:8]
    request = Generate("a", prompt, 5)
    sampler = start_sampling(request.sampling, prompt, 64)
    reader = sequence.Sequence(request, sampler, Constraint(request, None), cache=model.make_cache())
    one = Pass(model, [PassPart(reader, len(prompt))])
    while (hidden := one.advance()) is None:
        if one.num_layers_done == num_layers:
            at_pause()
    mx.eval(hidden)
    return hidden


def test_banks_do_not_swing(machine: Machine) -> None:
    """A neighbour who stays: they shrink, find their size, and keep it."""
    governor = machine.governed.govern(machine)
    rest(governor, machine, 100)
    machine.neighbour = lambda now_s: 0.6
    slots = rest(governor, machine, 5000)
    assert len(set(slots[1000:])) == 1
    assert slots[-1] < sum(machine.governed.plan.slots_per_layer)
    assert 1 <= governor.measure()["shrinks"] <= 2


def test_who_comes_and_goes_in_a_rhythm_is_given_way_to_more_and_more_patiently(machine: Machine) -> None:
    """A neighbour for a minute in every two: its memory is asked back ever more seldom."""
    governor = machine.governed.govern(machine)
    machine.neighbour = lambda now_s: 1.0 if now_s % 120 < 60 else 0.0
    rest(governor, machine, 7200)
    early = governor.measure()["shrinks"]
    rest(governor, machine, 7200)
    late = governor.measure()["shrinks"] - early
    assert late <= 7200 / LONGEST_PAUSE_S
    assert 4 <= early <= 16, "some before it is known, and not one for each time"
    machine.neighbour = lambda now_s: 0.0
    assert rest(governor, machine, 7200)[-1] == sum(machine.governed.plan.slots_per_layer)


def test_banks_grow_only_after_a_pause_and_part_by_part(machine: Machine) -> None:
    governor = machine.governed.govern(machine)
    planned = machine.governed.store.total_slots
    machine.neighbour = lambda now_s: 1.0
    small = rest(governor, machine, 10)[-1]
    machine.neighbour = lambda now_s: 0.0
    slots = rest(governor, machine, int(PAUSE_S) - 2)
    assert set(slots) == {small}
    slots = rest(governor, machine, int(9 * PAUSE_S))
    assert slots == sorted(slots)
    assert slots[-1] == planned
    sizes = sorted(set(slots))
    per_growth = planned / 8 + len(machine.governed.store.layers)
    assert slots[int(PAUSE_S) - 5] - small <= per_growth, "an eighth in a pause"
    assert len(sizes) > 4


def test_a_bank_for_which_there_is_no_memory_keeps_its_size_and_nothing_fails(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = machine.governed.store
    governor = machine.governed.govern(machine)
    machine.neighbour = lambda now_s: 1.0
    small = rest(governor, machine, 10)[-1]
    machine.neighbour = lambda now_s: 0.0

    def refuse(layer: int, num_slots: int) -> None:
        raise RuntimeError("[malloc] Unable to allocate")

    with monkeypatch.context() as patch:
        patch.setattr(store, "resize", refuse)
        assert set(rest(governor, machine, 300)) == {small}
    assert governor.pause_s == 1.0, "it does not try again and again"
    assert rest(governor, machine, 1000)[-1] == sum(machine.governed.plan.slots_per_layer)


def test_another_budget_and_policy_under_way_change_no_bit(
    machine: Machine, expected: dict[str, list[TokenScore]]
) -> None:
    governed = machine.governed
    budget = governed.plan.budget_bytes
    machine.world = busy_world(
        1000,
        (33.3, Replan("less", budget - 8 * governed.per_slot, "lru")),
        (77.7, Replan("more", budget + 3 * governed.per_slot)),
        (100.0, Replan("auto", None, "auto")),
        (111.1, Replan("back", None, "nearness")),
    )
    governor = governed.govern(machine)
    slots: dict[str, int] = {}
    watching: dict[str, set[bool]] = {}
    told: dict[str, object] = {}
    made: dict[str, object] = {}

    def note(event: Event) -> None:
        if isinstance(event, Replanned):
            plan = governor.plan
            told[event.request_id] = (event.plan["slots_per_layer"], event.ram_budget_bytes)
            made[event.request_id] = (list(plan.slots_per_layer), plan.budget_bytes)
            slots[event.request_id] = sum(plan.slots_per_layer)
            books = [state.books for state in governed.store._layers.values()]
            watching[event.request_id] = {one.watches_scores for one in books}

    machine.world.on_event = note
    seen: list[int] = []
    serve(governed, machine.world, governor, lambda: seen.append(governed.store.total_slots))
    assert answers(machine.world) == expected
    assert told == made
    assert slots["less"] < sum(governed.plan.slots_per_layer) < slots["more"] == slots["back"]
    assert slots["less"] in seen
    assert watching == {"less": {False}, "more": {False}, "auto": {True}, "back": {True}}, (
        "lru needs no scores"
    )
    assert governed.store.total_slots == slots["more"]
    assert governor.measure()["policy.nearness"] == 1.0


def test_what_needs_a_restart_is_refused_with_the_numbers_and_changes_nothing(machine: Machine) -> None:
    governed = machine.governed
    governor = governed.govern(machine)
    for budget, words in (
        (governed.plan.minimum_budget_bytes - 1, "is too small.*it needs .*M; started again"),
        (2 * 10**15, "above the memory of this machine"),
    ):
        answer = governor.replan(Replan("a", budget, "lru"))
        assert isinstance(answer, Failed)
        assert answer.kind == "request"
        assert re.search(words, answer.message)
    assert governor.plan == governed.plan
    assert governor.measure()["policy.nearness"] == 1.0, "nothing of a refused command is done"
    answer = Ungoverned().replan(Replan("a", 10**9))
    assert "needs a restart" in answer.message


def test_a_larger_budget_takes_no_more_than_there_is(machine: Machine) -> None:
    governed = machine.governed
    governor = governed.govern(machine)
    rest(governor, machine, 3)
    before = governed.store.total_slots
    machine.neighbour = lambda now_s: 0.37
    answer = governor.replan(Replan("a", governed.plan.budget_bytes + 10**9))
    assert isinstance(answer, Replanned)
    slots = rest(governor, machine, 300)
    assert set(slots) == {before}
    machine.neighbour = lambda now_s: -1.0
    assert rest(governor, machine, 1000)[-1] == sum(governor.plan.slots_per_layer) > before

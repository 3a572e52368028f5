"""Threads are given to holders in turn, and given back whatever happens."""

import asyncio
import threading
import time

import pytest

from server.api.error_bodies import ClientGone
from server.api.request.turns import Lane, Presence, Sluice, Turns


def spin(seconds: float) -> None:
    time.sleep(seconds)


@pytest.mark.parametrize("crowd", [3, 20, 60])
def test_a_newcomer_waits_for_one_turn_of_a_holder_that_has_many(crowd: int) -> None:
    async def scenario() -> list[str]:
        lane, done = Lane(1, "test"), []

        async def work(holder: str) -> None:
            await lane.run(holder, lambda wanted: spin(0.01))
            done.append(holder)

        flood = [asyncio.ensure_future(work("flood")) for _ in range(crowd)]
        await asyncio.sleep(0.015)
        await work("plain")
        position = len(done)
        await asyncio.gather(*flood)
        return done[:position]

    assert len(asyncio.run(scenario())) <= 4


def test_cost_counts_not_the_number_of_turns() -> None:
    async def scenario() -> list[str]:
        lane, order = Lane(1, "test"), []

        async def work(holder: str, seconds: float) -> None:
            await lane.run(holder, lambda wanted: spin(seconds))
            order.append(holder)

        works = [work("costly", 0.4) for _ in range(3)] + [work("cheap", 0.001) for _ in range(12)]
        await asyncio.gather(*works)
        return order

    order = asyncio.run(scenario())
    assert order[1:13] == ["cheap"] * 12


@pytest.mark.parametrize("moment", ["while it waits", "while it works", "at once"])
def test_a_client_that_leaves_gives_its_place_back(moment: str) -> None:
    async def scenario() -> None:
        lane, ended = Lane(1, "test"), threading.Event()

        def work(wanted: Presence) -> None:
            try:
                while True:
                    wanted.check()
                    spin(0.002)
            except ClientGone:
                ended.set()
                raise

        first = asyncio.ensure_future(lane.run("a", work))
        await asyncio.sleep(0.02)
        leaving = first
        if moment != "while it works":
            leaving = asyncio.ensure_future(lane.run("b", work))
            await asyncio.sleep(0 if moment == "at once" else 0.02)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        first.cancel()
        await asyncio.wait([first])
        assert ended.is_set()
        assert await lane.run("c", lambda wanted: 7) == 7

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_what_work_raises_is_raised_and_the_next_has_its_turn() -> None:
    async def scenario() -> None:
        lane = Lane(1, "test")
        for error in (ValueError("a"), KeyError("b"), ClientGone()):

            def fail(wanted: Presence, error: Exception = error) -> None:
                raise error

            with pytest.raises(type(error)):
                await lane.run("a", fail)
        assert await lane.run("a", lambda wanted: 1) == 1

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_time_long_past_is_forgiven() -> None:
    now = 0.0

    async def scenario() -> list[str]:
        nonlocal now
        turns, order = Turns(1, lambda: now), []

        async def use(holder: str, seconds: float) -> None:
            nonlocal now
            async with turns.turn(holder):
                await asyncio.sleep(0)
                now += seconds
                order.append(holder)

        await use("old", 20)
        now += 100
        await asyncio.gather(use("first", 1), use("old", 1), use("new", 1))
        return order[1:]

    assert asyncio.run(scenario()) == ["first", "old", "new"]


@pytest.mark.parametrize(("crowd", "num_at_once"), [(1, 1), (7, 2), (40, 2), (5, 9)])
def test_a_sluice_lets_a_few_through_in_each_round(crowd: int, num_at_once: int) -> None:
    """40 clients that send large bodies would otherwise have a part each in every round of the event loop."""

    async def scenario() -> list[int]:
        sluice, rounds = Sluice(num_at_once), [0]

        async def send() -> None:
            for _ in range(3):
                await sluice.pass_through()
                rounds[-1] += 1

        sending = [asyncio.ensure_future(send()) for _ in range(crowd)]
        sending.pop().cancel() if crowd == 7 else None
        while not all(one.done() for one in sending):
            rounds.append(0)
            await asyncio.sleep(0)
        return rounds

    rounds = asyncio.run(scenario())
    assert max(rounds) <= num_at_once
    assert sum(rounds) == 3 * (crowd - (crowd == 7))


def test_a_sluice_pauses_and_the_first_does_not_wait() -> None:
    async def scenario() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        sluice, began_s = Sluice(2, 0.05), loop.time()
        await sluice.pass_through()
        first_s = loop.time() - began_s
        await asyncio.gather(*(sluice.pass_through() for _ in range(4)))
        return first_s, loop.time() - began_s

    first_s, all_s = asyncio.run(scenario())
    assert first_s < 0.05
    assert all_s >= 0.1


def test_a_place_rests_after_work_and_no_rest_is_longer_than_the_longest() -> None:
    async def scenario() -> list[float]:
        loop, begun = asyncio.get_running_loop(), []
        turns = Turns(1, rest=50.0, max_rest_s=0.1)
        for seconds in (0.001, 0.2, 0.0):
            async with turns.turn("one"):
                begun.append(loop.time())
                await asyncio.sleep(seconds)
        return begun

    first, second, third = asyncio.run(scenario())
    assert second - first >= 0.05
    assert 0.3 <= third - second < 5


def test_a_place_that_rests_is_not_lost_with_its_event_loop() -> None:
    lane = Lane(1, "test", rest=2, max_rest_s=0.1)
    for _ in range(3):
        asyncio.run(asyncio.wait_for(lane.run("one", lambda wanted: spin(0.02)), 3))

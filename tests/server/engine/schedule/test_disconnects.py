"""Clients that leave at random moments: nothing of them stays."""

import asyncio
import gc
import random
import weakref

import pytest

from server.engine.schedule.limits import Limits
from server.link.messages import Cancel, Generate, Sampling
from server.link.supervisor import EngineProcess
from tests.server.engine.driven import TimedModel, World, answer, ask
from tests.server.engine.fakes import FakeCache
from tests.server.link.test_supervisor import collect, engine_of, ready, until


class WatchedModel(TimedModel):
    """Knows which caches somebody still holds."""

    def make_cache(self) -> FakeCache:
        cache = super().make_cache()
        weakref.finalize(cache, self.gone.append, 1)
        self.num_made = getattr(self, "num_made", 0) + 1
        return cache

    @property
    def gone(self) -> list[int]:
        return self.__dict__.setdefault("_gone", [])


@pytest.mark.parametrize(("seed", "num_clients"), [(1, 160), pytest.param(2, 665, marks=pytest.mark.long)])
def test_clients_leave_at_random_moments_and_the_others_get_their_answers(
    seed: int, num_clients: int
) -> None:
    """In line, in a pass of their own or a shared one, in decode, preempted; every fourth stays."""
    rng, world = random.Random(seed), World()
    model = WatchedModel(world=world, num_layers=3)
    staying: dict[str, tuple[int, int]] = {}
    for i in range(num_clients):
        name, at_s = f"r{i}", rng.uniform(0, num_clients / 11)
        length, max_tokens = rng.choice([3, 20, 90, 300]), rng.randint(1, 25)
        world.at(at_s, ask(name, length, max_tokens, agent=f"agent{i % 9}"))
        if i % 4 == 0:
            staying[name] = (length, max_tokens)
        else:
            world.at(at_s + rng.expovariate(0.5), Cancel(name))
    world.run(model, limits=Limits(pass_rows=128, kv_tokens=900, agent_inflight=4))
    for name, (length, max_tokens) in staying.items():
        assert world.tokens_of(name) == answer(length, max_tokens)
    gc.collect()
    assert len(model.gone) == model.num_made, "no cache is held by anybody"


@pytest.mark.slow
@pytest.mark.parametrize("num_clients", [100, pytest.param(500, marks=pytest.mark.long)])
def test_clients_disconnect_through_the_pipe(num_clients: int) -> None:
    rng = random.Random(3)

    async def come_and_go(engine: EngineProcess, number: int) -> None:
        prompt = tuple(range(1, rng.randint(2, 30)))
        events = engine.generate(Generate(f"r{number}", prompt, 30, Sampling(temperature=0)))
        task = asyncio.ensure_future(_read(events))
        await asyncio.sleep(rng.expovariate(30))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await events.aclose()

    async def scenario() -> None:
        async with engine_of("plain") as engine:
            await ready(engine)
            for first in range(0, num_clients, 25):
                await asyncio.gather(*(come_and_go(engine, first + i) for i in range(25)))
            await until(lambda: _is_empty(engine))
            assert engine._requests == {}
            assert engine._line.num_waiting == 0
            assert len(await collect(engine, Generate("last", (1,), 3, Sampling(temperature=0)))) == 6

    asyncio.run(scenario())


async def _read(events: object) -> None:
    async for _ in events:  # type: ignore[attr-defined]
        pass


def _is_empty(engine: EngineProcess) -> bool:
    values = engine.status.stats.values if engine.status.stats else {"running": 1}
    return all(not values.get(name) for name in ("running", "waiting", "agents", "kv_tokens"))

"""The progress of a pass counts its layers: a client hears of a long one before it is complete."""

import pytest

from server.link.messages import Generate, Progress
from tests.server.engine.driven import GREEDY, TimedModel, World

LAYERS = TimedModel().num_layers


def told(layer_s: float, num_tokens: int = 600) -> list[int]:
    world = World()
    world.at(0.0, Generate("a", tuple(1 + index % 7 for index in range(num_tokens)), 2, GREEDY))
    world.run(TimedModel(world=world, cost=lambda rows: layer_s if rows > 1 else 0.001))
    return [event.num_prefilled for _, event in world.events if isinstance(event, Progress)]


@pytest.mark.parametrize("layer_s", [1.5, 3.0, 40.0])
def test_layers_that_are_done_count(layer_s: float) -> None:
    assert told(layer_s) == [600 * done // LAYERS for done in range(1, LAYERS)] + [600]


@pytest.mark.parametrize("layer_s", [0.0, 0.01, 0.09])
def test_a_short_pass_is_told_when_it_is_complete(layer_s: float) -> None:
    assert told(layer_s) == [600]

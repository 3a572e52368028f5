"""A prompt's tiles are computed while the next are described: few waits, bounded memory, the same bits."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.rig.waits import Waits, counted_waits
from benchmarks.target.evals import count_part
from models.args import ModelArgs
from models.arithmetic import CPU, METAL, Arithmetic
from models.attention.attention import Span
from models.in_flight import InFlight
from tests.checkpoints import open_model, save_packed
from tests.glm52 import GLM52
from tests.grids import few
from tests.models.make_golden import SEED
from tests.tiny_glm import SHARED, make_weights, tokens

MOST_WAITS = 40
TRUE_SHAPES = ModelArgs.from_config(GLM52)


@pytest.mark.parametrize("before", [0, 1_000, 14_336, 31_111, 100_000, 197_952])
@pytest.mark.parametrize("layer", [0, 3, 74])
def test_a_part_at_true_shapes_waits_for_its_newest_work_a_few_times(before: int, layer: int) -> None:
    waits, _ = count_part(TRUE_SHAPES, METAL, layer, before)
    assert waits.newest <= MOST_WAITS
    assert waits.older > 10, "tiles are waited for some time, or all would lie in memory"


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_no_more_than_the_depth_is_in_flight(depth: int) -> None:
    in_flight, launched = InFlight(depth), 0
    with counted_waits() as waits:
        for number in range(12):
            in_flight.launch(mx.array([number]) + 1)
            launched += 1
            assert launched - waits.newest - waits.older == min(launched, depth - 1)


def test_waits_are_told_apart_by_what_was_launched_since() -> None:
    a, b, c = (mx.array([i]) + 1 for i in range(3))
    waits = Waits()
    for array in (a, b, c):
        waits.launch([array])
    waits.wait([a])
    waits.wait([b])
    waits.wait([c])
    waits.wait([mx.array([0])])
    assert (waits.newest, waits.older) == (3, 1)


@pytest.mark.parametrize("length", few([33, 100, 250], [100]))
@pytest.mark.parametrize("arithmetic", [METAL, CPU], ids=lambda a: a.name)
def test_how_many_are_in_flight_changes_no_bit(arithmetic: Arithmetic, length: int, tmp_path: Path) -> None:
    folder = save_packed(tmp_path, SHARED, make_weights(SHARED, SEED), lambda path: None)
    outputs = []
    for depth in (1, 2, 3):
        small_tiles = replace(arithmetic, pieces_in_flight=depth, tile_elements=2**12, gather_from=20)
        model = open_model(folder, arithmetic=small_tiles).model
        hidden = model(mx.array(tokens(SHARED, length)), [Span(model.make_cache(), 0, length)])
        outputs.append(np.array(hidden.astype(mx.float32)))
    assert all(np.array_equal(outputs[0], other) for other in outputs[1:])

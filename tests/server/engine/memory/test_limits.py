"""MLX is told the plan: what it may keep for reuse, and from where on it gives that back first."""

import mlx.core as mx
import pytest

from config.plan import NOT_MLX, Geometry, make_plan
from server.engine import backend

MB = 10**6


@pytest.mark.parametrize(
    ("workspace", "budget"), [(780 * MB, 60_000 * MB), (90 * MB, 17_500 * MB), (3_000 * MB, 90_000 * MB)]
)
def test_freed_buffers_of_a_whole_step_may_be_kept(
    workspace: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit below a part's transients makes every layer allocate them again."""
    geometry = Geometry(
        5_000 * MB, (16 * MB,) * 75, 256, 8, 90_000, 5_000, workspace, MB, 154_880, 50_000, 16 * MB
    )
    plan = make_plan(geometry, budget, 8192, physical_bytes=128_000 * MB)
    told: dict[str, int] = {}
    monkeypatch.setattr(mx, "set_cache_limit", lambda nbytes: told.update(cache=nbytes))
    monkeypatch.setattr(mx, "set_memory_limit", lambda nbytes: told.update(memory=nbytes))
    backend._limit(plan)
    assert told["cache"] >= workspace
    of_mlx = sum(nbytes for name, nbytes in plan.lines.items() if name not in NOT_MLX)
    assert told["memory"] == of_mlx <= budget

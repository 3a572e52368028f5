"""What a prompt takes beside trunk, experts and caches stays within its lines, and is most of them."""

import mlx.core as mx
import pytest

from models import workspace
from models.arithmetic import CPU, Quantization
from models.attention import Span
from models.loading import make_geometry
from tests.checkpoints import Opened, open_model, save_packed
from tests.models.make_golden import SEED
from tests.tiny_glm import TINY, make_weights, tokens

# Few layers of experts so wide that their weights are most of what a short prompt takes.
HEAVY = TINY | {
    "hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 256, "n_routed_experts": 4,
    "num_hidden_layers": 4, "mlp_layer_types": ["dense"] * 3 + ["sparse"], "index_topk": 512,
}  # fmt: skip


@pytest.fixture(scope="module", params=[3, 4, 8])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    def packed(path: str) -> Quantization | None:
        return Quantization(64, request.param) if ".mlp." in path else None

    folder = tmp_path_factory.mktemp("heavy")
    return open_model(save_packed(folder, HEAVY, make_weights(HEAVY, SEED), packed))


def measured_and_planned(opened: Opened, ids: list[int]) -> tuple[int, int]:
    cache, length = opened.model.make_cache(), len(ids)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    hidden = opened.model(mx.array(ids), [Span(cache, 0, length)])
    mx.eval(hidden)
    geometry = make_geometry(opened.checkpoint, CPU, length)
    planned = geometry.workspace_bytes + length * geometry.sweep_row_bytes
    return mx.get_peak_memory() - before - cache.nbytes, planned


@pytest.mark.parametrize("length", [40, 700])
@pytest.mark.parametrize("is_repeated", [False, True])
def test_a_prompt_stays_within_its_lines(opened: Opened, length: int, is_repeated: bool) -> None:
    ids = [7] * length if is_repeated else tokens(HEAVY, length)
    measured, planned = measured_and_planned(opened, ids)
    assert measured <= planned


def test_the_weights_that_lie_unpacked_are_most_of_a_short_prompt(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plant the fault: a plan that knows the unpacked weights and not what unpacking takes beside them."""
    measured, planned = measured_and_planned(opened, tokens(HEAVY, 40))
    assert measured > 0.6 * planned
    monkeypatch.setattr(workspace, "UNPACKED_COPIES", dict.fromkeys(range(9), 1))
    assert measured > measured_and_planned(opened, tokens(HEAVY, 40))[1]

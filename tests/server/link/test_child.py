"""What the engine's process is given beside its flags."""

import os
import subprocess
import sys

import pytest

from server.link import child
from server.link.child import engine_environment


def seen_by_a_child(name: str) -> str:
    command = [sys.executable, "-c", f"import os; print(os.environ.get({name!r}))"]
    return subprocess.run(command, env=engine_environment(), capture_output=True, text=True).stdout.strip()


def test_the_engine_multiplies_float32_as_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it MLX rounds router and indexer to ten bits on NVIDIA and on the M5."""
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    assert seen_by_a_child("MLX_ENABLE_TF32") == "0"


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_a_command_buffer_of_metal_has_room_for_a_layers_banks(
    platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default each gather, which names a whole bank, would go alone."""
    monkeypatch.setattr(sys, "platform", platform)
    given = child.engine_variables()
    assert (int(given.get("MLX_MAX_MB_PER_BUFFER", 50)) > 1_000) == (platform == "darwin")
    assert (int(given.get("MLX_MAX_OPS_PER_BUFFER", 50)) > 50) == (platform == "darwin")


@pytest.mark.parametrize(("cores", "threads"), [(1, "1"), (2, "1"), (3, "1"), (4, "2"), (64, "62")])
def test_products_leave_cores_to_others(cores: int, threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of a product wait for each other: one without a core stopped them all, and first tokens 17x."""
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setattr(child, "num_cores", lambda: cores)
    assert seen_by_a_child("OPENBLAS_NUM_THREADS") == threads


@pytest.mark.parametrize(
    "name",
    ["MLX_ENABLE_TF32", "OPENBLAS_THREAD_TIMEOUT", "OPENBLAS_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_"],
)
def test_what_a_person_sets_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "7")
    assert seen_by_a_child(name) == "7"


def test_the_engine_finds_this_very_code() -> None:
    command = [sys.executable, "-P", "-c", "import server; print(server.__file__)"]
    shown = subprocess.run(command, env=engine_environment(), cwd="/", capture_output=True, text=True).stdout
    assert os.path.samefile(shown.strip(), sys.modules["server"].__file__ or "")

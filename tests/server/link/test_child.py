"""What the engine's process is given beside its flags."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from server.link import child
from server.link.child import Child, engine_environment
from server.link.messages import ClusterConfig, EngineConfig
from tests.waiting import wait_until


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


@pytest.mark.parametrize("lost", ["engine", "rank"])
def test_an_engine_and_the_ranks_beside_it_end_together(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "FOLLOWER", "tests.server.link.fake_rank")
    monkeypatch.setattr(child, "WORDS_S", 0.1)
    cluster = ClusterConfig(("a:1", "b:2"), 0, "key", "1", started=(1,))
    path = Path("stays" if lost == "engine" else "ends")
    one = Child(
        "tests.server.link.fake_rank", EngineConfig(path, False, 10**9, None, "info", cluster=cluster)
    )
    codes: list[int] = []
    one.read_events(lambda event: None, codes.append)
    if lost == "engine":
        os.kill(one.process.pid, signal.SIGKILL)
    wait_until(lambda: codes == [-signal.SIGKILL])
    assert [follower.poll() for follower in one._followers] == [-signal.SIGKILL if lost == "engine" else 0]

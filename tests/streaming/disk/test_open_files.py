"""Checkpoints of more shards than a shell lets a process open."""

import resource
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from config.errors import UsageError
from models.arithmetic import Quantization
from streaming.disk.open_files import OTHERS, allow_open_files
from tests.checkpoints import save_packed
from tests.tiny_glm import WIDER, make_weights

ROOT = Path(__file__).parents[3]
LIMITED = """
import resource, sys
from pathlib import Path
from server.engine.backend import open_backend
from server.link.messages import EngineConfig
soft, hard, is_mirrored = map(int, sys.argv[2:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
folder = Path(sys.argv[1])
mirrors = (folder.with_name("mirror"),) if is_mirrored else ()
config = EngineConfig(
    folder, stream_experts=True, ram_budget_bytes=10**9, max_context=64, log_level="info", mirrors=mirrors,
    prefix_memory_bytes=0, prefix_directory=None,
)
open_backend(config, lambda *words: None)
"""


def choose(path: str) -> Quantization | None:
    return Quantization(64, 4) if ".switch_mlp." in path else None


def split(directory: Path) -> int:
    """One file for each tensor; how many."""
    path = directory / "model.safetensors"
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    for number, (name, array) in enumerate(tensors.items()):
        mx.save_safetensors(str(directory / f"model-{number}.safetensors"), {name: array})
    path.unlink()
    return len(tensors)


@pytest.mark.parametrize(("soft", "is_mirrored"), [(64, 0), (100, 1)])
def test_a_checkpoint_of_more_files_than_the_soft_limit_is_opened(
    tmp_path: Path, soft: int, is_mirrored: int
) -> None:
    for name in ("folder", "mirror"):
        save_packed(tmp_path / name, WIDER, make_weights(WIDER, 0), choose)
        assert split(tmp_path / name) > soft
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    words = [str(tmp_path / "folder"), str(soft), str(hard), str(is_mirrored)]
    code = [sys.executable, "-c", LIMITED, *words]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_hard_limit_below_the_need_is_one_line_with_the_command() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pytest.raises(UsageError, match=rf"ulimit -n {hard + 1 + OTHERS}"):
        allow_open_files(hard + 1)


@pytest.mark.parametrize("num_files", [0, 1, 40])
def test_a_limit_that_is_high_enough_stays(num_files: int) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_open_files(num_files)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before

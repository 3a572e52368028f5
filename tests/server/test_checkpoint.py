"""Finding a checkpoint, and noticing that a part of it is missing."""

import json
import struct
from pathlib import Path

import pytest

from config.errors import CheckpointError
from server.checkpoint import find_checkpoint


def write_shard(path: Path, num_data_bytes: int = 8, num_missing: int = 0) -> None:
    header = json.dumps(
        {
            "__metadata__": {},
            "a": {"dtype": "U8", "shape": [num_data_bytes], "data_offsets": [0, num_data_bytes]},
        }
    ).encode()
    path.write_bytes(
        (struct.pack("<Q", len(header)) + header + bytes(num_data_bytes))[: -num_missing or None]
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Complete, in two shards."""
    (tmp_path / "config.json").write_text("{}")
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for name in shards.values():
        write_shard(tmp_path / name)
    return tmp_path


def refusal(path: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_complete_folder_is_found(checkpoint: Path) -> None:
    assert find_checkpoint(str(checkpoint)) == checkpoint


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    (checkpoint / "model-2.safetensors").unlink()
    assert "1 of 2 weight files are missing, model-2.safetensors first" in refusal(checkpoint)


@pytest.mark.parametrize("num_missing", [1, 8, 20, 200])
def test_a_shard_that_was_cut_off_is_named(checkpoint: Path, num_missing: int) -> None:
    write_shard(checkpoint / "model-2.safetensors", num_missing=num_missing)
    assert "model-2.safetensors" in refusal(checkpoint)


def test_other_faults_say_what_they_are(checkpoint: Path, tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    (checkpoint / "model.safetensors.index.json").write_text("{")
    assert "damaged" in refusal(checkpoint)
    (checkpoint / "model.safetensors.index.json").unlink()
    for shard in checkpoint.glob("*.safetensors"):
        shard.unlink()
    assert "no weights" in refusal(checkpoint)
    (checkpoint / "config.json").unlink()
    assert "not a checkpoint" in refusal(checkpoint)


def test_a_repository_is_looked_up_in_the_local_cache_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert "hf download org/name" in refusal("org/name")
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "main").write_text("abc\n")
    (snapshot / "config.json").write_text("{}")
    write_shard(snapshot / "model.safetensors")
    assert find_checkpoint("org/name") == snapshot

"""Finding a checkpoint, and noticing that a part of it is missing."""

import json
import struct
from pathlib import Path

import pytest

from config.errors import CheckpointError
from server.commands.checkpoint import choose_checkpoint, find_checkpoint


def write_shard(
    path: Path, num_data_bytes: int = 8, num_missing: int = 0, tensor: str = "a", dtype: str = "U8"
) -> None:
    header = json.dumps(
        {
            "__metadata__": {},
            tensor: {"dtype": dtype, "shape": [num_data_bytes], "data_offsets": [0, num_data_bytes]},
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
    for tensor, name in shards.items():
        write_shard(tmp_path / name, tensor=tensor)
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
    assert "lacks 1 of 2 files: model-2.safetensors; finish the download" in refusal(checkpoint)


@pytest.mark.parametrize("num_missing", [1, 8, 20, 200])
def test_a_shard_that_was_cut_off_is_named(checkpoint: Path, num_missing: int) -> None:
    write_shard(checkpoint / "model-2.safetensors", num_missing=num_missing, tensor="b")
    assert "model-2.safetensors" in refusal(checkpoint)


def test_other_faults_say_what_they_are(checkpoint: Path, tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    (checkpoint / "model.safetensors.index.json").write_text("{")
    assert "cannot be parsed" in refusal(checkpoint)
    (checkpoint / "model.safetensors.index.json").unlink()
    for shard in checkpoint.glob("*.safetensors"):
        shard.unlink()
    assert "holds no model*.safetensors" in refusal(checkpoint)
    (checkpoint / "config.json").unlink()
    assert "not a checkpoint" in refusal(checkpoint)


@pytest.mark.parametrize("name", ["a" * 300, "a" * 300 + "/b", "a" * 5000, "~nobody-of-this-name/x"])
def test_a_name_that_no_folder_can_have_is_one_clear_line(name: str) -> None:
    refusal(name)


@pytest.mark.parametrize("revision", [b"\xff\xfe", b"", b"a" * 300, b"a\0b", None])
def test_a_damaged_cache_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: bytes | None
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (refs := tmp_path / "models--a--damaged" / "refs").mkdir(parents=True)
    if revision is None:
        (refs / "main").mkdir()
    else:
        (refs / "main").write_bytes(revision)
    write_snapshot(tmp_path / "models--a--damaged", "glm_moe_dsa")
    whole = write_snapshot(tmp_path / "models--c--glm", "glm_moe_dsa")
    assert choose_checkpoint(None).directory == whole
    assert "hf download a/damaged" in refusal("a/damaged")


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


def test_without_a_name_a_complete_glm_of_the_cache_is_served_else_pocket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    pocket = write_snapshot(tmp_path / "elsewhere" / "models--x--pocket", "glm_moe_dsa")
    monkeypatch.setattr("server.commands.checkpoint.POCKET", pocket)
    write_snapshot(tmp_path / "models--a--llama", "llama")
    half = write_snapshot(tmp_path / "models--b--glm", "glm_moe_dsa")
    write_shard(half / "model.safetensors", num_missing=4)
    found = choose_checkpoint(None)
    assert (found.directory, found.model_id) == (pocket, "glmserve/pocket")
    assert "hf download" in found.remark
    whole = write_snapshot(tmp_path / "models--c--glm", "glm_moe_dsa")
    found = choose_checkpoint(None)
    assert (found.directory, found.model_id) == (whole, "z-ai/glm-5.2")
    assert str(whole) in found.remark


def test_an_fp8_original_in_the_cache_does_not_stand_before_a_checkpoint_that_can_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    original = write_snapshot(tmp_path / "models--RedHatAI--GLM-5.2-FP8", "glm_moe_dsa")
    write_shard(original / "model.safetensors", dtype="F8_E4M3")
    assert choose_checkpoint(None).directory == original
    servable = write_snapshot(tmp_path / "models--mlx-community--GLM-5.2-mxfp4", "glm_moe_dsa")
    assert choose_checkpoint(None).directory == servable


def test_pocket_by_name_keeps_its_own_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pocket = write_snapshot(tmp_path / "models--x--pocket", "glm_moe_dsa")
    monkeypatch.setattr("server.commands.checkpoint.POCKET", pocket)
    assert choose_checkpoint(str(pocket)).model_id == "glmserve/pocket"


def write_snapshot(folder: Path, model_type: str) -> Path:
    snapshot = folder / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": model_type}))
    write_shard(snapshot / "model.safetensors")
    return snapshot


@pytest.mark.parametrize("name", ["model.gguf", "GLM-5.2-Q4_K_M.gguf", "no/such.gguf"])
def test_a_gguf_is_called_one(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.parent == tmp_path:
        path.touch()
    with pytest.raises(CheckpointError, match="GGUF cannot be served here"):
        find_checkpoint(str(path))

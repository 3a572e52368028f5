import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from config.errors import CheckpointError
from streaming.files.headers import read_headers
from tests.streaming.expert_files import Tensors, write_index, write_safetensors

TENSORS: Tensors = {"a": ("F32", (2, 3), bytes(range(24))), "b": ("BF16", (4,), bytes(8))}


def test_entries_point_at_the_bytes_that_the_reference_writer_wrote(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_file({"x": values, "y": values.astype(np.float16)}, tmp_path / "model.safetensors")
    entries = read_headers(tmp_path)
    entry = entries["x"]
    assert (entry.dtype, entry.shape, entry.nbytes) == ("F32", (3, 4), 48)
    assert (tmp_path / "model.safetensors").read_bytes()[entry.offset :][:48] == values.tobytes()


def test_a_padded_header_is_read_like_any_other(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", TENSORS, pad=1000)
    entry = read_headers(tmp_path)["a"]
    assert (tmp_path / "model.safetensors").read_bytes()[entry.offset :][:24] == bytes(range(24))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model-1.safetensors", TENSORS)
    write_index(tmp_path, {"model-1.safetensors": ["a", "b"], "model-2.safetensors": ["c"]})
    with pytest.raises(CheckpointError, match=r"lacks 1 of 2 files: model-2\.safetensors"):
        read_headers(tmp_path)


def test_a_shard_of_an_impossible_name_is_missing_too(tmp_path: Path) -> None:
    write_index(tmp_path, {"x" * 300: ["a"]})
    with pytest.raises(CheckpointError, match=r"lacks 1 of 1 files: xxx"):
        read_headers(tmp_path)


def test_a_tensor_that_its_shard_does_not_hold_is_named(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model-1.safetensors", TENSORS)
    write_index(tmp_path, {"model-1.safetensors": ["a", "b", "c"]})
    with pytest.raises(CheckpointError, match=r"tensor c should be in model-1\.safetensors"):
        read_headers(tmp_path)


def test_a_truncated_file_is_refused_with_file_and_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor b ends at byte"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        (b"{", "JSON cannot be parsed"),
        (b"[" * 200_000, "JSON cannot be parsed"),
        (b"\xff\xfe{}", "JSON cannot be parsed"),
        (b"[]", "not an object"),
        ({"a": 1}, "tensor a is described by 1"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "tensor a .* needs 8 bytes, not 4"),
        ({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, "tensor a has dtype 'F99'"),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "tensor a has a shape"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "tensor a has a shape"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, "tensor a has a shape"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "tensor a has a shape"),
        ({"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, "tensor a has dtype .'F32'."),
        ({"a": {"dtype": "F32", "shape": [10**4000] * 2, "data_offsets": [0, 8]}}, "tensor a has a shape"),
        ({"a": {"dtype": "F32", "shape": [10**9] * 999, "data_offsets": [0, 8]}}, "tensor a has a shape"),
        (
            {
                "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
                "b": {"dtype": "U8", "shape": [8], "data_offsets": [7, 15]},
            },
            "tensors a and b overlap",
        ),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object, complaint: str) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    with pytest.raises(CheckpointError, match=complaint):
        read_headers(tmp_path)


@pytest.mark.parametrize("content", [b"", b"short", (2**63).to_bytes(8, "little") + b"{}"])
def test_a_header_longer_than_its_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="the header claims"):
        read_headers(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        write_safetensors(tmp_path / f"model-{number}.safetensors", TENSORS)
    with pytest.raises(CheckpointError, match="tensor a is also in"):
        read_headers(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model"):
        read_headers(tmp_path)

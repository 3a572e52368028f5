import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from math import gcd
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from config.errors import CheckpointError, UsageError
from models.args import ModelArgs
from models.arithmetic import CPU
from models.convert.convert import PEAK_BYTES, convert
from models.convert.recipe import make_recipe
from models.convert.shards import PAGE
from models.convert.source import Source
from models.loading.building import as_held, build_model
from models.loading.tensor_names import split_kv_b, trunk_names
from server.commands.convert_command import convert_command
from streaming.files.headers import read_headers
from streaming.files.index import ExpertIndex
from streaming.store import ExpertStore
from tests.streaming.expert_files import write_safetensors
from tests.tiny_glm import SHARED, Array, fuse_experts, make_weights, save_checkpoint, tokens
from tests.tiny_model import logits, make_model

EIGHT_BITS = make_recipe(8, 32, "affine")
FOUR_BITS = make_recipe(4, 32, "affine", experts_bits=3, embed_bits=6)


@pytest.fixture(scope="module")
def weights() -> dict[str, Array]:
    return make_weights(SHARED, 0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Array]) -> Path:
    directory = save_checkpoint(tmp_path_factory.mktemp("source"), SHARED, weights)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    (directory / "secret.txt").write_text("not part of a checkpoint")
    return directory


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    target = tmp_path_factory.mktemp("converted") / "new"
    convert(source, target, FOUR_BITS)
    return target


def load(directory: Path) -> dict[str, mx.array]:
    return {
        name: array
        for path in sorted(directory.glob("model*.safetensors"))
        for name, array in mx.load(str(path)).items()  # type: ignore[union-attr]
    }


def unpack(tensors: dict[str, mx.array], path: str, bits: int) -> npt.NDArray[np.float32]:
    scales, biases = (tensors[f"{path}.{kind}"].astype(mx.float32) for kind in ("scales", "biases"))
    return np.array(mx.dequantize(tensors[f"{path}.weight"], scales, biases, group_size=32, bits=bits))


def in_original_layout(tensors: dict[str, mx.array]) -> dict[str, Array]:
    """A conversion to 8 bits undone by hand, but for the rounding."""
    out: dict[str, Array] = {}
    for name in tensors:
        path, _, kind = name.rpartition(".")
        if kind == "scales" or (f"{path}.scales" in tensors and kind != "weight"):
            continue
        dense = unpack(tensors, path, 8) if f"{path}.scales" in tensors else np.array(tensors[name])
        if ".switch_mlp." in name:
            for expert, matrix in enumerate(dense):
                out[name.replace("switch_mlp", f"experts.{expert}")] = matrix
        else:
            out[name] = dense
    for layer in range(SHARED["num_hidden_layers"]):
        attention = f"model.layers.{layer}.self_attn."
        by_head = (
            out.pop(attention + "embed_q.weight").swapaxes(1, 2),
            out.pop(attention + "unembed_out.weight"),
        )
        out[attention + "kv_b_proj.weight"] = np.concatenate(by_head, axis=1).reshape(
            -1, SHARED["kv_lora_rank"]
        )
    return out


def all_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_the_fused_layout_converts_to_the_same_files(
    tmp_path: Path, weights: dict[str, Array], source: Path, converted: Path
) -> None:
    fused = save_checkpoint(tmp_path / "source", SHARED, fuse_experts(weights, SHARED))
    convert(fused, tmp_path / "target", FOUR_BITS)
    tensors = {path.name: path.read_bytes() for path in (tmp_path / "target").glob("*.safetensors")}
    assert tensors == {path.name: path.read_bytes() for path in converted.glob("*.safetensors")}


def test_the_converted_model_computes_with_the_values_it_was_given(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "target", EIGHT_BITS)
    args = ModelArgs.from_config(json.loads((tmp_path / "target/config.json").read_text()))
    entries = read_headers(tmp_path / "target")
    store = ExpertStore(ExpertIndex.from_entries(entries), args.n_routed_experts, float_dtype=mx.float32)
    store.load_all()
    tensors = load(tmp_path / "target")
    trunk = {name: tensors[name] for name in trunk_names(entries, args)}
    model = build_model(args, CPU, store, as_held(trunk, args, CPU))
    reference = make_model(SHARED, in_original_layout(tensors))
    prompt = tokens(SHARED, 4 * SHARED["index_topk"])
    np.testing.assert_allclose(logits(model, prompt), logits(reference, prompt), atol=1e-4)
    store.close()


def test_names_shapes_and_overrides_are_those_of_mlx(converted: Path) -> None:
    tensors, config = load(converted), json.loads((converted / "config.json").read_text())
    quantization = config["quantization"]
    assert config["quantization_config"] == quantization
    assert {key: quantization[key] for key in ("group_size", "bits", "mode")} == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
    }
    path = "model.layers.3.mlp.switch_mlp.gate_proj"
    assert quantization[path] == {"group_size": 32, "bits": 3, "mode": "affine"}
    assert quantization["lm_head"]["bits"] == quantization["model.embed_tokens"]["bits"] == 6
    assert tensors[f"{path}.weight"].shape == (8, 32, 64 * 3 // 32)
    assert tensors[f"{path}.scales"].shape == tensors[f"{path}.biases"].shape == (8, 32, 2)
    assert tensors[f"{path}.scales"].dtype == mx.bfloat16
    assert tensors["model.layers.0.self_attn.embed_q.weight"].shape == (4, 32, 12)
    assert quantization["model.layers.0.self_attn.embed_q"] is False, "12 inputs make no group"
    assert quantization["model.layers.3.mlp.gate"] is False
    assert quantization["model.layers.0.self_attn.indexer.wq_b"] is False
    assert not any("kv_b_proj" in name or ".experts." in name for name in tensors)
    index = json.loads((converted / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert (converted / "chat_template.jinja").exists()
    assert not (converted / "secret.txt").exists()


def test_values_are_within_quantisation_error(converted: Path, weights: dict[str, Array]) -> None:
    tensors = load(converted)
    for path, original, bits in [
        ("model.layers.4.self_attn.o_proj", weights["model.layers.4.self_attn.o_proj.weight"], 4),
        (
            "model.layers.4.mlp.switch_mlp.up_proj",
            np.stack([weights[f"model.layers.4.mlp.experts.{e}.up_proj.weight"] for e in range(8)]),
            3,
        ),
    ]:
        found = unpack(tensors, path, bits)
        groups = original.reshape(*original.shape[:-1], -1, 32)
        step = (groups.max(-1) - groups.min(-1)) / (2**bits - 1)
        error = np.abs(found - original).reshape(groups.shape).max(-1)
        assert (error <= 0.75 * step + 0.01).all()
        assert error.max() > 0.1 * step.mean(), "nothing was quantised"


def test_what_decides_stays_exact(converted: Path, weights: dict[str, Array]) -> None:
    tensors, args = load(converted), ModelArgs.from_config(SHARED)
    for name in (
        "model.layers.3.mlp.gate.weight",
        "model.layers.3.mlp.gate.e_score_correction_bias",
        "model.layers.0.self_attn.indexer.weights_proj.weight",
        "model.layers.0.self_attn.indexer.k_norm.bias",
        "model.norm.weight",
    ):
        np.testing.assert_array_equal(np.array(tensors[name]), weights[name])
        assert tensors[name].dtype == mx.float32
    embed_q, _ = split_kv_b(mx.array(weights["model.layers.5.self_attn.kv_b_proj.weight"]), args)
    assert mx.array_equal(tensors["model.layers.5.self_attn.embed_q.weight"], embed_q)


def test_mtp_and_indexers_of_shared_layers_are_dropped(
    tmp_path: Path, converted: Path, weights: dict[str, Array]
) -> None:
    extra = {
        "model.layers.11.eh_proj.weight": weights["model.layers.3.mlp.gate.weight"],
        "model.layers.11.mlp.experts.0.up_proj.weight": weights["lm_head.weight"],
        "model.layers.3.self_attn.indexer.wk.weight": weights["model.layers.2.self_attn.indexer.wk.weight"],
    }
    convert(save_checkpoint(tmp_path / "source", SHARED, weights | extra), tmp_path / "target", FOUR_BITS)
    assert load(tmp_path / "target").keys() == load(converted).keys()


def test_tensor_data_starts_on_a_page_and_tensors_on_what_divides_their_size(
    tmp_path: Path, source: Path
) -> None:
    convert(source, tmp_path / "target", EIGHT_BITS)
    entries = read_headers(tmp_path / "target").values()
    for path in {entry.path for entry in entries}:
        assert min(entry.offset for entry in entries if entry.path == path) % PAGE == 0
    assert len([entry for entry in entries if entry.nbytes % 4096 == 0]) > 50
    assert all(entry.offset % gcd(entry.nbytes, PAGE) == 0 for entry in entries)


def test_the_reference_reader_accepts_the_files(converted: Path) -> None:
    from safetensors import safe_open

    for path in converted.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            assert file.keys()


def e4m3(code: int) -> float:
    """The definition: 1 sign, 4 exponent bits (bias 7), 3 of mantissa; no infinities."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, (code >> 3) & 0xF, code & 0x7
    if exponent == 0xF and mantissa == 0x7:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def test_fp8_is_decoded_exactly_up_to_the_half_block_at_the_edge(tmp_path: Path) -> None:
    """576 rows are four blocks and a half; the scales lie in another file."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (576, 320), dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    scales = rng.uniform(0.5, 2, (5, 3)).astype(np.float32)
    write_safetensors(
        tmp_path / "model-1.safetensors", {"w.weight": ("F8_E4M3", (576, 320), codes.tobytes())}
    )
    write_safetensors(
        tmp_path / "model-2.safetensors", {"w.weight_scale_inv": ("F32", (5, 3), scales.tobytes())}
    )
    fp8 = Source(read_headers(tmp_path))
    exact = np.vectorize(e4m3)(codes).astype(np.float32) * np.kron(scales, np.ones((128, 128)))[:576, :320]
    expected = mx.array(exact.astype(np.float32)).astype(mx.bfloat16)
    assert mx.array_equal(fp8.rows("w.weight", 0, 576), expected)
    assert mx.array_equal(fp8.rows("w.weight", 500, 576), expected[500:])


def test_an_fp8_checkpoint_converts_to_what_its_bf16_values_convert_to(
    tmp_path: Path, weights: dict[str, Array]
) -> None:
    """In blocks of 16: kv_a_proj's 40 rows end in the middle of one, as 576 do in blocks of 128."""
    fp8, bf16 = tmp_path / "fp8", tmp_path / "bf16"
    block = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16]}}
    rng = np.random.default_rng(1)
    files: dict[Path, dict[str, tuple[str, tuple[int, ...], bytes]]] = {fp8: {}, bf16: {}}
    scales = {}
    for name, w in weights.items():
        if not name.endswith("_proj.weight") or "indexer" in name:
            both = ("F32", w.shape, w.tobytes())
            files[fp8][name], files[bf16][name] = both, both
            continue
        codes = np.array(mx.to_fp8(mx.array(w)))
        scale = rng.uniform(0.5, 2, [-(-size // 16) for size in w.shape]).astype(np.float32)
        spread = np.kron(scale, np.ones((16, 16), np.float32))[: w.shape[0], : w.shape[1]]
        dense = (mx.from_fp8(mx.array(codes), mx.float32) * mx.array(spread)).astype(mx.bfloat16)
        files[fp8][name] = ("F8_E4M3", w.shape, codes.tobytes())
        files[bf16][name] = ("BF16", w.shape, np.array(dense.view(mx.uint16)).tobytes())
        scales[name + "_scale_inv"] = ("F32", scale.shape, scale.tobytes())
    for directory, tensors in files.items():
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(SHARED | (block if directory is fp8 else {})))
        write_safetensors(directory / "model-1.safetensors", tensors)
    write_safetensors(fp8 / "model-2.safetensors", scales)
    for directory in files:
        convert(directory, directory.with_suffix(".mlx"), FOUR_BITS)
    assert all_files(tmp_path / "fp8.mlx") == all_files(tmp_path / "bf16.mlx")


def test_a_missing_or_misshapen_fp8_scale_is_named(tmp_path: Path) -> None:
    weight = ("F8_E4M3", (576, 128), bytes(576 * 128))
    write_safetensors(tmp_path / "model.safetensors", {"w.weight": weight})
    with pytest.raises(CheckpointError, match=r"w\.weight_scale_inv is missing"):
        Source(read_headers(tmp_path))
    bad = ("F32", (4, 1), bytes(16))
    write_safetensors(tmp_path / "model.safetensors", {"w.weight": weight, "w.weight_scale_inv": bad})
    with pytest.raises(CheckpointError, match=r"\(4, 1\), not \(5, 1\)"):
        Source(read_headers(tmp_path))


def test_scales_of_another_kind_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    tensors = {
        "w.weight": ("F8_E4M3", (128, 128), bytes(128 * 128)),
        "w.weight_scale_inv": ("F8_E8M0", (1, 1), bytes([127])),
    }
    write_safetensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"w\.weight_scale_inv is F8_E8M0"):
        Source(read_headers(tmp_path))


@pytest.mark.parametrize("quantization", [{"weight_block_size": [128]}, {"weight_block_size": [0, 128]}, [1]])
def test_fp8_blocks_without_rows_and_columns_are_refused(
    tmp_path: Path, source: Path, quantization: object
) -> None:
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "source/config.json").write_text(json.dumps(SHARED | {"quantization_config": quantization}))
    with pytest.raises(CheckpointError, match=r"FP8 blocks of \["):
        convert(tmp_path / "source", tmp_path / "target", FOUR_BITS)
    assert not (tmp_path / "target").exists()


def test_a_large_matrix_cut_into_blocks_gives_the_same_as_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path, converted: Path
) -> None:
    monkeypatch.setattr("models.convert.recipe.BLOCK_VALUES", 1)
    monkeypatch.setattr("models.convert.recipe._ROW_STEP", 8)
    convert(source, tmp_path / "target", FOUR_BITS)
    assert all_files(tmp_path / "target") == all_files(converted)


KILLED = """
import os, signal, sys
from pathlib import Path
from models.convert.convert import convert
from models.convert.recipe import make_recipe
def stop(done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
recipe = make_recipe(4, 32, "affine", experts_bits=3, embed_bits=6)
convert(Path(sys.argv[1]), Path(sys.argv[2]), recipe, stop)
"""


def test_a_killed_conversion_goes_on_and_keeps_what_was_finished(
    tmp_path: Path, source: Path, converted: Path
) -> None:
    target = tmp_path / "target"
    killed = subprocess.run([sys.executable, "-c", KILLED, source, target], check=False)
    assert killed.returncode == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    assert 2 <= len(finished) <= 10
    convert(source, target, FOUR_BITS)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert all_files(target) == all_files(converted)


def test_a_finished_foreign_or_differently_begun_target_is_left_alone(
    tmp_path: Path, source: Path, converted: Path
) -> None:
    before = all_files(converted)
    with pytest.raises(UsageError, match="is no unfinished conversion"):
        convert(source, converted, FOUR_BITS)
    assert all_files(converted) == before
    target = tmp_path / "target"
    subprocess.run([sys.executable, "-c", KILLED, source, target], check=False)
    with pytest.raises(UsageError, match="was begun from"):
        convert(source, target, EIGHT_BITS)
    with pytest.raises(CheckpointError, match="quantised already"):
        convert(converted, tmp_path / "twice", FOUR_BITS)


def test_a_conversion_does_not_go_on_from_a_source_that_was_replaced(tmp_path: Path, source: Path) -> None:
    mine, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(source, mine)
    subprocess.run([sys.executable, "-c", KILLED, mine, target], check=False)
    save_checkpoint(mine, SHARED, make_weights(SHARED, 1))
    with pytest.raises(UsageError, match="whose files have changed since; use another folder"):
        convert(mine, target, FOUR_BITS)


def test_what_a_full_disk_left_of_a_file_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path, converted: Path
) -> None:
    target = tmp_path / "target"
    subprocess.run([sys.executable, "-c", KILLED, source, target], check=False)
    missing = {path.name: path.stat().st_size for path in converted.glob("*.safetensors")}
    for path in target.glob("*.safetensors"):
        del missing[path.name]
    (target / (min(missing) + ".partial")).write_bytes(bytes(10**6))
    needed = sum(missing.values())
    usage: Callable[[Path], Any] = lambda path: type("Usage", (), {"free": needed - 10**6})  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    convert(source, target, FOUR_BITS)
    assert all_files(target) == all_files(converted)


def test_a_second_conversion_into_the_same_folder_is_refused_and_harms_nothing(
    tmp_path: Path, source: Path, converted: Path
) -> None:
    refusals = []

    def meddle(done: int, total: int) -> None:
        if total // 3 < done < total // 2:
            with pytest.raises(UsageError, match="another conversion is at work there") as refusal:
                convert(source, tmp_path / "target", FOUR_BITS)
            refusals.append(refusal)

    convert(source, tmp_path / "target", FOUR_BITS, meddle)
    assert refusals
    assert all_files(tmp_path / "target") == all_files(converted)


def test_a_conversion_that_was_cut_at_its_very_start_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path, converted: Path
) -> None:
    def full(self: Path, text: str) -> int:
        self.touch()
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(UsageError, match="the disk is full; free some and repeat"):
            convert(source, tmp_path / "target", FOUR_BITS)
    assert (tmp_path / "target/conversion.json").read_bytes() == b""
    convert(source, tmp_path / "target", FOUR_BITS)
    assert all_files(tmp_path / "target") == all_files(converted)


@pytest.mark.parametrize("state", ["", "[]", '{"sou'])
def test_a_damaged_state_beside_other_files_is_left_alone(tmp_path: Path, source: Path, state: str) -> None:
    (tmp_path / "conversion.json").write_text(state)
    (tmp_path / "model-00001-of-00012.safetensors").write_text("precious")
    with pytest.raises(UsageError, match="is no unfinished conversion"):
        convert(source, tmp_path, FOUR_BITS)


def test_all_of_it_is_on_the_disk_before_it_counts_as_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path
) -> None:
    seen: list[set[str]] = []
    monkeypatch.setattr(os, "sync", lambda: seen.append({path.name for path in tmp_path.glob("out/*")}))
    convert(source, tmp_path / "out", FOUR_BITS)
    assert {"config.json", "conversion.json", "model.safetensors.index.json"} <= seen[-1]


def test_a_full_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(UsageError, match="the disk is full; free some and repeat"):
            convert(source, tmp_path / "target", FOUR_BITS)
    convert(source, tmp_path / "target", FOUR_BITS)
    no_room: Callable[[Path], Any] = lambda path: type("Usage", (), {"free": 10**5})  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", no_room)
    with pytest.raises(UsageError, match=r"still to be written, the disk has 100\.0 kB"):
        convert(source, tmp_path / "other", FOUR_BITS)


MEASURED = """
import sys
from pathlib import Path
from models.convert.convert import convert
from models.convert.recipe import make_recipe
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
before = peak()
convert(Path(sys.argv[1]), Path(sys.argv[2]), make_recipe(4, 64, "affine"))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_below_the_stated_peak(tmp_path: Path, weights: dict[str, Array]) -> None:
    """A matrix of 512 MB, and a layer of experts of 400 MB in all."""
    config = SHARED | {"vocab_size": 2**21}
    big = {
        name: np.zeros((2**21, 64), np.float32)
        if name in ("lm_head.weight", "model.embed_tokens.weight")
        else w
        for name, w in weights.items()
    }
    directory = save_checkpoint(tmp_path / "source", config, big)
    run = subprocess.run(
        [sys.executable, "-c", MEASURED, directory, tmp_path / "target"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(run.stdout) < PEAK_BYTES


def test_the_command_converts_and_refuses_what_mlx_cannot_do(tmp_path: Path, source: Path) -> None:
    assert convert_command([str(source), str(tmp_path / "a"), "--mode", "mxfp4"]) == 0
    tensors = load(tmp_path / "a")
    assert tensors["model.layers.3.mlp.switch_mlp.gate_proj.scales"].dtype == mx.uint8
    assert "model.layers.3.mlp.switch_mlp.gate_proj.biases" not in tensors
    with pytest.raises(CheckpointError, match=r"takes bits of \[2, 3, 4, 5, 6, 8\]"):
        convert_command([str(source), str(tmp_path / "b"), "--bits", "7"])
    for zero in ("--bits", "--group-size", "--experts-bits", "--embed-bits"):
        with pytest.raises(CheckpointError, match="mode affine takes bits"):
            convert_command([str(source), str(tmp_path / "b"), zero, "0"])


def test_a_missing_expert_is_named(tmp_path: Path, weights: dict[str, Array]) -> None:
    cut = {name: w for name, w in weights.items() if ".3.mlp.experts.5." not in name}
    with pytest.raises(CheckpointError, match=r"7 of 8 experts are there; missing \[5\]"):
        convert(save_checkpoint(tmp_path / "source", SHARED, cut), tmp_path / "target", FOUR_BITS)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (
            "experts.5.up_proj.weight",
            np.zeros((32, 64), np.float16),
            r"experts\.5.*F16.*first expert is .*F32",
        ),
        ("experts.5.up_proj.weight", np.zeros((32, 63), np.float32), r"experts\.5.*first expert"),
        ("experts.0.up_proj.weight", np.zeros(32 * 64, np.float32), "has not 2 dimensions"),
        ("experts.down_proj", np.zeros((64, 32), np.float32), "has not 3 dimensions"),
    ],
)
def test_experts_that_are_no_matrices_of_one_kind_are_refused_before_anything_is_written(
    tmp_path: Path, weights: dict[str, Array], name: str, array: Array, message: str
) -> None:
    changed = weights | {f"model.layers.4.mlp.{name}": array}
    with pytest.raises(CheckpointError, match=message):
        convert(save_checkpoint(tmp_path / "source", SHARED, changed), tmp_path / "target", FOUR_BITS)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("lacking", "message"),
    [
        ("model.norm.", r"missing model\.norm\.weight"),
        ("model.layers.10.", r"missing model\.layers\.10\."),
        ("model.layers.5.mlp.experts.", r"missing model\.layers\.5\.mlp\.switch_mlp\.down_proj\.weight"),
    ],
)
def test_a_source_that_makes_no_whole_model_is_refused_before_anything_is_written(
    tmp_path: Path, weights: dict[str, Array], lacking: str, message: str
) -> None:
    cut = {name: w for name, w in weights.items() if not name.startswith(lacking)}
    with pytest.raises(CheckpointError, match=message):
        convert(save_checkpoint(tmp_path / "source", SHARED, cut), tmp_path / "target", FOUR_BITS)
    assert not (tmp_path / "target").exists()

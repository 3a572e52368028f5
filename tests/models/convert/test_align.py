"""`glmserve align`: an expert becomes one read, and one complete copy exists at any moment."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from config.errors import CheckpointError, UsageError
from models.arithmetic import Quantization
from models.convert.align import SPARE_BYTES, STATE_NAME, _InPlace, _open, align
from models.loading.loading import Checkpoint, open_checkpoint
from server.cli import main
from streaming.files.headers import INDEX_NAME
from streaming.files.in_use import shared_use, sole_use
from streaming.files.read_plan import plan_runs
from tests.checkpoints import save_packed
from tests.grids import few
from tests.models.loading.test_odd_checkpoints import wrapped
from tests.models.make_golden import SEED
from tests.tiny_glm import ALL_FULL, SHARED, fuse_experts, make_weights, save_checkpoint

ROOT = Path(__file__).parents[3]
PAGE = 16_384
# Every part of an expert is a number of whole pages, as in GLM-5.2.
SIZES = {
    "hidden_size": 512, "moe_intermediate_size": 512, "intermediate_size": 512, "num_hidden_layers": 6,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 3, "n_routed_experts": 4,
}  # fmt: skip
PAGED = SHARED | SIZES
PACKED = Quantization(32, 4)

Bytes = dict[tuple[int, int, str], bytes]


def experts_of(checkpoint: Checkpoint) -> Bytes:
    index = checkpoint.experts
    found = {}
    for layer in index.layers:
        for expert in range(index.num_experts):
            for part, path, offset in index.pieces(layer, expert):
                with open(path, "rb") as file:
                    file.seek(offset)
                    found[layer, expert, part.name] = file.read(part.nbytes)
    return found


def trunk_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    found = {}
    for name, entry in checkpoint.trunk.items():
        with open(entry.path, "rb") as file:
            file.seek(entry.offset)
            found[name] = file.read(entry.nbytes)
    return found


def contents(directory: Path) -> tuple[Bytes, dict[str, bytes]]:
    checkpoint = open_checkpoint(directory)
    return experts_of(checkpoint), trunk_of(checkpoint)


def assert_indexed(directory: Path) -> None:
    """The index names what the files hold: other programs believe it."""
    weight_map = json.loads((directory / INDEX_NAME).read_text())["weight_map"]
    held = {file: set(mx.load(str(directory / file))) for file in set(weight_map.values())}
    assert all(name in held[file] for name, file in weight_map.items())


def split(directory: Path, num_tensors: int) -> None:
    """Several tensors to a file, whatever their layer, as savers do that cut at a size."""
    tensors = mx.load(str(directory / "model.safetensors"))
    assert isinstance(tensors, dict)
    names = sorted(tensors)
    (directory / "model.safetensors").rename(directory / "whole")
    weight_map: dict[str, str] = {}
    for first in range(0, len(names), num_tensors):
        file = f"model-{first:05d}.safetensors"
        some = names[first : first + num_tensors]
        mx.save_safetensors(str(directory / file), {name: tensors[name] for name in some}, {"format": "mlx"})
        weight_map |= dict.fromkeys(some, file)
    (directory / "whole").unlink()
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 7}, "weight_map": weight_map}))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by mlx's own saver, in files of nine tensors."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    weights = make_weights(PAGED, SEED)
    save_packed(directory, PAGED, weights, lambda path: PACKED if ".switch_mlp." in path else None)
    split(directory, 9)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    return directory


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def assert_aligned(directory: Path) -> None:
    index = open_checkpoint(directory).experts
    for layer in index.layers:
        for expert in range(index.num_experts):
            [run] = plan_runs(index.pieces(layer, expert))
            assert run.offset % PAGE == 0
            assert run.nbytes == index.expert_bytes(layer)
            assert all(offset % PAGE == 0 for _, _, offset in index.pieces(layer, expert))


def test_in_place_the_tensors_stay_and_an_expert_is_one_read(directory: Path, saved: Path) -> None:
    before = contents(directory)
    heard: list[tuple[int, int]] = []
    written = align(directory, on_progress=lambda done, total: heard.append((done, total)))
    assert contents(directory) == before
    assert_aligned(directory)
    assert heard[-1] == (written, written)
    assert {path.name for path in directory.iterdir() if path.suffix != ".safetensors"} == {
        path.name for path in saved.iterdir() if path.suffix != ".safetensors"
    }
    named = set(json.loads((directory / INDEX_NAME).read_text())["weight_map"].values())
    assert {path.name for path in directory.glob("*.safetensors")} == named
    assert json.loads((directory / INDEX_NAME).read_text())["metadata"] == {"total_size": 7}
    assert align(directory) == 0


def test_a_copy_elsewhere_has_the_same_bytes_as_one_in_place_and_leaves_the_source(
    directory: Path, saved: Path, tmp_path: Path
) -> None:
    target = tmp_path / "copy"
    before = {path.name: path.read_bytes() for path in saved.iterdir() if path.is_file()}
    align(saved, target)
    assert {path.name: path.read_bytes() for path in saved.iterdir() if path.is_file()} == before
    align(directory)
    for path in directory.iterdir():
        if path.is_file():
            assert (target / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in target.iterdir()} == {path.name for path in directory.iterdir()}
    assert_aligned(target)


@pytest.mark.parametrize(
    "layout",
    few(["one file", "no index", "separate", "fused", "wrapped", "stale index"], ["no index", "fused"]),
)
def test_every_layout_that_is_served_can_be_aligned(tmp_path: Path, layout: str) -> None:
    weights = make_weights(PAGED, SEED)
    if layout in ("one file", "no index"):
        save_packed(tmp_path, PAGED, weights, lambda path: PACKED if ".switch_mlp." in path else None)
    else:
        made = {"fused": fuse_experts(weights, PAGED)}.get(layout, weights)
        if layout == "wrapped":
            made = wrapped(weights, "language_model.model.", "language_model.lm_head.")
            made |= {"vision_tower.weight": np.ones(3, np.float32)}
        save_checkpoint(tmp_path, PAGED, made)
    if layout == "no index":
        split(tmp_path, 50)
        (tmp_path / INDEX_NAME).unlink()
    if layout == "stale index":
        (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"x": "model-9.safetensors"}}))
    before = contents(tmp_path)
    align(tmp_path)
    assert contents(tmp_path) == before
    weight_map = json.loads((tmp_path / INDEX_NAME).read_text())["weight_map"]
    assert ("vision_tower.weight" in weight_map) is (layout == "wrapped")
    index = open_checkpoint(tmp_path).experts
    for layer in index.layers:
        pieces = sorted(index.pieces(layer, 3), key=lambda piece: piece.offset)
        ends = [piece.offset + piece.part.nbytes for piece in pieces]
        assert ends[:-1] == [piece.offset for piece in pieces[1:]]
        assert pieces[0].offset % PAGE == 0


def test_the_result_loads_in_mlx_lm(tmp_path: Path) -> None:
    """mlx-lm, of this version, wants an indexer in every layer."""
    config, directory = ALL_FULL | {name: PAGED[name] for name in SIZES}, tmp_path
    weights = make_weights(config, SEED)
    save_packed(directory, config, weights, lambda path: PACKED if ".switch_mlp." in path else None)
    split(directory, 9)

    def loaded() -> dict[str, Any]:
        config = json.loads((directory / "config.json").read_text())
        needed = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
        (directory / "config.json").write_text(json.dumps(config | needed))
        from mlx_lm.utils import load_model  # seconds, so not where tests are collected

        model: Any = load_model(directory, lazy=True)[0]
        return {
            name: np.array(mx.array(array).astype(mx.float32))
            for name, array in dict(tree_flatten(model.parameters())).items()
        }

    before = loaded()
    align(directory)
    after = loaded()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


class Crash(BaseException):
    """The process ends here."""


def run_until(
    monkeypatch: pytest.MonkeyPatch, directory: Path, target: Path | None, at: int, made: list[str]
) -> bool:
    """Aligns with a crash once `at` changes of the folder were `made`; whether there was one."""

    def before(call: Any) -> Any:
        def wrapper(*args: Any, **named: Any) -> Any:
            if len(made) == at:
                raise Crash
            made.append(call.__name__)
            return call(*args, **named)

        return wrapper

    with monkeypatch.context() as patch:
        for owner, name in ((Path, "replace"), (Path, "unlink"), (os, "pwrite"), (os, "fsync")):
            patch.setattr(owner, name, before(getattr(owner, name)))
        try:
            align(directory, target)
        except Crash:
            return True
    return False


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_a_crash_before_any_change_leaves_a_complete_copy_and_the_same_command_ends_it(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_elsewhere: bool
) -> None:
    before = contents(saved)
    rng = random.Random(0)
    directory, target = tmp_path / "model", (tmp_path / "copy" if is_elsewhere else None)
    shutil.copytree(saved, directory)
    at, num_crashes = 0, 0
    while run_until(monkeypatch, directory, target, at, []):
        num_crashes += 1
        assert contents(directory) == before
        at = rng.randrange(1, 12) if num_crashes < 40 else 10**9
    assert num_crashes >= 20
    assert contents(target or directory) == before
    assert_aligned(target or directory)
    assert not list((target or directory).glob("*.partial"))
    assert not ((target or directory) / STATE_NAME).exists()


def test_a_crash_before_a_renaming_or_a_removal_leaves_an_index_that_others_can_believe(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own reader finds tensors without an index, so it would not notice."""
    before, made = contents(saved), list[str]()
    run_until(monkeypatch, Path(shutil.copytree(saved, tmp_path / "whole")), None, 10**9, made)
    moments = [at for at, name in enumerate(made) if name in ("replace", "unlink")]
    for at in random.Random(0).sample(moments, 8):
        directory = Path(shutil.copytree(saved, tmp_path / str(at)))
        assert run_until(monkeypatch, directory, None, at, [])
        assert_indexed(directory)
        align(directory)
        assert contents(directory) == before
        shutil.rmtree(directory)


@pytest.mark.slow
def test_a_process_that_is_killed_at_random_moments_goes_on(directory: Path) -> None:
    before, rng = contents(directory), random.Random(1)
    command = [sys.executable, "-m", "server.cli", "align", str(directory)]
    for _ in range(20):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        entries = set(os.listdir(directory))
        while process.poll() is None and set(os.listdir(directory)) == entries:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert contents(directory) == before
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert contents(directory) == before
    assert_aligned(directory)


def test_the_hugging_face_caches_files_are_never_rewritten(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--org--glm"
    shutil.copytree(saved, repo / "blobs")
    (snapshot := repo / "snapshots" / "abc").mkdir(parents=True)
    for path in (repo / "blobs").iterdir():
        (snapshot / path.name).symlink_to(path)
    before = {path.name: path.read_bytes() for path in (repo / "blobs").iterdir() if path.is_file()}
    assert main(["align", "org/glm"]) == 2
    assert f"glmserve align {snapshot} DST" in capsys.readouterr().err
    assert main(["align", "org/glm", str(tmp_path / "copy")]) == 0
    assert {path.name: path.read_bytes() for path in (repo / "blobs").iterdir() if path.is_file()} == before
    assert contents(tmp_path / "copy") == contents(saved)


def test_a_folder_that_a_server_uses_is_refused_and_a_server_refuses_one_that_is_rewritten(
    directory: Path,
) -> None:
    refused = pytest.raises(UsageError, match="a server or another command is using it")
    with shared_use(directory), shared_use(directory), refused:
        align(directory)
    with (
        sole_use(directory),
        pytest.raises(UsageError, match="being rewritten"),
        shared_use(directory),
    ):
        pass
    align(directory)


def test_too_little_room_is_said_before_anything_is_written(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(directory.iterdir())
    usage = shutil.disk_usage(tmp_path)
    free = SPARE_BYTES + 10**6
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    with pytest.raises(UsageError, match=r"are needed beside what is there, the disk has"):
        align(directory)
    assert sorted(directory.iterdir()) == before


def test_in_place_the_room_that_is_needed_is_some_files_and_not_all(directory: Path) -> None:
    tensors, index = _open(directory)
    sizes = sorted(path.stat().st_size for path in directory.glob("*.safetensors"))
    layer = max(index.expert_bytes(layer) * index.num_experts for layer in index.layers)
    assert _InPlace(directory, tensors, index)._most_bytes() <= 2 * layer + 2 * sizes[-1]


def test_bytes_that_do_not_come_back_stop_it_with_the_old_file_in_place(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, pwrite = contents(directory), os.pwrite

    def spoil(fd: int, data: Any, offset: int) -> int:
        spoiled = bytes(data)
        return pwrite(fd, spoiled[:-1] + bytes([spoiled[-1] ^ 1]) if offset > 10**6 else spoiled, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", spoil)
        with pytest.raises(CheckpointError, match="does not come back as it was"):
            align(directory)
    assert contents(directory) == before


@pytest.mark.parametrize("there", ["a file", "a folder", "another copy"])
def test_a_folder_that_is_no_unfinished_copy_is_left_alone(saved: Path, tmp_path: Path, there: str) -> None:
    target = tmp_path / "copy"
    if there == "a file":
        target.write_text("x")
    else:
        target.mkdir()
        (target / "x").write_text("x")
        if there == "another copy":
            (target / STATE_NAME).write_text(json.dumps({"source": "/elsewhere", "files": {}}))
    with pytest.raises(UsageError, match="no unfinished copy of this checkpoint"):
        align(saved, target)
    assert there == "a file" or (target / "x").read_text() == "x"


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.4.mlp.experts.1.up_proj.weight"])
def test_what_is_not_complete_is_refused(tmp_path: Path, lost: str) -> None:
    weights = {name: array for name, array in make_weights(SHARED, SEED).items() if name != lost}
    save_checkpoint(tmp_path, SHARED, weights)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError):
        align(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

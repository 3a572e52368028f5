"""A fingerprint differs where saved rows must not be used, and only there."""

from pathlib import Path

import pytest

from models.args import ModelArgs
from models.arithmetic import CPU, CUDA
from models.families import FAMILIES
from models.loading.fingerprint import COMPUTING, cache_fingerprint, source_meaning
from streaming.files.headers import INDEX_NAME
from tests.tiny_glm import SHARED, make_weights, save_checkpoint

ARGS = ModelArgs.from_config(SHARED)
ROOT = Path(__file__).parents[3] / "models"


def test_the_fingerprint_tells_checkpoints_and_arithmetic_apart(tmp_path: Path) -> None:
    weights = make_weights(SHARED, 1)
    one = save_checkpoint(tmp_path / "one", SHARED, weights)
    found = {cache_fingerprint(one, ARGS, CPU), cache_fingerprint(one, ARGS, CUDA)}
    assert cache_fingerprint(one, ARGS, CPU) in found
    two = save_checkpoint(tmp_path / "two", SHARED, make_weights(SHARED, 2))
    found |= {
        cache_fingerprint(two, ARGS, CPU),
        cache_fingerprint(two, ModelArgs.from_config(SHARED | {"index_topk": 9}), CPU),
    }
    assert len(found) == 4


def test_the_fingerprint_reads_the_files_that_the_index_names_whatever_their_names(tmp_path: Path) -> None:
    found = set()
    for seed in (1, 2):
        directory = save_checkpoint(tmp_path / str(seed), SHARED, make_weights(SHARED, seed))
        index = directory / INDEX_NAME
        index.write_text(index.read_text().replace("model-", "weights-"))
        for path in directory.glob("model-*.safetensors"):
            path.rename(path.with_name(path.name.replace("model-", "weights-")))
        found.add(cache_fingerprint(directory, ARGS, CPU, knows_times=False))
    assert len(found) == 2


SOURCE = """
def scale(x):
    \"\"\"Halves a value.\"\"\"
    return x * 0.5  # exact
"""


@pytest.mark.parametrize(
    ("old", "new"), [("Halves a value.", "Divides by two."), ("exact", "rounds"), ("x * 0.5", "(x * 0.5)")]
)
def test_words_about_the_code_keep_the_fingerprint(old: str, new: str) -> None:
    assert source_meaning(SOURCE.replace(old, new)) == source_meaning(SOURCE)


@pytest.mark.parametrize(("old", "new"), [("*", "+"), ("0.5", "0.25"), ("x * 0.5", "y * 0.5")])
def test_another_computation_is_another_fingerprint(old: str, new: str) -> None:
    assert source_meaning(SOURCE.replace(old, new)) != source_meaning(SOURCE)


def test_every_pattern_of_computing_files_finds_files() -> None:
    assert all(list(ROOT.glob(pattern)) for pattern in COMPUTING)


def test_the_code_of_one_architecture_is_no_part_of_anothers_fingerprint() -> None:
    shared = {path for pattern in COMPUTING for path in ROOT.glob(pattern)}
    own = [{path for pattern in one.computing_files for path in ROOT.glob(pattern)} for one in FAMILIES]
    assert [bool(files) for files in own] == [False, True], "GLM-5.2 computes with what all share"
    assert all(not files & shared for files in own)

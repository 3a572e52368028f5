"""The Hugging Face cache: looked for where huggingface_hub itself looks, at any revision."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from config.errors import CheckpointError
from server.commands.checkpoint import choose_checkpoint, find_checkpoint
from server.commands.hub_cache import cache_folder
from tests.server.commands.test_checkpoint import write_snapshot

NAMES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"HF_HUB_CACHE": "~/hub"},
        {"HF_HUB_CACHE": "$DISK/hub"},
        {"HUGGINGFACE_HUB_CACHE": "/old"},
        {"HUGGINGFACE_HUB_CACHE": "~/$DISK/old", "HF_HOME": "/home"},
        {"HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "/new"},
        {"HF_HOME": "~/models"},
        {"HF_HOME": "${DISK}/models", "XDG_CACHE_HOME": "/cache"},
        {"XDG_CACHE_HOME": "/cache"},
        {"XDG_CACHE_HOME": "~/cache"},
        {"XDG_CACHE_HOME": "$DISK/cache", "HF_HOME": ""},
    ],
    ids=str,
)
def test_the_cache_is_where_huggingface_hub_has_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {**variables, "DISK": "/Volumes/disk", "HOME": "/home/me"}.items():
        monkeypatch.setenv(name, value)
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    theirs = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True
    )
    assert cache_folder() == Path(theirs.stdout.strip())


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with two snapshots, of which a branch, a tag and a pull request name the older."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--org--glm"
    for age, commit in enumerate(("b" * 40, "a" * 40)):
        write_snapshot(folder, "glm_moe_dsa").rename(folder / "snapshots" / commit)
        os.utime(folder / "snapshots" / commit, (1000 - age, 1000 - age))
    for name in ("dev", "v1.0", "refs/pr/3"):
        (folder / "refs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / name).write_text("a" * 40)
    return folder


@pytest.mark.parametrize("revision", ["dev", "v1.0", "refs/pr/3", "a" * 40, "a" * 7, "a" * 12])
def test_a_revision_is_found_by_branch_tag_or_commit(repo: Path, revision: str) -> None:
    assert find_checkpoint(f"org/glm@{revision}") == repo / "snapshots" / ("a" * 40)


@pytest.mark.parametrize("revision", ["main", "v2", "c" * 40, "a", "../../x", "dev/.."])
def test_a_revision_that_was_not_downloaded_is_said_with_the_command(repo: Path, revision: str) -> None:
    with pytest.raises(CheckpointError, match=r"neither a folder nor in the Hugging Face cache") as caught:
        find_checkpoint(f"org/glm@{revision}")
    assert f"hf download org/glm --revision {revision}" in str(caught.value)


def test_without_a_main_the_latest_snapshot_is_served_by_name_or_none(
    repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_checkpoint("org/glm") == repo / "snapshots" / ("b" * 40)
    assert choose_checkpoint(None).directory == repo / "snapshots" / ("b" * 40)
    (repo / "refs" / "main").write_text("a" * 40 + "\n")
    assert find_checkpoint("org/glm") == repo / "snapshots" / ("a" * 40)


def test_a_folder_with_an_at_sign_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_snapshot(tmp_path / "org" / "glm@2", "glm_moe_dsa")
    assert find_checkpoint("org/glm@2/snapshots/main").resolve() == folder
    (folder / "config.json").write_text(json.dumps({}))

"""`glmserve plan REPO` over a Hub on this machine that holds a sharded repository: only headers travel."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from models.loading.public_formats import PUBLIC_FORMATS, PublicFormat, write_hollow
from streaming.files.headers import read_headers
from tests.server.commands.local_hub import HubHandler, serving

ROOT = Path(__file__).parents[3]
COMMIT = "b" * 40


class FolderHub(HubHandler):
    """Serves a folder as the repository org/big, whole or in ranges, and notes how much was sent."""

    folder: Path
    num_sent: int

    def answer(self, *, sends_body: bool) -> None:
        path = self.folder / self.path.partition("?")[0].partition("/resolve/")[2].partition("/")[2]
        if not self.path.startswith("/org/big/resolve/") or not path.is_file():
            self.send_head(404, {"X-Error-Code": "EntryNotFound", "Content-Length": "0"})
            return
        size = path.stat().st_size
        first, last = 0, size - 1
        if asked := self.headers.get("Range"):
            low, _, high = asked.removeprefix("bytes=").partition("-")
            first, last = int(low), min(int(high), last) if high else last
        length = last - first + 1
        headers = {"Content-Length": str(length), "ETag": '"1"', "X-Repo-Commit": COMMIT}
        self.send_head(206 if asked else 200, headers | {"Content-Range": f"bytes {first}-{last}/{size}"})
        if sends_body:
            type(self).num_sent += length
            with open(path, "rb") as file:
                file.seek(first)
                self.wfile.write(file.read(length))


@contextmanager
def hub(folder: Path) -> Iterator[str]:
    FolderHub.folder, FolderHub.num_sent = folder, 0
    with serving(FolderHub) as url:
        yield url


def plan(endpoint: str, cache: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the Hub's library reads its endpoint when it is imported."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("GLMSERVE_")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": "1"}
    flags = ["--memory", "128G", "--ram-budget", "100G", "--json"]
    command = [sys.executable, "-m", "server.cli", "plan", *words, *flags]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def sharded(folder: Path, one: PublicFormat, layers: int) -> Path:
    """Hole files of the first layers, with the index that sharded repositories have."""
    folder.mkdir()
    write_hollow(folder, one, layers)
    places = {name: entry.path.name for name, entry in read_headers(folder).items()}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "layers", "name"), [(0, 6, "org/big"), (1, 5, "org/big@main"), (2, 9, "org/big@v1.0")]
)
def test_a_plan_over_the_hub_is_that_of_files_of_its_shapes(
    tmp_path: Path, number: int, layers: int, name: str
) -> None:
    folder = sharded(tmp_path / "repo", PUBLIC_FORMATS[number], layers)
    with hub(folder) as endpoint:
        remote = plan(endpoint, tmp_path / "cache", name)
    local = plan("http://127.0.0.1:1", tmp_path / "cache", str(folder), "--stream-experts")
    assert remote.returncode == local.returncode == 0, (remote.stderr, local.stderr)
    assert json.loads(remote.stdout) == json.loads(local.stdout)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert FolderHub.num_sent < 3_000_000 < weights / 100, "headers only"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["config", "shard", "garbage", "repository"])
def test_what_the_hub_lacks_is_one_line(tmp_path: Path, fault: str) -> None:
    folder = sharded(tmp_path / "repo", PUBLIC_FORMATS[0], 5)
    match fault:
        case "config":
            (folder / "config.json").unlink()
        case "shard":
            (folder / "model-00004.safetensors").unlink()
        case "garbage":
            (folder / "model-00004.safetensors").write_bytes(b"<html>" * 30_000)
    with hub(folder) as endpoint:
        name = "org/other" if fault == "repository" else "org/big"
        done = plan(endpoint, tmp_path / "cache", name)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().count("\n") == 0, done.stderr
    assert done.stderr.startswith("glmserve: ")

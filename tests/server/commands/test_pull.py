"""`glmserve pull` against a Hub on this machine: sizes first, resumed, verified; `plan` needs no weights."""

import hashlib
import json
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from config.errors import UsageError
from models.loading.public_formats import PUBLIC_FORMATS, find_format, write_hollow
from server.cli import main
from server.commands.checkpoint import POCKET, find_checkpoint
from server.commands.hub_cache import find_snapshot
from server.commands.pull_command import pull_command
from tests.server.commands.local_hub import HubHandler, serving

COMMIT = "a" * 40
FILES = {
    path.name: path.read_bytes()
    for path in POCKET.iterdir()
    if path.suffix in (".json", ".safetensors", ".jinja")
}


def _size_of(raw: bytes) -> dict[str, Any]:
    lfs = {
        "sha256": hashlib.sha256(raw).hexdigest(),
        "oid": hashlib.sha256(raw).hexdigest(),
        "size": len(raw),
    }
    return {"size": len(raw), "lfs": lfs | {"pointerSize": 1}}


class Hub(HubHandler):
    """As much of the Hub as the library asks of it."""

    asked: list[str]

    def answer(self, *, sends_body: bool) -> None:
        path = self.path.partition("?")[0]
        if "/org/pocket/tree/" in path:
            files = [
                {"type": "file", "path": name, "oid": "0", **_size_of(raw)} for name, raw in FILES.items()
            ]
            self._send(json.dumps(files).encode(), {})
            return
        if path.startswith("/api/models/org/pocket"):
            siblings = [{"rfilename": name, **_size_of(raw)} for name, raw in FILES.items()]
            self._send(json.dumps({"id": "org/pocket", "sha": COMMIT, "siblings": siblings}).encode(), {})
            return
        raw = FILES.get(path.rpartition("/")[2])
        if raw is None or "/org/pocket/" not in path:
            self.send_head(404, {"X-Error-Code": "RepoNotFound", "Content-Length": "0"})
            return
        digest = hashlib.sha256(raw).hexdigest()
        if sends_body:
            type(self).asked.append(path.rpartition("/")[2])
        self._send(
            raw if sends_body else b"",
            {
                "ETag": f'"{digest}"',
                "X-Repo-Commit": COMMIT,
                "X-Linked-Size": str(len(raw)),
                "X-Linked-Etag": f'"{digest}"',
            },
            len(raw),
        )

    def _send(self, raw: bytes, headers: dict[str, str], size: int | None = None) -> None:
        self.send_head(200, {"Content-Length": str(size or len(raw)), **headers})
        self.wfile.write(raw)


@contextmanager
def hub() -> Iterator[str]:
    Hub.asked = []
    with serving(Hub) as url:
        yield url


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    return tmp_path


def test_what_is_pulled_is_complete_and_a_second_time_nothing_is_fetched(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with hub() as url:
        assert pull_command(["org/pocket", "--json"], url) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["bytes"] == sum(map(len, FILES.values()))
        assert find_checkpoint("org/pocket") == Path(report["folder"])
        assert set(Hub.asked) == set(FILES)
        Hub.asked = []
        assert pull_command(["org/pocket"], url) == 0
        assert Hub.asked == []


def test_what_is_absent_or_damaged_is_fetched_again(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hub() as url:
        pull_command(["org/pocket"], url)
        snapshot = find_snapshot("org/pocket", None)
        assert snapshot
        damaged, absent = "model-00001-of-00002.safetensors", "tokenizer.json"
        blob = (snapshot / damaged).resolve()
        blob.write_bytes(b"x" * blob.stat().st_size)
        (snapshot / absent).resolve().unlink()
        (snapshot / absent).unlink()
        Hub.asked = []
        assert pull_command(["org/pocket"], url) == 0
        assert set(Hub.asked) == {damaged, absent}
        assert all((snapshot / name).read_bytes() == raw for name, raw in FILES.items())
    assert "to download" in capsys.readouterr().err


def test_a_full_disk_and_an_unknown_repository_are_said_before_anything_is_fetched(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub() as url:
        with pytest.raises(UsageError, match="no repository org/nothing"):
            pull_command(["org/nothing"], url)
        usage = shutil.disk_usage(cache)
        monkeypatch.setattr(
            "server.commands.pull_command.shutil.disk_usage", lambda path: usage._replace(free=10**6)
        )
        with pytest.raises(UsageError, match="HF_HOME"):
            pull_command(["org/pocket"], url)
        assert Hub.asked == []


@pytest.mark.parametrize("command", ["pull", "plan"])
@pytest.mark.parametrize("is_silent", [False, True])
def test_a_hub_that_does_not_answer_is_one_line_and_soon(
    cache: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    is_silent: bool,
) -> None:
    monkeypatch.setattr("server.commands.hub_cache.PATIENCE_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        if not is_silent:
            silent.close()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        began_s = time.monotonic()
        assert main([command, "org/pocket"]) == 2
    assert time.monotonic() - began_s < 5, "the library itself tries for 24 s"
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"http://127.0.0.1:{port} does not answer" in told
    assert "HF_ENDPOINT" in told


def test_a_hub_that_falls_silent_later_is_one_line_too(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("server.commands.pull_command.check_hub", lambda endpoint: None)
    assert main(["pull", "org/pocket"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["x"], ["--lst"], ["a/b/c"]])
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(["pull", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_the_list_says_what_each_needs(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["repo"] for one in listed] == [one.repo for one in PUBLIC_FORMATS]
    assert all(20e9 < one["minimum_budget_bytes"] < 40e9 and one["cached"] == "no" for one in listed)


def test_the_names_in_the_list_can_be_copied(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "--list"]) == 0
    told = capsys.readouterr().out
    assert [one.repo for one in PUBLIC_FORMATS if one.repo not in told] == []


def test_the_readme_has_the_numbers_of_the_list(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "--list", "--json"]) == 0
    slots = {one["repo"]: one["slots_per_layer"] for one in json.loads(capsys.readouterr().out)}
    text = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w./-]+)` \|.*\| (\d+) \|$", text, re.MULTILINE)
    assert {repo: int(number) for repo, number in rows} == slots
    [short, long] = re.findall(r"leave (\d+) slots a layer for experts, 131,072 leave (\d+)", text)[0]
    flags = ("glm-5.2", "--memory", "128G", "--ram-budget", "100G")
    planned = [plan(capsys, *flags, "--max-context", context) for context in ("32768", "131072")]
    assert [min(one["slots_per_layer"]) for one in planned] == [int(short), int(long)]


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("one", PUBLIC_FORMATS, ids=lambda one: one.repo)
def test_a_plan_of_a_public_format_is_that_of_files_of_its_shapes(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], one: Any
) -> None:
    (folder := tmp_path / "hollow").mkdir()
    write_hollow(folder, one)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert abs(size - one.disk_bytes) < 0.002 * one.disk_bytes, "the repository's own size"
    flags = ("--memory", "128G", "--disk", "7GB/s")
    by_name = plan(capsys, one.repo, *flags)
    assert by_name == plan(capsys, str(folder), "--stream-experts", *flags)
    assert by_name["budget_bytes"] == int(0.8 * 128e9)
    assert 1 < by_name["forecast"]["tokens_per_s"] < 5
    faster = plan(capsys, one.repo, "--memory", "128G", "--disk", "14GB/s")["forecast"]
    assert faster["tokens_per_s"] > by_name["forecast"]["tokens_per_s"]
    assert faster["first_token_s"] < by_name["forecast"]["first_token_s"]


@pytest.mark.parametrize("name", ["z-ai/glm-5.2", "glm-5.2", "zai-org/GLM-5.2", "openrouter/z-ai/glm-5.2"])
def test_served_ids_mean_a_public_format(name: str) -> None:
    assert find_format(name) is PUBLIC_FORMATS[0]
    assert find_format("someone/llama") is None


@pytest.mark.parametrize(
    "words",
    [
        ["--memory", "lots"],
        ["--disk", "fast"],
        ["--disk", "7"],
        ["--disk", "56Gb/s"],
        ["--disk", "80%"],
        ["--memory", "8G", "--ram-budget", "9G"],
    ],
)
def test_a_plan_with_no_sense_is_one_line(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(["plan", "glm-5.2", *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1

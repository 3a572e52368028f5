"""The command `glmserve pull REPO[@REVISION]`: downloads a checkpoint and verifies it.

Sizes and free disk are told first; a download that was cut goes on; what is there already is verified. With
`--list` it tells which public repositories are known to run.
"""

import hashlib
import json
import shutil
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from config.errors import CheckpointError, UsageError
from config.sizes import format_size
from models.loading.public_formats import PUBLIC_FORMATS, write_hollow
from server.commands.checkpoint import find_checkpoint
from server.commands.flags import FlagParser
from server.commands.hub_cache import cache_folder, check_hub, find_snapshot, hub_errors, parse_repo

# What is served of a repository; weights in other formats, and pictures, stay where they are.
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
# Kept free beside a download: a disk that is full stops more than this program.
RESERVE_BYTES = 5 * 10**9
CHUNK_BYTES = 8 * 2**20
BUDGET_BYTES, CONTEXT = 100 * 10**9, 32768


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its size, and its digest where the Hub has one."""

    name: str
    num_bytes: int
    sha256: str | None


def pull_command(words: Sequence[str], endpoint: str | None = None) -> int:
    """Reads the words after `pull`. `endpoint` is another Hub than the usual one."""
    given = _parser().parse_args(words)
    if given.list:
        return list_repositories(is_json=given.json)
    if given.repo is None:
        raise UsageError("say which: glmserve pull org/name[@revision]; glmserve pull --list knows some")
    parsed = parse_repo(given.repo)
    if parsed is None:
        raise UsageError(f"{given.repo!r} is not a repository; write org/name or org/name@revision")
    report = _pull(*parsed, endpoint)
    if given.json:
        print(json.dumps(report, indent=2))
    return 0


def _parser() -> ArgumentParser:
    parser = FlagParser(prog="glmserve pull", description="Downloads a checkpoint and verifies it.")
    parser.add_argument("repo", metavar="REPO", nargs="?", help="org/name or org/name@revision")
    parser.add_argument("--list", action="store_true", help="repositories that are known to run")
    parser.add_argument("--json", action="store_true", help="the result for programs")
    return parser


def _pull(repo: str, revision: str | None, endpoint: str | None) -> dict[str, Any]:
    console = Console(stderr=True)
    check_hub(endpoint)
    with _explained(repo):
        commit, files = _files_of(repo, revision, endpoint)
        absent = [one for one in files if not _is_here(repo, commit, one)]
        _check_room(console, repo, files, absent)
        snapshot = _download(repo, commit, endpoint)
        damaged = _damaged(console, snapshot, files)
        if damaged:
            console.print(f"{len(damaged)} files are damaged and are fetched again: {', '.join(damaged)}")
            for name in damaged:
                (snapshot / name).resolve().unlink(missing_ok=True)
                (snapshot / name).unlink(missing_ok=True)
            snapshot = _download(repo, commit, endpoint)
            if damaged := _damaged(console, snapshot, files):
                raise UsageError(f"{repo}: what the Hub sent is damaged: {', '.join(damaged)}; try again")
    _note_branch(snapshot, revision, commit)
    find_checkpoint(str(snapshot))
    console.print(f"{repo} is complete and verified: glmserve --model {repo} --stream-experts")
    total = sum(one.num_bytes for one in files)
    return {"repo": repo, "commit": commit, "folder": str(snapshot), "bytes": total, "files": len(files)}


def _files_of(repo: str, revision: str | None, endpoint: str | None) -> tuple[str, list[RemoteFile]]:
    from huggingface_hub import HfApi

    info = HfApi(endpoint=endpoint).model_info(repo, revision=revision, files_metadata=True)
    files = [
        RemoteFile(one.rfilename, one.size or 0, one.lfs.sha256 if one.lfs else None)
        for one in info.siblings or ()
        if any(fnmatch(one.rfilename, pattern) for pattern in WANTED)
    ]
    if not any(one.name.endswith(".safetensors") for one in files):
        raise UsageError(f"{repo} holds no safetensors, so nothing here could read it")
    return info.sha or revision or "main", files


def _is_here(repo: str, commit: str, file: RemoteFile) -> bool:
    snapshot = find_snapshot(repo, commit)
    path = snapshot / file.name if snapshot else None
    return path is not None and path.exists() and path.stat().st_size == file.num_bytes


def _check_room(
    console: Console, repo: str, files: Sequence[RemoteFile], absent: Sequence[RemoteFile]
) -> None:
    folder = cache_folder()
    existing = next(one for one in (folder, *folder.parents) if one.exists())
    free, missing = shutil.disk_usage(existing).free, sum(one.num_bytes for one in absent)
    total = sum(one.num_bytes for one in files)
    console.print(
        f"{repo}: {format_size(total)} in {len(files)} files, {format_size(missing)} to download, "
        f"{format_size(free)} free in {folder}"
    )
    if missing and missing + RESERVE_BYTES > free:
        raise UsageError(
            f"{repo} needs {format_size(missing)} and {format_size(RESERVE_BYTES)} of room, and {folder} has "
            f"{format_size(free)}; free some, or set HF_HOME to a folder on another disk"
        )


def _download(repo: str, commit: str, endpoint: str | None) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        repo, revision=commit, allow_patterns=list(WANTED), cache_dir=cache_folder(), endpoint=endpoint
    )
    return Path(folder)


def _damaged(console: Console, snapshot: Path, files: Iterable[RemoteFile]) -> list[str]:
    """Files whose size or digest is not the Hub's."""
    wrong = []
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    listed = list(files)
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(one.num_bytes for one in listed))
        for one in listed:
            path = snapshot / one.name
            is_right = path.exists() and path.stat().st_size == one.num_bytes
            if is_right and one.sha256:
                digest = hashlib.sha256()
                for chunk in _chunks(path):
                    digest.update(chunk)
                    progress.advance(task, len(chunk))
                is_right = digest.hexdigest() == one.sha256
            if not is_right:
                wrong.append(one.name)
    return wrong


def _chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _note_branch(snapshot: Path, revision: str | None, commit: str) -> None:
    """The Hub's library notes branches only where it was asked for one by its name."""
    if revision in (None, "main"):
        refs = snapshot.parent.parent / "refs"
        refs.mkdir(exist_ok=True)
        (refs / "main").write_text(commit, encoding="utf-8")


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    errors: tuple[type[Exception], ...] = (HfHubHTTPError, LocalEntryNotFoundError, *hub_errors())
    try:
        yield
    except RepositoryNotFoundError as error:
        raise UsageError(f"there is no repository {repo} on the Hub, or it needs `hf auth login`") from error
    except errors as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{repo} could not be downloaded: {reason}; ask again, and it goes on") from error


def list_repositories(*, is_json: bool) -> int:
    """Prints the public repositories known to run, what each needs, and what of them is in the cache."""
    rows = [
        _listed(one.repo) | {"disk_bytes": one.disk_bytes, "remark": one.remark} for one in PUBLIC_FORMATS
    ]
    if is_json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        least, size = format_size(row["minimum_budget_bytes"]), format_size(row["disk_bytes"])
        kept = f"{row['slots_per_layer']} of 256 experts of each layer in {format_size(BUDGET_BYTES)}"
        print(f"{row['repo']}\n    {size}, {row['remark']}; needs {least}, keeps {kept}")
        print(f"    in the cache: {row['cached']}")
    return 0


def _listed(repo: str) -> dict[str, Any]:
    from config.plan import make_plan
    from models.arithmetic import METAL
    from models.loading.loading import make_geometry, open_checkpoint

    one = next(item for item in PUBLIC_FORMATS if item.repo == repo)
    with tempfile.TemporaryDirectory(prefix="glmserve-list-") as folder:
        geometry = make_geometry(open_checkpoint(write_hollow(Path(folder), one)), METAL, CONTEXT)
    plan = make_plan(geometry, BUDGET_BYTES, CONTEXT, physical_bytes=BUDGET_BYTES)
    return {
        "repo": repo,
        "minimum_budget_bytes": plan.minimum_budget_bytes,
        "slots_per_layer": min(plan.slots_per_layer),
        "experts": asdict(one.experts),
        "cached": _state_of(repo),
    }


def _state_of(repo: str) -> str:
    if find_snapshot(repo, None) is None:
        return "no"
    try:
        find_checkpoint(repo)
    except CheckpointError:
        return f"incomplete: glmserve pull {repo}"
    return "complete"

"""Where `hf download` put a repository: the folders of the Hugging Face cache; and whether the Hub answers.

Called by the search for a checkpoint, which never asks the network. Places are those of huggingface_hub 2.4,
whose own constants are fixed when it is imported.
"""

import importlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from config.errors import UsageError

_REPO = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+)(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?")
_MAIN = "main"
_SHORTEST_COMMIT = 7
# The library itself tries for 24 seconds before it says that nobody answers.
PATIENCE_S = 5.0


def parse_repo(text: str) -> tuple[str, str | None] | None:
    """Repository and revision of `org/name` or `org/name@revision`; None for what is neither."""
    match = _REPO.fullmatch(text)
    return (match["repo"], match["revision"]) if match else None


def cache_folder() -> Path:
    """The folder that huggingface_hub downloads into, as its environment variables say now."""
    home = os.path.join(
        os.getenv("XDG_CACHE_HOME", os.path.join(os.path.expanduser("~"), ".cache")), "huggingface"
    )
    hub = os.path.join(_expanded(os.getenv("HF_HOME", home)), "hub")
    return Path(_expanded(os.getenv("HF_HUB_CACHE", os.getenv("HUGGINGFACE_HUB_CACHE", hub))))


def cached_repos() -> Iterator[Path]:
    """Folders of all models in the cache, by name."""
    yield from sorted(cache_folder().glob("models--*"))


def find_snapshot(repo: str, revision: str | None) -> Path | None:
    """The files of a repository at a branch, tag or commit; None where they were not downloaded."""
    return snapshot_of(cache_folder() / f"models--{repo.replace('/', '--')}", revision)


def snapshot_of(folder: Path, revision: str | None = None) -> Path | None:
    """As `find_snapshot`, of a folder in the cache.

    Without a revision it is `main`, and where that was never downloaded by its name, the latest there is.
    """
    commits = _commits(folder)
    try:
        return commits.get(_read_reference(folder, revision or _MAIN))
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        return None
    if revision is None:
        return next(iter(commits.values()), None)
    begun = [path for commit, path in commits.items() if commit.startswith(revision)]
    return commits.get(revision) or (
        begun[0] if len(begun) == 1 and len(revision) >= _SHORTEST_COMMIT else None
    )


def _commits(folder: Path) -> dict[str, Path]:
    """Snapshots by commit, the latest first; none where the folder may not be read."""
    try:
        paths = [path for path in (folder / "snapshots").iterdir() if path.is_dir()]
        paths.sort(key=lambda path: (-path.stat().st_mtime, path.name))
    except OSError:
        return {}
    return {path.name: path for path in paths}


def _read_reference(folder: Path, name: str) -> str:
    """The commit that a branch or tag means; FileNotFoundError where nobody wrote it down."""
    if ".." in name.split("/"):
        raise FileNotFoundError(name)
    return (folder / "refs" / name).read_text(encoding="utf-8").strip()


def _expanded(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))


def hub_errors() -> tuple[type[Exception], ...]:
    """Returns what the Hub's library raises where a request fails; its client is httpx or httpx2."""
    from huggingface_hub import get_session

    client = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    return (OSError, client.HTTPError)


def check_hub(endpoint: str | None = None) -> None:
    """Raises UsageError, soon and in one line, where the Hub does not answer at all."""
    from huggingface_hub import constants, get_session

    url, reasons = endpoint or constants.ENDPOINT, [f"nothing within {PATIENCE_S:.0f} s"]

    def ask() -> None:
        try:
            get_session().head(url, timeout=PATIENCE_S)
        except hub_errors() as error:
            reasons[0] = str(error) or type(error).__name__
        else:
            reasons.clear()

    asking = threading.Thread(target=ask, daemon=True)  # names may take longer to be looked up
    asking.start()
    asking.join(PATIENCE_S)
    if reasons:
        raise UsageError(
            f"{url} does not answer ({reasons[0]}): check the network, HTTPS_PROXY, or HF_ENDPOINT"
        )

"""The entrance of the console script, installed as `glmserve.launcher` so that its own name cannot clash.

The packages behind it are called `config`, `models`, `server` and `streaming`, as many others are. Before
any of them is imported, this module checks that each would come from the folder glmserve was installed into.
"""

import importlib.util
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

PACKAGES = ("config", "models", "server", "streaming")
_OWN_RECORD = re.compile(r"glmserve-[^-]*\.dist-info")
_FILE_OF_OURS = re.compile(rf"^({'|'.join(PACKAGES)})(?:/|\.py,)".encode(), re.MULTILINE)


def main() -> int:
    """Runs the command line; returns 2, after a line on standard error, where a package is in the way."""
    hold_hangups()
    # Not resolved: some installers link each file to a cache that holds them under other names.
    clash = find_clash(Path(os.path.abspath(__file__)).parents[1])
    if clash:
        print(f"glmserve: {clash}", file=sys.stderr)
        return 2
    try:
        if sys.argv[1:] == ["--version"]:  # answered here, in half the time that settings take to be imported
            return flushed(_say_version)
        from server.cli import main as run_command

        return run_command()
    except KeyboardInterrupt:
        print("glmserve: interrupted", file=sys.stderr)
        return 130


def _say_version() -> int:
    from server.version import VERSION

    print(f"glmserve {VERSION}")
    return 0


def flushed(run: Callable[[], int]) -> int:
    """Runs a command until all that it printed is read; 141 where its reader, such as `head`, had enough."""
    try:
        try:
            return run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit as end:  # rich ends a program whose reader has gone with 1
        if isinstance(end.__context__, BrokenPipeError):
            return 141
        raise


def hold_hangups() -> None:
    """Lets a SIGHUP wait until a server can read its keys again, instead of ending a process that starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])


def take_hangups() -> None:
    """Takes a SIGHUP that has waited, and those to come."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])


def find_clash(home: Path) -> str | None:
    """Says which package would not come from `home`, or shares its folder there; None where all is well."""
    for name in PACKAGES:
        expected, found = home / name / "__init__.py", _origin(name)
        if found is None:
            return f"{expected} is missing; install glmserve again, into an environment of its own"
        if os.path.realpath(found.parent) != os.path.realpath(expected.parent):
            return (
                f"`{name}` would be imported from {found.parent}, not from {expected.parent}; remove that "
                "folder or take it off PYTHONPATH, or install glmserve into an environment of its own"
            )
    return _shared_folder(home)


def _origin(name: str) -> Path | None:
    """The file that `import name` would run; a folder without one still comes before an editable install."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a stand-in that some start-up file has put into sys.modules
        return Path(getattr(sys.modules[name], "__file__", None) or "sys.modules", "__init__.py")
    if spec is None:
        return None
    if spec.origin:
        return Path(spec.origin)
    return Path(next(iter(spec.submodule_search_locations or ["an unknown place"])), "__init__.py")


def _shared_folder(home: Path) -> str | None:
    for record in sorted(home.glob("*.dist-info/RECORD")):
        other = record.parent.name
        if not _OWN_RECORD.fullmatch(other) and (found := _FILE_OF_OURS.search(record.read_bytes())):
            return (
                f"{other.removesuffix('.dist-info')} is installed beside glmserve and has a package "
                f"`{found[1].decode()}` too; install glmserve into an environment of its own"
            )
    return None

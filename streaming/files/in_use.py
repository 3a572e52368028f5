"""Who works with the files of a checkpoint: servers share a folder, a command that rewrites it has it alone.

A lock of the system on config.json, which is never rewritten; it ends with the process that holds it.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from config.errors import CheckpointError, UsageError


@contextmanager
def shared_use(directory: Path) -> Iterator[None]:
    """Keeps commands that rewrite the folder out; UsageError where one is at work or nothing can be read."""
    with _locked(directory, fcntl.LOCK_SH, "it is being rewritten by `glmserve align`; let that finish"):
        yield


@contextmanager
def sole_use(directory: Path) -> Iterator[None]:
    """Keeps servers out; UsageError where one is using the folder, or another command rewrites it."""
    with _locked(directory, fcntl.LOCK_EX, "a server or another command is using it; stop that first"):
        yield


@contextmanager
def _locked(directory: Path, kind: int, refusal: str) -> Iterator[None]:
    try:
        fd = os.open(directory / "config.json", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
    try:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{directory}: {refusal}") from error
        except OSError:
            pass  # some network file systems have no locks
        yield
    finally:
        os.close(fd)

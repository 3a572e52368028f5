"""An SQLite file that may fail: what is kept there outlives the process, and nothing depends on it.

Reads happen on the caller's thread, writes on a thread of the file's own. After its first fault, which is one
line in the log, the file is left alone.
"""

import logging
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)


class SqliteFile:
    """One file with its tables, for its owner's eyes only."""

    def __init__(self, path: Path, holds: str, *tables: str) -> None:
        """Makes the tables that are not there. `holds` says in the log what is lost with the file."""
        self._path, self._holds = path, holds
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=path.stem)
        try:
            self._open(tables)
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)

    def ask(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """What `work` returns, at once; None where the file cannot be used."""
        with self._lock:
            if self._connection is None:
                return None
            try:
                return work(self._connection)
            except (sqlite3.Error, OSError) as error:
                self._give_up(error)
                return None

    def rows(self, query: str, *values: Any) -> list[Any]:
        """The rows of a query; none where the file cannot be used."""
        return self.ask(lambda connection: connection.execute(query, values).fetchall()) or []

    def later(self, work: Callable[[sqlite3.Connection], object]) -> None:
        """Do this on the file's own thread, in order; nothing once it is closed. Never blocks."""
        with suppress(RuntimeError):  # what executors raise that are shut down
            self._thread.submit(self.ask, work)

    def write(self, statement: str, *values: Any) -> None:
        """Execute a statement later."""
        self.later(lambda connection: connection.execute(statement, values))

    def close(self) -> None:
        """Write what waits; then the file is closed."""
        self._thread.shutdown()
        with self._lock:
            if self._connection:
                self._connection.close()
            self._connection = None

    def _open(self, tables: tuple[str, ...]) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path.touch(mode=0o600)
        # Any thread may use it, under the lock; each statement is a transaction.
        connection = sqlite3.connect(self._path, timeout=2, isolation_level=None, check_same_thread=False)
        self._connection = connection
        # Without an index that is mapped into memory: on a full disk whoever touches it gets SIGBUS.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose the last rows, no others
        for table in tables:
            connection.execute(table)

    def _give_up(self, error: Exception) -> None:
        is_locked = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
        advice = (
            "another server has it, give each its --prefix-cache-dir"
            if is_locked
            else "a damaged file may be deleted"
        )
        log.error(
            "%s cannot be used (%s): %s until the server stops; %s", self._path, error, self._holds, advice
        )
        if self._connection:
            self._connection.close()
        self._connection = None

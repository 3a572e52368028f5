"""What the server has said, so that it can be put back where a client drops it.

`Remembered` keeps the last answers: in memory, and in an SQLite file beside the prefix cache where there is
one. Owned by the service. Lookups come from the threads that render prompts; answers are added from the event
loop and written by a thread. A file that cannot be used costs nothing but what a restart forgets.
"""

import hashlib
import json
import logging
import sqlite3
import sys
import threading
import time
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.plan import REMEMBERED_BYTES

FILE_NAME = "answers.sqlite3"
MAX_RECENT = 256
MAX_STORED = 20_000
MAX_STORED_BYTES = 128 * 10**6
MAX_TOKENS = 200_000
# Stored answers are counted each time that so many have been added.
TRIM_EVERY = 64

log = logging.getLogger(__name__)

Call = tuple[str, str, str]  # id, name, arguments as JSON


@dataclass(frozen=True)
class Said:
    """A turn as it was generated and sent; `token_ids`, int32, without the one that ended it.

    `content` is stripped.
    """

    token_ids: Sequence[int]
    reasoning: str
    content: str
    calls: tuple[Call, ...]
    is_thinking: bool  # the prompt left the model inside a thought

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", array("i", self.token_ids))

    @property
    def nbytes(self) -> int:
        """Memory of its tokens and text, a character counted as what it may take."""
        texts = [self.reasoning, self.content, *(part for call in self.calls for part in call)]
        return sum(map(sys.getsizeof, [self.token_ids, *texts]))


class Remembered:
    """Answers by the id of their first tool call, or by their content and the message they answer."""

    def __init__(self, directory: Path | None = None, scope: str = "") -> None:
        """`scope` tells apart what must not be mixed: the tokenizers of different models."""
        self._scope = scope
        self._recent: OrderedDict[bytes, Said] = OrderedDict()
        self._recent_bytes = 0
        self._database = _Database(directory / FILE_NAME) if directory else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="remembered")
        self._lock = threading.Lock()

    def add(self, caller: str, answered: str, said: Said) -> None:
        """Remember a turn of this caller; `answered` is the text of the message before it. Never blocks."""
        if len(said.token_ids) > MAX_TOKENS:
            return
        key = self._key(caller, said.calls[0][0] if said.calls else None, answered, said.content)
        with self._lock:
            self._forget(key)
            self._recent[key] = said
            self._recent_bytes += said.nbytes
            while len(self._recent) > MAX_RECENT or self._recent_bytes > REMEMBERED_BYTES:
                self._forget(next(iter(self._recent)))
        if self._database:
            self._thread.submit(self._database.put, key, said)

    def find(self, caller: str, call_id: str | None, answered: str, content: str) -> Said | None:
        """The turn that this caller was given, by the id of its first call, else by its text."""
        key = self._key(caller, call_id, answered, content.strip())
        with self._lock:
            said = self._recent.get(key)
        if said is None and self._database:
            said = self._database.get(key)
        return said

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._recent.clear()
            self._recent_bytes = 0
        if self._database:
            self._thread.submit(self._database.clear)

    def close(self) -> None:
        """Write what waits."""
        self._thread.shutdown()
        if self._database:
            self._database.close()

    def _forget(self, key: bytes) -> None:
        if (said := self._recent.pop(key, None)) is not None:
            self._recent_bytes -= said.nbytes

    def _key(self, caller: str, call_id: str | None, answered: str, content: str) -> bytes:
        what = ["call", call_id] if call_id else ["text", answered, content]
        return hashlib.sha256(json.dumps([self._scope, caller, *what]).encode()).digest()


class _Database:
    """The file. After its first fault it is left alone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._num_added = 0
        self._try(self._open)

    def get(self, key: bytes) -> Said | None:
        said: Said | None = self._try(lambda: self._get(key))
        return said

    def put(self, key: bytes, said: Said) -> None:
        self._try(lambda: self._put(key, said))

    def clear(self) -> None:
        self._try(lambda: self._connection and self._connection.execute("DELETE FROM answers"))

    def close(self) -> None:
        with self._lock:
            if self._connection:
                self._connection.close()
            self._connection = None

    def _try(self, work: Callable[[], Any]) -> Any:
        with self._lock:
            if self._connection is None and work != self._open:
                return None
            try:
                return work()
            except (sqlite3.Error, OSError) as error:
                log.error(
                    "%s cannot be used (%s): answers are remembered until the server stops; a damaged file "
                    "may be deleted", self._path, error,
                )  # fmt: skip
                if self._connection:
                    self._connection.close()
                self._connection = None
                return None

    def _open(self) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path.touch(mode=0o600)
        connection = sqlite3.connect(self._path, timeout=2, isolation_level=None, check_same_thread=False)
        self._connection = connection
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = OFF")  # a lost answer is a miss, a damaged one is noticed
        connection.execute(
            "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, record BLOB, used REAL) WITHOUT ROWID"
        )
        connection.execute("CREATE INDEX IF NOT EXISTS by_use ON answers (used)")

    def _get(self, key: bytes) -> Said | None:
        assert self._connection, "a fault ends all use"
        row = self._connection.execute("SELECT record FROM answers WHERE key = ?", (key,)).fetchone()
        return _decode(key, row[0]) if row else None

    def _put(self, key: bytes, said: Said) -> None:
        assert self._connection, "a fault ends all use"
        row = (key, _encode(key, said), time.time())
        self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", row)
        self._num_added += 1
        if self._num_added % TRIM_EVERY == 0:
            self._trim(self._connection)

    def _trim(self, connection: sqlite3.Connection) -> None:
        """Delete the oldest eighth as long as there are too many, or they are too large."""
        while True:
            count, nbytes = connection.execute("SELECT COUNT(*), SUM(LENGTH(record)) FROM answers").fetchone()
            if count <= MAX_STORED and (nbytes or 0) <= MAX_STORED_BYTES:
                return
            connection.execute(
                "DELETE FROM answers WHERE key IN (SELECT key FROM answers ORDER BY used LIMIT ?)",
                (max(1, count // 8),),
            )


def _encode(key: bytes, said: Said) -> bytes:
    fields = [list(said.token_ids), said.reasoning, said.content, list(said.calls), said.is_thinking]
    packed = zlib.compress(json.dumps(fields).encode())
    return hashlib.sha256(key + packed).digest()[:8] + packed


def _decode(key: bytes, record: object) -> Said | None:
    """The answer, or None where the record is not what was written under this key."""
    if not isinstance(record, bytes) or hashlib.sha256(key + record[8:]).digest()[:8] != record[:8]:
        return None
    ids, reasoning, content, calls, is_thinking = json.loads(zlib.decompress(record[8:]))
    return Said(ids, reasoning, content, tuple(_call(call) for call in calls), is_thinking)


def _call(fields: Sequence[str]) -> Call:
    call_id, name, arguments = fields
    return call_id, name, arguments

"""What the server has said, so that it can be put back where a client drops it.

`Remembered` keeps the last answers: in memory, and in an SQLite file beside the prefix cache where there is
one. Owned by the service. Lookups come from the threads that render prompts; answers are added from the event
loop and written by a thread. A file that cannot be used costs nothing but what a restart forgets.
"""

import hashlib
import json
import sqlite3
import sys
import threading
import time
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from config.plan import REMEMBERED_BYTES
from server.api.sqlite_file import SqliteFile

FILE_NAME = "answers.sqlite3"
MAX_RECENT = 256
MAX_STORED = 20_000
MAX_STORED_BYTES = 128 * 10**6
MAX_TOKENS = 200_000
# Stored answers are counted each time that so many have been added.
TRIM_EVERY = 64
TABLES = (
    "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, record BLOB, used REAL) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS by_use ON answers (used)",
)

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
        self._file = (
            SqliteFile(directory / FILE_NAME, "answers are remembered", *TABLES) if directory else None
        )
        self._num_stored = 0
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
        if self._file:
            self._num_stored += 1
            self._file.later(partial(_put, key=key, said=said, trims=self._num_stored % TRIM_EVERY == 0))

    def find(self, caller: str, call_id: str | None, answered: str, content: str) -> Said | None:
        """The turn that this caller was given, by the id of its first call, else by its text."""
        key = self._key(caller, call_id, answered, content.strip())
        with self._lock:
            said = self._recent.get(key)
        if said is None and self._file:
            rows = self._file.rows("SELECT record FROM answers WHERE key = ?", key)
            said = _decode(key, rows[0][0]) if rows else None
        return said

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._recent.clear()
            self._recent_bytes = 0
        if self._file:
            self._file.write("DELETE FROM answers")

    def close(self) -> None:
        """Write what waits."""
        if self._file:
            self._file.close()

    def _forget(self, key: bytes) -> None:
        if (said := self._recent.pop(key, None)) is not None:
            self._recent_bytes -= said.nbytes

    def _key(self, caller: str, call_id: str | None, answered: str, content: str) -> bytes:
        what = ["call", call_id] if call_id else ["text", answered, content]
        return hashlib.sha256(json.dumps([self._scope, caller, *what]).encode()).digest()


def _put(connection: sqlite3.Connection, key: bytes, said: Said, trims: bool) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", (key, _encode(key, said), time.time())
    )
    while trims and _is_too_much(connection):
        count = connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
        oldest = "SELECT key FROM answers ORDER BY used LIMIT ?"
        connection.execute(f"DELETE FROM answers WHERE key IN ({oldest})", (max(1, count // 8),))


def _is_too_much(connection: sqlite3.Connection) -> bool:
    count, nbytes = connection.execute("SELECT COUNT(*), SUM(LENGTH(record)) FROM answers").fetchone()
    return count > MAX_STORED or (nbytes or 0) > MAX_STORED_BYTES


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

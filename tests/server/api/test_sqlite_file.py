"""A file that may fail takes nothing with it."""

import logging
from pathlib import Path

import pytest

from server.api.sqlite_file import SqliteFile

TABLE = "CREATE TABLE IF NOT EXISTS said (word TEXT)"


@pytest.mark.parametrize("number", [1, 50, 2000])
def test_nothing_of_it_is_mapped_into_memory(tmp_path: Path, number: int) -> None:
    """On a full disk a page that is mapped and has no block ends the process with SIGBUS."""
    file = SqliteFile(tmp_path / "said.sqlite3", "words are kept", TABLE)
    for index in range(number):
        file.write("INSERT INTO said VALUES (?)", str(index))
    maps = Path("/proc/self/maps")
    assert not list(tmp_path.glob("*-shm"))
    assert "said.sqlite3" not in (maps.read_text() if maps.exists() else "")
    file.close()
    again = SqliteFile(tmp_path / "said.sqlite3", "words are kept", TABLE)
    assert len(again.rows("SELECT * FROM said")) == number
    again.close()


@pytest.mark.slow
def test_a_second_server_does_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = SqliteFile(tmp_path / "said.sqlite3", "words are kept", TABLE)
    with caplog.at_level(logging.ERROR):
        second = SqliteFile(tmp_path / "said.sqlite3", "words are kept", TABLE)
    assert second.rows("SELECT * FROM said") == []
    second.write("INSERT INTO said VALUES ('x')")
    second.close()
    first.write("INSERT INTO said VALUES ('y')")
    first.close()
    assert "words are kept until the server stops; another server has it" in caplog.text

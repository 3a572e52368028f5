"""The whole program beside a mirror with one wrong byte: it is never read, and dropped in one line."""

import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.commands.checkpoint import POCKET
from streaming.files.headers import read_headers
from tests.server.serving.running import Server, start_server, stop_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (POCKET / "config.json").exists(), reason="Pocket is not in this checkout"),
]

# Some hundred tokens before the question, so that there are blocks to save.
STORY = " ".join(f"The box number {number} holds {number * 7 % 50} coins." for number in range(25))
QUESTIONS = ["What is 17+25?", "What is 30+12?", "What is 8+9?"]
# Of each tensor so many bytes are compared at the start: in front, at its end and somewhere.
SAMPLED_BYTES = 4096
TENSOR = "mlp.switch_mlp.down_proj.scales"
# A start at which the byte is among those somewhere refuses the mirror, which is right as well.
MOST_STARTS = 6


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A copy of Pocket of which one byte of an expert's scale is another: its sign and exponent."""
    copy = tmp_path / "mirror"
    shutil.copytree(POCKET, copy)
    entry = next(entry for name, entry in read_headers(copy).items() if name.endswith(TENSOR))
    place = entry.offset + SAMPLED_BYTES + 1
    with open(entry.path, "r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 0xFF]))
    return copy


def start_beside(mirror: Path, *flags: str) -> Server:
    for _ in range(MOST_STARTS):
        with suppress(AssertionError):  # the server's log, where it did not start
            return start_server("--mirror", str(mirror), "--stream-experts", *flags)
    raise AssertionError("the byte was seen at every start")


def ask(server: Server, question: str) -> tuple[str, int]:
    """The answer, and how many tokens of the prompt were saved before."""
    messages = [{"role": "system", "content": STORY}, {"role": "user", "content": question}]
    body: dict[str, Any] = {"messages": messages, "temperature": 0, "max_tokens": 60}
    response = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    message, usage = response.json()["choices"][0]["message"], response.json()["usage"]
    said = f"{message.get('reasoning')} {message['content']}"
    return said, usage["prompt_tokens_details"]["cached_tokens"]


def log_of(server: Server) -> list[str]:
    """What a server logs from now on, to its end."""
    lines: list[str] = []
    assert server.process.stderr
    threading.Thread(target=lines.extend, args=(server.process.stderr,), daemon=True).start()
    return lines


@pytest.mark.slow
def test_a_mirror_with_a_wrong_byte_changes_no_answer_and_no_saved_prompt(
    damaged: Path, tmp_path: Path
) -> None:
    alone = start_server("--stream-experts")
    try:
        right = [ask(alone, question)[0] for question in QUESTIONS]
    finally:
        stop_server(alone)
    flags = ["--prefix-cache-dir", str(tmp_path / "prefixes"), "--prefix-cache-size", "1G"]
    beside = start_beside(damaged, *flags)
    lines = log_of(beside)
    try:
        assert [ask(beside, question)[0] for question in QUESTIONS] == right
        deadline = time.monotonic() + 60
        while not (dropped := [line for line in lines if "is dropped" in line]):
            assert time.monotonic() < deadline, lines
            time.sleep(0.1)
        assert [ask(beside, question)[0] for question in QUESTIONS] == right
    finally:
        stop_server(beside)
    assert len(dropped) == 1
    assert f"--mirror {damaged} is dropped" in dropped[0]
    assert not any("starts again" in line or "Traceback" in line for line in lines)
    after = start_server("--stream-experts", *flags)
    try:
        found = [ask(after, question) for question in QUESTIONS]
    finally:
        stop_server(after)
    assert [said for said, _ in found] == right
    assert all(num_cached > 64 for _, num_cached in found)

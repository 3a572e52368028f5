"""Eight clients at once, over HTTP: `glmserve` and `mlx_lm.server` on the same checkpoint.

Each asks for the same count of tokens after a prompt of its own; a server's figure is what all have together.
"""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from server.commands.checkpoint import POCKET

READY_S, ANSWER_S = 120, 600
COMMANDS = {
    "glmserve": ["-m", "server.cli", "--prefix-cache-size", "0", "--model-policy", "any"],
    "mlx_lm.server": ["-m", "mlx_lm", "server", "--log-level", "ERROR"],
}


def add_tokenizer(folder: Path) -> None:
    """Pocket's, which has as many tokens as the checkpoint."""
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(POCKET / name, folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )


@contextmanager
def serving(name: str, folder: Path) -> Iterator[httpx.Client]:
    """The server, ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, *COMMANDS[name], "--model", str(folder), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=ANSWER_S) as client:
            deadline = time.monotonic() + READY_S
            while not _is_ready(client):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{name} is not ready")
                time.sleep(0.2)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def _is_ready(client: httpx.Client) -> bool:
    with suppress(httpx.TransportError):
        return client.get("/health").status_code == 200
    return False


def rate(client: httpx.Client, folder: Path, clients: int, tokens: int) -> float:
    """Tokens a second of all clients, from the first question to the last answer."""

    def ask(number: int) -> int:
        body = {"model": str(folder), "prompt": f"{number} " * 12, "max_tokens": tokens, "temperature": 0}
        said = client.post("/v1/completions", json=body)
        said.raise_for_status()
        count: int = said.json()["usage"]["completion_tokens"]
        return count

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        total = sum(pool.map(ask, range(clients)))
    return total / (time.perf_counter() - began)

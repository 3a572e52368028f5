"""What makes a start impossible is one line, exit code 2, and no port that was open for a moment."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from server.cli import main
from server.commands.checkpoint import POCKET

ROOT = Path(__file__).parents[3]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def is_open(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(0.2)
        return client.connect_ex(("127.0.0.1", port)) == 0


def started(
    words: list[str], patience_s: float = 60, is_over: Callable[[str], bool] = lambda said: False
) -> tuple[int | None, str, bool]:
    """Exit code, all that was said at the usual log level, and whether a client could connect meanwhile."""
    port, deadline_s, was_open = free_port(), time.monotonic() + patience_s, False
    env = {name: value for name, value in os.environ.items() if not name.startswith("GLMSERVE_")}
    command = [sys.executable, "-u", "-m", "server.cli", *words, "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, env=env, text=True, stderr=subprocess.PIPE) as process:
        while process.poll() is None and time.monotonic() < deadline_s:
            was_open = was_open or is_open(port)
            time.sleep(0.005)
        process.kill()
        assert process.stderr
        return process.returncode, process.stderr.read(), was_open


def a_model(folder: Path, **changes: object) -> str:
    shutil.copytree(POCKET, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ram-budget", "10M"], "too small"),
        (["--max-context", "1m"], "is more than the model's"),
        (["--stream-experts", "--model", str(POCKET), "--mirror", "/nonexistent"], "no such folder"),
        (["--model", "TYPE"], "type 'llama'"),
        (["--model", "LAYERS"], "must name 10 layers"),
        (["--prefix-cache-dir", "FILE"], "--prefix-cache-dir"),
        (["--prefix-cache-dir", "FILE/below/it"], "--prefix-cache-dir"),
        (["--prefix-cache-dir", "/proc/none"], "--prefix-cache-dir"),
        (["--ssl-certfile", "FILE"], "--ssl-certfile"),
    ],
)
def test_a_start_that_cannot_be_is_one_line_and_opens_no_port(
    tmp_path: Path, words: list[str], said: str
) -> None:
    (tmp_path / "file").write_text("")
    if "TYPE" in words:
        words = ["--model", a_model(tmp_path / "type", model_type="llama")]
    if "LAYERS" in words:
        words = ["--model", a_model(tmp_path / "layers", num_hidden_layers=10, mlp_layer_types=None)]
    words = [word.replace("FILE", str(tmp_path / "file")) for word in words]
    code, told, was_open = started(words)
    assert (code, told.count("\n"), was_open) == (2, 1, False), told
    assert told.startswith("glmserve: ")
    assert said in told


@pytest.mark.slow
def test_a_start_tells_of_the_model_and_its_template_and_of_readiness_once(tmp_path: Path) -> None:
    folder = Path(a_model(tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    _, told, was_open = started(["--model", str(folder), "--prefix-cache-size", "0"], patience_s=8)
    assert was_open
    assert told.count("ready") == 1, told
    assert told.count("no chat template: GLM-5.2's is used") == 1


@pytest.mark.parametrize("name", ["none.gguf", "org/none.gguf", "unsloth/GLM-5.2-Q2_K.gguf"])
def test_a_gguf_that_is_not_there_is_called_one_too(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main(["plan", "--model", name]) == 2
    assert "GGUF cannot be served here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "given", "said"),
    [
        ("GLM-Q2-00001-of-00005.gguf", "", "GGUF cannot be served here"),
        ("GLM-Q2.GGUF", "GLM-Q2.GGUF", "GGUF cannot be served here"),
        ("model.safetensors", "model.safetensors", "is a file; give the folder"),
        ("pytorch_model.bin", "", "no config.json there"),
        ("notes", "absent", "no such folder"),
    ],
)
def test_what_is_no_checkpoint_is_called_what_it_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, file: str, given: str, said: str
) -> None:
    (tmp_path / file).write_text("")
    assert main(["plan", "--model", str(tmp_path / given)]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


COMMANDS = (
    "--version", "--help", "help plan", "plan", "plan --json", "plan glm-5.2 --memory 128G --json", "env",
    "env --json", "pull --list", "pull --list --json", "doctor --port 0", "bench --help",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("entrance", "words"),
    [
        ("server.cli", "--version"),
        ("server.cli", "plan"),
        *(("server.launcher", words) for words in COMMANDS),
    ],
)
def test_a_reader_that_has_gone_is_no_error_of_any_command(words: str, entrance: str) -> None:
    """As in `glmserve plan --json | head`, whose reader may end before anything is printed."""
    code = f"import sys; from {entrance} import main; sys.exit(main())"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()],
        cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120,
    )  # fmt: skip
    os.close(write)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert done.returncode == 141, "128 + SIGPIPE, as a shell calls it"

"""A SIGHUP that comes while the server starts is taken when it can be."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.commands.checkpoint import POCKET

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.skipif(not (POCKET / "config.json").exists(), reason="Pocket is not in this checkout")
def test_a_hangup_at_any_time_of_the_start_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-1")
    (tmp_path / "keys").chmod(0o600)
    entrance = "import sys; from server.launcher import main; print('begun', flush=True); sys.exit(main())"
    flags = ["--model", str(POCKET), "--port", "0", "--api-key-file", str(tmp_path / "keys")]
    flags += ["--prefix-cache-size", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", entrance, *flags],
        cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        time.sleep(0.02)  # it has come to the next line
        lines: list[str] = []
        for _ in range(10):
            process.send_signal(signal.SIGHUP)
            time.sleep(0.03)
        while not any("the keys were read again" in line for line in lines):
            line = process.stderr.readline()
            assert line, f"it ended with {process.wait()}: {lines}"
            lines.append(line)
        assert process.poll() is None
    finally:
        process.terminate()
        _, rest = process.communicate(timeout=30)
    assert "Traceback" not in "".join(lines) + rest

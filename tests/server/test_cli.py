"""The command line: one line and exit code 2 for whatever a user can get wrong."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from config.settings import Settings, flag_of
from server.cli import COMMANDS, Command, main, parse_settings
from tests.server.commands.test_checkpoint import write_shard

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_inherited_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"GLMSERVE_{name.upper()}", raising=False)


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """Complete in form, but of a kind that no code here can run."""
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    write_shard(tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ram-budgt", "1G"], "unknown flag --ram-budgt; did you mean --ram-budget?"),
        (["--zzz"], "unknown flag --zzz; glmserve --help lists all"),
        (["--port"], "argument --port: expected one argument; see glmserve --help"),
        (["serve", "surplus"], "'surplus' is one word too many"),
        (["plum"], "unknown command 'plum'"),
        (["--ram-budget", "3000T"], "more than this machine's memory"),
        (["--ram-budget", "much"], "'much' is not a size"),
        (["--model", "/no/such/folder"], "there is no such folder"),
        (["--config", "/no/such/file"], "cannot read --config /no/such/file"),
        (["convert", "a"], "arguments are required: target; see glmserve convert --help"),
        (["convert", "a", "b", "--bits", "x"], "invalid int value: 'x'; see glmserve convert --help"),
        (["convert", "a", "b", "--bits", "0"], "mode affine takes bits of [2, 3, 4, 5, 6, 8]"),
        (["--host", "a..b", "--api-key", "x", "--log-level", "error"], "cannot listen on a..b:8080"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("glmserve: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_an_interrupt_is_one_line_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(words: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "convert", Command("", interrupted))
    assert main(["convert", "a", "b"]) == 130
    assert capsys.readouterr().err == "glmserve: interrupted\n"


def test_a_port_in_use_is_noticed_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["--model", str(checkpoint), "--port", str(port), "--log-level", "error"]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_what_the_engine_refuses_ends_the_server_in_the_same_way(checkpoint: Path) -> None:
    words = ["--model", str(checkpoint), "--port", "0", "--log-level", "error"]
    done = subprocess.run(
        [sys.executable, "-m", "server.cli", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("glmserve: ")
    assert done.stderr.count("\n") == 1


def test_help_is_grouped_and_explains_units(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for words in ("Model:", "Memory:", "Network:", "10^9", "2^30", "physical memory", "GLMSERVE_RAM_BUDGET"):
        assert words in text
    assert all(flag_of(name) in text for name in Settings.model_fields)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("glmserve ")


def test_flags_become_settings() -> None:
    settings = parse_settings(["--model", "m", "--stream-experts", "--ram-budget", "1G", "--port", "0"])
    assert (settings.model, settings.stream_experts, settings.ram_budget, settings.port) == (
        "m",
        True,
        10**9,
        0,
    )
    assert not parse_settings(["--no-stream-experts"]).stream_experts

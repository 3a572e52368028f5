"""Words that are nearly right are answered with what was meant; small commands print what they should."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.cli import COMMANDS, main
from server.commands.serve import cache_home
from server.version import VERSION

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _no_inherited_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("GLMSERVE_"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("GLMSERVE_RAM_BUDGTE", "GLMSERVE_RAM_BUDGET"),
        ("GLMSERVE_PROT", "GLMSERVE_PORT"),
        ("glmserve_mirrors", "GLMSERVE_MIRROR"),
        ("GLMSERVE_CONFG", "GLMSERVE_CONFIG"),
        ("GLM_SERVE_PORT", "GLMSERVE_PORT"),
        ("GLMSERVER_RAM_BUDGET", "GLMSERVE_RAM_BUDGET"),
    ],
)
def test_a_misspelt_variable_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    monkeypatch.setenv(name, "1")
    assert main(["env"]) == 2
    assert capsys.readouterr().err == f"glmserve: unknown variable {name}; did you mean {meant}?\n"


@pytest.mark.parametrize(
    ("key", "meant"), [("ram_budgte", "ram_budget"), ("prot", "port"), ("modle", "model")]
)
def test_a_misspelt_key_of_the_file_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, key: str, meant: str
) -> None:
    (tmp_path / "c.toml").write_text(f'{key} = "1"\n')
    assert main(["env", "--config", str(tmp_path / "c.toml")]) == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "meant"),
    [("serve org/x", "--model org/x"), ("doctor ./x", "--model ./x"), ("env prot", "--model prot")],
)
def test_a_model_without_its_flag_is_said(capsys: pytest.CaptureFixture[str], words: str, meant: str) -> None:
    assert main(words.split()) == 2
    assert f"one word too many; did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("plna", "plan"),
        ("doctr", "doctor"),
        ("serv", "serve"),
        ("version", "--version"),
        ("org/x", "--model org/x"),
    ],
)
def test_a_misspelt_command_is_said(capsys: pytest.CaptureFixture[str], word: str, meant: str) -> None:
    assert main([word]) == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


def test_the_variable_of_the_config_file_counts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "c.toml").write_text("port = 9123\n")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("GLMSERVE_CONFIG", str(tmp_path / "c.toml"))
    assert main(["env", "--json", "--api-key", "k"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["OPENAI_BASE_URL"] == "http://127.0.0.1:9123/v1"
    assert told["OPENROUTER_API_BASE"] == "http://127.0.0.1:9123/api/v1"
    assert told["ANTHROPIC_MODEL"] == told["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == "glmserve/pocket"
    assert (told["ANTHROPIC_BASE_URL"], told["ANTHROPIC_AUTH_TOKEN"]) == ("http://127.0.0.1:9123", "k")


def test_env_lines_are_for_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--api-key", "a'b $(c)"]) == 0
    script = capsys.readouterr().out + 'printf %s "$OPENAI_API_KEY"'
    assert subprocess.run(["sh", "-c", script], capture_output=True, text=True).stdout == "a'b $(c)"


def test_env_says_where_the_keys_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--api-key-file", "our-keys", "--model", "not/there"]) == 0
    told = capsys.readouterr()
    assert "one of the keys in our-keys" in told.err
    assert all(line.startswith("export ") for line in told.out.splitlines())
    assert "export ANTHROPIC_MODEL=z-ai/glm-5.2" in told.out, "what would be served once it is there"


@pytest.mark.parametrize("name", [*COMMANDS, ""])
def test_every_command_has_help_without_empty_defaults(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["help", name] if name not in ("", "help") else ["help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "usage: glmserve" in text
    assert "(default )" not in text
    assert name in text


def test_windows_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.cli.sys.platform", "win32")
    assert main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_mac_keeps_its_cache_outside_of_backups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_home("darwin") == Path.home() / "Library" / "Caches"
    assert cache_home("linux") == Path.home() / ".cache"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_home("darwin") == Path("/x")


@pytest.mark.parametrize(
    ("flag", "unneeded"),
    [
        ("--version", "pydantic argparse fastapi uvicorn mlx numpy rich httpx tokenizers jinja2"),
        ("--help", "fastapi starlette uvicorn mlx numpy rich httpx tokenizers jinja2"),
    ],
)
def test_the_version_and_the_help_import_little(flag: str, unneeded: str) -> None:
    check = f"""
import sys
from server.launcher import main
sys.argv = ["glmserve", "{flag}"]
try:
    main()
except SystemExit:
    pass
print([name for name in "{unneeded}".split() if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.startswith(f"glmserve {VERSION}\n" if flag == "--version" else "usage: glmserve")


def test_a_reader_that_has_enough_is_no_error() -> None:
    command = f"{sys.executable} -m server.cli env --json | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == ""

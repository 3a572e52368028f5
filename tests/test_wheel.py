"""The built wheel holds our four packages and their launcher, and serves wherever it is installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.server.serving.running import SUM, ask, start, stop_server

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: setuptools builds in the tree, and leftovers of an older build would come along.
    folder, tree = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("tree") / "glmserve"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
             "--wheel-dir", str(folder), str(tree)]  # fmt: skip
    subprocess.run(build, check=True, timeout=300)
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_its_top_level_is_ours(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"config", "streaming", "models", "server", "glmserve"}
    assert {name for name in names if name.startswith("glmserve/")} == {
        "glmserve/__init__.py",
        "glmserve/launcher.py",
    }
    assert "server/glm/templates/chat_template.jinja" in names
    assert "models/pocket/config.json" in names
    foreign = [name for name in names if name.startswith("training/") or "test_" in name or "tests/" in name]
    assert not foreign, "nothing of training or tests"


@pytest.mark.slow
def test_it_runs_from_a_folder_that_holds_another_models(wheel: Path, tmp_path: Path) -> None:
    site, foreign = tmp_path / "site", tmp_path / "foreign"
    zipfile.ZipFile(wheel).extractall(site)
    (foreign / "models").mkdir(parents=True)
    (foreign / "models" / "__init__.py").write_text("raise SystemExit('the wrong models was imported')")
    command = [
        sys.executable,
        "-P",
        "-c",
        "from glmserve.launcher import main; main()",
        "plan",
        "--model",
        "nowhere",
    ]
    env = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=foreign, env=env, capture_output=True, text=True, timeout=120)
    assert "there is no such folder" in done.stderr, done.stderr


@pytest.mark.slow
def test_uvx_serves_it_from_the_root_folder(wheel: Path) -> None:
    uvx = require("uvx")
    pins = ("--system-certs", "--constraints", str(ROOT / "constraints.txt"))
    serves_a_right_answer(uvx, *pins, "--from", str(wheel), "glmserve")


@pytest.mark.long
def test_pipx_installs_it_and_it_serves_from_the_root_folder(wheel: Path, tmp_path: Path) -> None:
    pipx = [found] if (found := shutil.which("pipx")) else [require("uvx"), "--system-certs", "pipx"]
    places = {"PIPX_HOME": str(tmp_path / "home"), "PIPX_BIN_DIR": str(tmp_path / "bin")}
    pins = f"--pip-args=--constraint={ROOT / 'constraints.txt'}"
    subprocess.run([*pipx, "install", pins, str(wheel)], env=os.environ | places, check=True, timeout=900)
    serves_a_right_answer(str(tmp_path / "bin" / "glmserve"))


def require(tool: str) -> str:
    """The tool's path; uv's stand in the environment that `make` builds."""
    found = shutil.which(tool, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{tool} is not installed")
    return found


def serves_a_right_answer(*command: str) -> None:
    """Runs it from the root folder, where no package of ours lies."""
    served = start(command, "--served-model-name", "glmserve/pocket", cwd=Path("/"))
    try:
        assert "42" in ask(served, SUM)
    finally:
        stop_server(served)

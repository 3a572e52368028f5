"""The launcher runs our packages only: one that bears the name of one of them is reported in one line."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from server.launcher import PACKAGES
from server.version import VERSION

ROOT = Path(__file__).parents[2]
# Finds our packages after everything on sys.path, as an editable install does.
EDITABLE = """\
import sys
from importlib.machinery import PathFinder

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [site]) if "." not in name else None

site = next(folder for folder in sys.path if folder.endswith("/site"))
sys.path.remove(site)
sys.meta_path.append(Finder)
"""
LAUNCH = "from glmserve.launcher import main; raise SystemExit(main())"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Our packages as an installer lays them out; the launcher's file is a link to a cache, as with uv."""
    site = tmp_path / "site"
    (site / "glmserve").mkdir(parents=True)
    (site / "glmserve" / "__init__.py").touch()
    (site / "glmserve" / "launcher.py").symlink_to(ROOT / "server" / "launcher.py")
    (site / "glmserve-0.1.0.dist-info").mkdir()
    (site / "glmserve-0.1.0.dist-info" / "RECORD").write_text(
        "".join(f"{name}/__init__.py,,\n" for name in PACKAGES)
    )
    for name in PACKAGES:
        (site / name).symlink_to(ROOT / name)
    return site


def launch(site: Path, *, before: str = "") -> subprocess.CompletedProcess[str]:
    """`glmserve --version` with `site`, and a folder of strays before it, in place of site-packages."""
    return subprocess.run(
        [sys.executable, "-S", "-P", "-c", f"{before}\n{LAUNCH}", "--version"],
        env={"PYTHONPATH": f"{site.parent / 'stray'}:{site}", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def write(path: Path, text: str = "raise SystemExit('a stray file was imported')\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def install_beside(site: Path, name: str, *files: str) -> None:
    write(site / f"{name}.dist-info" / "RECORD", "".join(f"{file},sha256=x,1\n" for file in files))


def test_our_own_packages_are_run(site: Path) -> None:
    assert launch(site).stdout.startswith("glmserve ")


STRAYS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a package on PYTHONPATH": (lambda site: write(site.parent / "stray/server/__init__.py"), "`server`"),
    "a module on PYTHONPATH": (lambda site: write(site.parent / "stray/config.py"), "`config`"),
    "another streaming": (lambda site: write(site.parent / "stray/streaming/__init__.py"), "`streaming`"),
    "a package installed beside": (
        lambda site: install_beside(site, "config-0.5.1", "config/__init__.py", "config/parser.py"),
        "config-0.5.1 is installed beside glmserve and has a package `config`",
    ),
    "a module installed beside": (
        lambda site: install_beside(site, "old_models-2.0", "old_models/x.py", "models.py"),
        "old_models-2.0 is installed beside glmserve and has a package `models`",
    ),
    "a part of a package installed beside": (
        lambda site: install_beside(site, "zz_server-1", "server/plugins/x.py"),
        "zz_server-1 is installed beside glmserve and has a package `server`",
    ),
    "nothing left by an uninstalled package": (
        lambda site: (site / "config").unlink(),
        "config/__init__.py is missing; install glmserve again",
    ),
}


@pytest.mark.parametrize(("stray", "words"), STRAYS.values(), ids=STRAYS)
def test_a_stray_package_is_one_line_and_exit_code_2(
    site: Path, stray: Callable[[Path], None], words: str
) -> None:
    stray(site)
    done = launch(site)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("glmserve: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_a_folder_without_code_hides_an_editable_install_only(site: Path) -> None:
    (site.parent / "stray" / "models").mkdir(parents=True)
    assert launch(site).returncode == 0
    done = launch(site, before=EDITABLE)
    assert done.returncode == 2
    assert f"`models` would be imported from {site.parent}/stray/models, not from" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_stand_in_made_at_start_up_is_noticed(site: Path) -> None:
    done = launch(site, before="import sys, types; sys.modules['config'] = types.ModuleType('config')")
    assert done.returncode == 2
    assert "`config` would be imported from sys.modules" in done.stderr


def test_names_that_only_begin_alike_are_no_clash(site: Path) -> None:
    install_beside(
        site, "configobj-5", "configobj/__init__.py", "servers/__init__.py", "x/models/__init__.py"
    )
    assert launch(site).returncode == 0


@pytest.mark.parametrize("flag", ["--version", "--help"])
def test_short_answers_load_neither_server_nor_model(flag: str) -> None:
    """Counts imports instead of seconds: these alone are four fifths of the server's start."""
    heavy = {"fastapi", "uvicorn", "numpy", "mlx", "tokenizers", "jinja2"}
    heavy |= {"pydantic"} if flag == "--version" else set()
    check = f"""
import sys
from server.launcher import main
try:
    sys.exit(main())
finally:
    print(sorted({heavy!r} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", check, flag], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert (f"glmserve {VERSION}" if flag == "--version" else "--ram-budget") in done.stdout

"""Imports point one way, and only `server.link` crosses between the HTTP process and the engine process."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each room may import of ours, besides itself.
ALLOWED = {
    "config": set[str](),
    "streaming": {"config"},
    "models": {"config", "streaming"},
    "server.link": {"config"},
    "server.engine": {"config", "streaming", "models", "server.link", "server.logs",
                      "server.glm.tokenizer_file", "server.glm.schemas.following"},
    "server.glm": {"config"},
    "server.api": {"config", "server.link.engine_protocol", "server.link.messages", "server.glm",
                   "server.version", "server.heap"},
    "server": {"config", "streaming", "models", "server.link", "server.engine", "server.glm", "server.api"},
}  # fmt: skip
OURS = ("config", "streaming", "models", "server", "training", "tests", "benchmarks")


def room_of(module: str) -> str:
    return max((room for room in ALLOWED if is_within(module, room)), key=len)


def is_within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module or ""


def source_files() -> list[Path]:
    return sorted(
        path for room in ("config", "streaming", "models", "server") for path in ROOT.glob(f"{room}/**/*.py")
    )


def wrong_imports(module: str, imported: list[str]) -> list[str]:
    room = room_of(module)
    allowed = ALLOWED[room] | {room}
    # The package `server` itself is a docstring: `import server` asks where it lies.
    ours = [name for name in imported if name.split(".")[0] in OURS and name != "server"]
    return [name for name in ours if not any(is_within(name, one) for one in allowed)]


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_stands_below_it(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    assert wrong_imports(module, list(imports_of(path))) == []


def test_the_walk_notices_an_import_that_points_up() -> None:
    assert wrong_imports("streaming.store", ["models.args"]) == ["models.args"]
    assert wrong_imports("server.api.app", ["server.engine.loop"]) == ["server.engine.loop"]


HTTP_SIDE = ["server.api.app", "server.cli", "server.commands.serve", "server.glm.tokenizer"]


@pytest.mark.parametrize("module", HTTP_SIDE)
def test_the_http_process_does_without_mlx(module: str) -> None:
    check = f"import sys, {module}; sys.exit('mlx' in {{name.split('.')[0] for name in sys.modules}})"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, timeout=60).returncode == 0

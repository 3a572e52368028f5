"""The fingerprint of saved rows: which checkpoint, computed how. Called when the prefix cache is opened."""

import ast
import hashlib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import models
from models.args import ModelArgs
from models.arithmetic import Arithmetic
from models.families import family_of
from models.loading.checkpoint_tensors import read_tensors

# The files of models/ that decide which numbers stand in a saved row, whatever the architecture.
COMPUTING = (
    "args.py",
    "arithmetic.py",
    "glm_moe_dsa.py",
    "linear.py",
    "attention/*.py",
    "experts/*.py",
    "loading/building.py",
)


def cache_fingerprint(
    directory: Path, args: ModelArgs, arithmetic: Arithmetic, *, knows_times: bool = True
) -> bytes:
    """Returns 32 bytes that differ where saved rows must not be used: another checkpoint or computation.

    The checkpoint is known by its config and by the size, time and header of its files, with 16 samples of
    each: reading 300 GB to be surer would take longer than the prefix cache can save. The computation is
    known by its arithmetic, by MLX's version, and by the code in `COMPUTING` and of its architecture,
    without comments and docstrings. Without the files' times the result is the same on all machines that
    have this checkpoint.
    """
    digest = hashlib.sha256(f"{args!r} {arithmetic!r} mlx {version('mlx')}".encode())
    root = Path(models.__file__).parent
    patterns = [*COMPUTING, *family_of(args).computing_files]
    for source in sorted(path for pattern in patterns for path in root.glob(pattern)):
        _feed(digest, source.name.encode(), source_meaning(source.read_text(encoding="utf-8")))
    _feed(digest, (directory / "config.json").read_bytes())
    for path in sorted({entry.path for entry in read_tensors(directory, args).values()}):
        stat = path.stat()
        time = f" {stat.st_mtime_ns}" if knows_times else ""
        _feed(digest, f"{path.name} {stat.st_size}{time}".encode(), *_samples(path))
    return digest.digest()


def source_meaning(source: str) -> bytes:
    """Returns what a module says to the interpreter: its nodes, names and constants, without docstrings.

    The same for every version of Python, so that saved rows survive an update of it.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            del node.body[0]
    return "\n".join(_node_text(node) for node in ast.walk(tree)).encode()


def _node_text(node: ast.AST) -> str:
    values = [value for _, value in ast.iter_fields(node) if isinstance(value, str | int | float | bytes)]
    return f"{type(node).__name__} {values!r}"


def _samples(path: Path, count: int = 16, nbytes: int = 4096) -> Iterable[bytes]:
    with open(path, "rb") as file:
        header_bytes = 8 + int.from_bytes(file.read(8), "little")
        yield file.read(header_bytes - 8)
        size = path.stat().st_size
        for sample in range(count):
            file.seek(header_bytes + (size - header_bytes) * sample // count)
            yield file.read(nbytes)


def _feed(digest: "hashlib._Hash", *parts: bytes) -> None:
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)

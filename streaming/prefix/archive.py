"""Saved prompts as one file, to carry them to another machine or to keep them. Owns nothing; knows no model.

A tar archive: `about.json` (the format and the fingerprints), then block files as they lie in the directory,
parents before their children, then `end.json` (how many there are, and which of them are pinned), so that a
file that was cut is noticed. Called by the command `glmserve prefixes`, which runs beside any server: files
of the directory appear whole, and what is missing is a miss.

Blocks are named after an exact fingerprint, in which the times of the checkpoint's files are. Those differ on
every machine, so an import names the blocks anew if the portable fingerprint, all but the times, is the same.
"""

import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from config.errors import UsageError
from config.sizes import format_size
from streaming.prefix.archive_members import FOREIGN, add_member, checked, fields_of, read_members, sealed
from streaming.prefix.block_files import BlockFiles, StoredFile
from streaming.prefix.block_format import (
    Block,
    BlockName,
    DamagedBlock,
    decode,
    encode,
    fingerprint_of,
    root_key,
)

FORMAT = 1
ABOUT, END = "about.json", "end.json"


@dataclass(frozen=True)
class Fingerprints:
    """Of a checkpoint and its arithmetic: as on this machine, and as on all."""

    exact: bytes
    portable: bytes


@dataclass(frozen=True)
class Moved:
    """What an export or an import held."""

    num_blocks: int
    num_tokens: int
    nbytes: int
    num_known: int = 0  # imported ones that were there already


def export_blocks(
    files: BlockFiles, prints: Fingerprints, target: Path, only_pinned: bool, group: str = ""
) -> Moved:
    """Write the blocks of a cache group, or its pinned ones, that can be reached from a prompt's start.

    Raises UsageError where there are none, or the target exists or cannot be written; nothing is left then.
    """
    if target.exists():
        raise UsageError(f"{target} exists already; remove it or name another file")
    part = target.with_name(target.name + ".part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
            moved = _export(files, prints, stream, only_pinned, group)
        if not moved.num_blocks:
            which = "pinned" if only_pinned else "saved"
            raise UsageError(f"there are no {which} prompts of this checkpoint in {files.directory}")
        os.replace(part, target)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    return moved


def _export(
    files: BlockFiles, prints: Fingerprints, stream: io.BufferedWriter, only_pinned: bool, group: str
) -> Moved:
    """Names the blocks as those of no group are named: an archive may go to any."""
    keys = {root_key(prints.exact, group): root_key(prints.exact)}
    pinned, moved = [], Moved(0, 0, 0)
    with tarfile.open(fileobj=stream, mode="w") as archive:
        about = {"format": FORMAT, "exact": prints.exact.hex(), "portable": prints.portable.hex()}
        add_member(archive, ABOUT, sealed(about))
        for file in sorted(files.list(), key=lambda file: (file.start, file.path)):
            block = _load(files, file) if file.is_pinned or not only_pinned else None
            if block is None or block.parent not in keys:
                continue
            moving = replace(block, parent=keys[block.parent])
            keys[block.name.key] = moving.name.key
            if file.is_pinned:
                pinned.append(moving.name.file_name)
            add_member(archive, moving.name.file_name, b"".join(encode(moving, prints.exact)))
            moved = _count(moved, block)
        add_member(archive, END, sealed({"blocks": moved.num_blocks, "pinned": pinned}))
    return moved


def _load(files: BlockFiles, file: StoredFile) -> Block | None:
    """A block of our own; one of another checkpoint is left alone."""
    name = BlockName.of_file(file.path.name)
    return files.read(name) if name and files.is_ours(file) else None


def import_blocks(
    files: BlockFiles, prints: Fingerprints, source: Path, group: str = "", token_bytes: int | None = None
) -> Moved:
    """Put the blocks of an export into the directory, pinned as they were, for a cache group.

    All of it is checked first, also that each token takes `token_bytes`. Raises UsageError where it is
    damaged, cut, of another checkpoint or version, or too large; nothing is changed then.
    """
    try:
        total, pinned = _check(source, prints, token_bytes)
        if total.nbytes > files.max_bytes:
            size, limit = format_size(total.nbytes), format_size(files.max_bytes)
            raise UsageError(f"{source} holds {size}, more than --prefix-cache-size {limit}")
        return _import(files, prints, source, group, pinned)
    except DamagedBlock as error:
        message = f"{source} is damaged, or no export of glmserve: {error}; nothing was imported"
        raise UsageError(message) from error
    except (tarfile.TarError, ValueError) as error:  # the latter for names that are not ASCII
        raise UsageError(f"{source} is damaged, or no export of glmserve: {error}") from error
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror}") from error


def _check(source: Path, prints: Fingerprints, token_bytes: int | None) -> tuple[Moved, set[str]]:
    total, end, exact = Moved(0, 0, 0), None, b""
    stops: dict[bytes, int] = {}  # where each block ends, by its key
    names: set[str] = set()
    for name, raw in read_members(source):
        if end is not None:
            raise DamagedBlock("something follows its end")
        if not exact:
            if name != ABOUT:
                raise DamagedBlock(FOREIGN)
            exact = _read_about(source, raw, prints)
            stops[root_key(exact)] = 0
        elif name == END:
            end = _read_end(raw)
        else:
            block = _decode(name, raw, exact)
            if stops.get(block.parent) != block.start:
                raise DamagedBlock(f"what comes before {name} is missing")
            if name in names or not block.tokens.size:
                raise DamagedBlock(f"{name} stands in it twice, or is empty")
            if token_bytes and block.payload.size != token_bytes * block.tokens.size:
                raise DamagedBlock(f"{name} holds rows of another size than this model's")
            stops[block.name.key] = block.start + block.tokens.size
            names.add(name)
            total = _count(total, block)
    if end is None or end[0] != total.num_blocks:
        raise DamagedBlock("its end is missing")
    if not end[1] <= names:
        raise DamagedBlock("its list pins what is not in it")
    return total, end[1]


def _read_about(source: Path, raw: bytes, prints: Fingerprints) -> bytes:
    about = fields_of(raw)
    if about.get("format") != FORMAT:
        version = str(about.get("format"))[:20]
        raise UsageError(f"{source} was written by another version of glmserve (format {version!r})")
    if checked(about).get("portable") != prints.portable.hex():
        raise UsageError(
            f"{source} is of another checkpoint, or of another version of glmserve or MLX: what it holds "
            "cannot be used here; --model names the checkpoint"
        )
    exact = about.get("exact")
    if not (isinstance(exact, str) and re.fullmatch("[0-9a-f]{64}", exact)):
        raise DamagedBlock("it does not say what its blocks were computed with")
    return bytes.fromhex(exact)


def _read_end(raw: bytes) -> tuple[int, set[str]]:
    """How many blocks there are, and the names of those that are pinned."""
    end = checked(fields_of(raw))
    count, pinned = end.get("blocks"), end.get("pinned")
    is_list = isinstance(pinned, list) and all(isinstance(name, str) for name in pinned)
    if type(count) is not int or not isinstance(pinned, list) or not is_list:
        raise DamagedBlock("its end says nothing clear")
    return count, set(pinned)


def _import(files: BlockFiles, prints: Fingerprints, source: Path, group: str, pinned: set[str]) -> Moved:
    _make_room(files, (block for _, block in _translated(prints, source, group)))
    to_pin: list[BlockName] = []
    moved = Moved(0, 0, 0)
    for name, ours in _translated(prints, source, group):
        if name in pinned:
            to_pin.append(ours.name)
        moved = _count(moved, ours)
        if files.has(ours.name):
            moved = replace(moved, num_known=moved.num_known + 1)
        elif not files.write(ours):
            raise UsageError(f"{files.directory} took {moved.num_blocks - 1} blocks and no more; see above")
    if to_pin:
        files.pin(to_pin)
    return moved


def _make_room(files: BlockFiles, blocks: Iterable[Block]) -> None:
    """For all that is not there, at once; what is there is not given up for it."""
    known, missing = [], 0
    for block in blocks:
        if files.has(block.name):
            known.append(block.name)
        else:
            missing += block.nbytes
    files.use(known)
    try:
        files.make_room(missing)
    except OSError as error:
        raise UsageError(
            f"{files.directory} has no room for {format_size(missing)}: {error.strerror}"
        ) from error


def _translated(prints: Fingerprints, source: Path, group: str) -> Iterator[tuple[str, Block]]:
    """The blocks of an export that was checked, as they are named here, each with its name there."""
    keys: dict[bytes, bytes] = {}
    for name, raw in read_members(source):
        if name == END:
            return
        if name == ABOUT:
            exact = _read_about(source, raw, prints)
            keys[root_key(exact)] = root_key(prints.exact, group)
            continue
        theirs = _decode(name, raw, exact)
        if theirs.parent not in keys:
            raise DamagedBlock("it was changed while it was read")
        ours = replace(theirs, parent=keys[theirs.parent])
        keys[theirs.name.key] = ours.name.key
        yield name, ours


def _decode(name: str, raw: bytes, exact: bytes) -> Block:
    block_name = BlockName.of_file(name)
    if block_name is None:
        raise DamagedBlock(f"{name[:80]!r} is no block")
    content = np.frombuffer(raw, np.uint8)
    if fingerprint_of(content) != exact:
        raise DamagedBlock(f"{name} is of another checkpoint than the rest")
    return decode(content, exact, block_name)


def _count(moved: Moved, block: Block) -> Moved:
    return Moved(
        moved.num_blocks + 1,
        moved.num_tokens + block.tokens.size,
        moved.nbytes + block.nbytes,
        moved.num_known,
    )

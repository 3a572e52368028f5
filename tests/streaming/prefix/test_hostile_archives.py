"""Archives made on purpose: each is refused in one line, in little memory, with nothing changed."""

import gzip
import hashlib
import io
import json
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from config.errors import UsageError
from streaming.prefix.archive import Fingerprints, import_blocks
from streaming.prefix.block_files import BlockFiles
from streaming.prefix.block_format import Block, as_tokens, encode
from tests.streaming.prefix.prefix_blocks import FINGERPRINT, make_chain

PRINTS = Fingerprints(FINGERPRINT, bytes(range(1, 33)))
TOKEN_BYTES = 250
CHAIN = make_chain(3)
NAMES = [block.name.file_name for block in CHAIN]


def sealed(**fields: Any) -> bytes:
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return json.dumps(fields | {"sha256": digest}).encode()


def about(**more: Any) -> bytes:
    fields = {"format": 1, "exact": PRINTS.exact.hex(), "portable": PRINTS.portable.hex()}
    return sealed(**(fields | more))


def end(**more: Any) -> bytes:
    return sealed(**({"blocks": 3, "pinned": NAMES[:1]} | more))


def raw(block: Block) -> bytes:
    return b"".join(encode(block, FINGERPRINT))


Member = tuple[str | tarfile.TarInfo, bytes]
BLOCKS: list[Member] = [(block.name.file_name, raw(block)) for block in CHAIN]


def tar(*members: Member, kind: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            info.size = info.size or len(content)
            archive.addfile(info, io.BytesIO(content.ljust(info.size, b"\0")) if content else None)
    return buffer.getvalue()


def special(kind: bytes, name: str = NAMES[0], link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def extended(key: str, value: str) -> bytes:
    info = tarfile.TarInfo(NAMES[0])
    info.pax_headers, info.size = {key: value}, len(BLOCKS[0][1])
    return tar(("about.json", about()), (info, BLOCKS[0][1]), *BLOCKS[1:], ("end.json", end()))


def with_end(**more: Any) -> bytes:
    return tar(("about.json", about()), *BLOCKS, ("end.json", end(**more)))


def with_about(**more: Any) -> bytes:
    return tar(("about.json", about(**more)), *BLOCKS, ("end.json", end()))


def with_blocks(*members: Member) -> bytes:
    return tar(("about.json", about()), *members, ("end.json", end(blocks=len(members))))


def with_size(size: int) -> bytes:
    """A header that promises more than there is."""
    info = tarfile.TarInfo(NAMES[0])
    info.size = size
    head = tar(("about.json", about()))[: -tarfile.RECORDSIZE + 1024]
    return (
        tar(("about.json", about())).rstrip(b"\0").ljust(1024, b"\0") + info.tobuf(tarfile.GNU_FORMAT) + head
    )


def block(tokens: int = 4, payload: int = 1000, start: int = 0, parent: bytes = CHAIN[0].parent) -> Member:
    made = Block(parent, start, as_tokens(range(tokens)), make_chain(1, payload_bytes=payload)[0].payload)
    return made.name.file_name, raw(made)


DEEP = b"[" * 200_000
WHOLE = with_end()
HOSTILE: dict[str, bytes | Callable[[], bytes]] = {
    "a link to a file": with_blocks((special(tarfile.SYMTYPE, link="/etc/passwd"), b"")),
    "a link to itself": with_blocks((special(tarfile.SYMTYPE, link=NAMES[0]), b"")),
    "a hard link": with_blocks(BLOCKS[0], (special(tarfile.LNKTYPE, NAMES[1], NAMES[0]), b"")),
    "a hard link to itself": with_blocks((special(tarfile.LNKTYPE, NAMES[0], NAMES[0]), b"")),
    "two links in a loop": with_blocks(
        (special(tarfile.SYMTYPE, NAMES[0], NAMES[1]), b""),
        (special(tarfile.SYMTYPE, NAMES[1], NAMES[0]), b""),
    ),
    "a device": with_blocks((special(tarfile.CHRTYPE), b"")),
    "a disk": with_blocks((special(tarfile.BLKTYPE), b"")),
    "a pipe": with_blocks((special(tarfile.FIFOTYPE), b"")),
    "a folder": with_blocks((special(tarfile.DIRTYPE), b"")),
    "a folder of old": with_blocks((special(tarfile.AREGTYPE, NAMES[0] + "/"), b"")),
    "a type of nobody": with_blocks((special(b"Z"), b"")),
    "a path upwards": with_blocks(("../" + NAMES[0], BLOCKS[0][1])),
    "an absolute path": with_blocks(("/tmp/" + NAMES[0], BLOCKS[0][1])),
    "a path through a folder": with_blocks(("a/../" + NAMES[0], BLOCKS[0][1])),
    "a name without end": with_blocks(("x" * 90_000, b"x")),
    "a name of GNU without end": tar(("about.json", about()), ("x" * 90_000, b"x"), kind=tarfile.GNU_FORMAT),
    "a name that is no text": WHOLE.replace(NAMES[1].encode()[:9], b"\xff\xfe0000004", 1),
    "an extended header": extended("comment", "x" * 100_000),
    "an extended size": extended("size", "8589934592"),
    "a sparse map": extended("GNU.sparse.map", "0,1,8589934592,0"),
    "a sparse member of 8 GB": extended("GNU.sparse.realsize", "8589934592"),
    "eight gigabytes": lambda: with_size(2**33),
    "fewer than no bytes": lambda: with_size(-1),
    "lists in lists": tar(("about.json", DEEP)),
    "lists in lists at the end": tar(("about.json", about()), *BLOCKS, ("end.json", DEEP)),
    "objects in objects": tar(("about.json", b'{"a":' * 100_000)),
    "a number without end": tar(("about.json", b'{"format": ' + b"1" * 100_000 + b"}")),
    "a list that is no text": tar(("about.json", b"\xff\xfe{")),
    "a list that is a number": tar(("about.json", b"7")),
    "no fields": tar(("about.json", sealed(format=1))),
    "a format that is a list": with_about(format=[1]),
    "a mark that is a number": with_about(exact=7),
    "a mark that is no hex": with_about(exact="z" * 64),
    "a short mark": with_about(exact="00"),
    "no mark": with_about(exact=None),
    "a portable mark that is a list": with_about(portable=[]),
    "a wrong count": with_end(blocks=2),
    "a count that is text": with_end(blocks="3"),
    "a count that is a truth": tar(("about.json", about()), BLOCKS[0], ("end.json", end(blocks=True))),
    "no count": tar(("about.json", about()), *BLOCKS, ("end.json", sealed(pinned=[]))),
    "pins that are a number": with_end(pinned=7),
    "pins that are lists": with_end(pinned=[[], {}]),
    "pins of what is not there": with_end(pinned=["../../etc/passwd"]),
    "no pins": tar(("about.json", about()), *BLOCKS, ("end.json", sealed(blocks=3))),
    "the same block twice": with_blocks(BLOCKS[0], BLOCKS[0]),
    "the first list twice": with_blocks(("about.json", about())),
    "something behind the end": tar(("about.json", about()), *BLOCKS, ("end.json", end()), ("x", b"y")),
    "bytes behind the end": WHOLE + b"more",
    "zeros without end": WHOLE + bytes(10**6),
    "a child before its parent": with_blocks(BLOCKS[1], BLOCKS[0]),
    "a block at a wrong place": with_blocks(block(start=4)),
    "a block far away": with_blocks(block(start=10**15)),
    "a block of no tokens": with_blocks(block(tokens=0, payload=0)),
    "too few bytes for the tokens": with_blocks(block(payload=999)),
    "too many bytes for the tokens": with_blocks(block(payload=1001)),
    "no bytes": with_blocks(block(payload=0)),
    "cut in a block": WHOLE[:3000],
    "cut in a header": WHOLE[:700],
    "cut before the end": tar(("about.json", about()), *BLOCKS),
    "packed zeros": gzip.compress(bytes(10**7)),
    "a packed archive": gzip.compress(WHOLE),
    "nothing": b"",
    "zeros": bytes(10**6),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    made = HOSTILE[name]
    source = tmp_path / "prompts.tar"
    source.write_bytes(made if isinstance(made, bytes) else made())
    files = BlockFiles(tmp_path / "there", FINGERPRINT, 10**9)
    tracemalloc.start()
    try:
        with pytest.raises(UsageError) as refused:
            import_blocks(files, PRINTS, source, token_bytes=TOKEN_BYTES)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500
    assert str(source) in str(refused.value)
    assert peak < 2 * 10**7
    assert not list(files.directory.iterdir())


REASONS = {
    "is no plain file": (
        "a link to a file",
        "a hard link",
        "a device",
        "a disk",
        "a pipe",
        "a folder",
        "a type of nobody",
    ),
    "rows of another size": ("too few bytes for the tokens", "too many bytes for the tokens", "no bytes"),
    "is said to have": ("eight gigabytes", "fewer than no bytes"),
    "its list is": (
        "lists in lists",
        "objects in objects",
        "a list that is no text",
        "a list that is a number",
    ),
    "is missing": (
        "a child before its parent",
        "a block at a wrong place",
        "a wrong count",
        "cut before the end",
    ),
    "stands in it twice": ("the same block twice", "a block of no tokens"),
    "pins what is not": ("pins of what is not there",),
    "something follows": ("something behind the end", "bytes behind the end", "zeros without end"),
}


@pytest.mark.parametrize(
    ("reason", "name"), [(reason, name) for reason, names in REASONS.items() for name in names]
)
def test_it_is_refused_for_what_it_is(reason: str, name: str, tmp_path: Path) -> None:
    """Not for another fault that was made on the way: each check is the one that finds its kind."""
    made = HOSTILE[name]
    (tmp_path / "prompts.tar").write_bytes(made if isinstance(made, bytes) else made())
    files = BlockFiles(tmp_path / "there", FINGERPRINT, 10**9)
    with pytest.raises(UsageError, match=reason):
        import_blocks(files, PRINTS, tmp_path / "prompts.tar", token_bytes=TOKEN_BYTES)


def test_holes_of_gigabytes_are_not_read(tmp_path: Path) -> None:
    source = tmp_path / "prompts.tar"
    source.write_bytes(with_size(2**27 - 512))
    os.truncate(source, 2**33)
    files = BlockFiles(tmp_path / "there", FINGERPRINT, 10**9)
    with pytest.raises(UsageError, match=r"prompts\.tar"):
        import_blocks(files, PRINTS, source, token_bytes=TOKEN_BYTES)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "loop", "nothing"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "prompts.tar"
    match kind:
        case "pipe":
            os.mkfifo(source)
        case "folder":
            source.mkdir()
        case "device":
            source = Path("/dev/zero")
        case "loop":
            source.symlink_to(source)
    with pytest.raises(UsageError, match="cannot be read"):
        import_blocks(BlockFiles(tmp_path / "there", FINGERPRINT, 10**9), PRINTS, source)


def test_the_whole_one_that_these_were_made_from_is_taken(tmp_path: Path) -> None:
    (tmp_path / "prompts.tar").write_bytes(WHOLE)
    files = BlockFiles(tmp_path / "there", FINGERPRINT, 10**9)
    moved = import_blocks(files, PRINTS, tmp_path / "prompts.tar", "fleet", TOKEN_BYTES)
    assert (moved.num_blocks, files.num_pinned) == (3, 1)
    assert files.read(CHAIN[0].name) is None, "it is found in its group only"


@pytest.mark.parametrize("kind", ["loop", "two in a loop", "gone", "elsewhere", "pipe", "folder"])
def test_what_is_no_block_in_the_folder_turns_nothing_off(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "blocks"
    folder.mkdir()
    path, other = folder / NAMES[0], folder / NAMES[1]
    match kind:
        case "loop":
            path.symlink_to(path.name)
        case "two in a loop":
            path.symlink_to(other.name)
            other.symlink_to(path.name)
        case "gone":
            path.symlink_to("nowhere")
        case "elsewhere":
            (tmp_path / "mine").write_text("mine")
            path.symlink_to(tmp_path / "mine")
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
    files = BlockFiles(folder, FINGERPRINT, 10**9)
    assert files.read(CHAIN[0].name) is None
    written = [files.write(block) for block in CHAIN]
    assert written[2]
    assert files.is_writable
    assert files.list()
    assert files.read(CHAIN[2].name) is not None
    assert (files.read(CHAIN[0].name) is not None) == (kind != "folder")
    assert kind != "elsewhere" or (tmp_path / "mine").read_text() == "mine"

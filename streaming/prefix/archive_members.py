"""The files of an archive of saved prompts: a plain tar, and lists in JSON with a checksum.

Whatever an archive holds, reading it takes bounded memory and ends in a file, or in an error of a few words.
"""

import errno
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config.errors import UsageError
from streaming.prefix.block_format import DamagedBlock

RECORD = 512
# Larger than any block, and than the list of a million pinned ones.
MAX_MEMBER_BYTES = 2**27
# Writers fill an archive up with zeros to a multiple of 20 records.
MAX_PADDING = 40 * RECORD
FOREIGN = "it does not begin as an export of glmserve does"


def read_members(source: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file, in order.

    Only plain files with plain headers are read, and none larger than a block: a tar archive may also hold
    links, devices, holes, and extended headers of any size.
    """
    if not source.is_file():
        reason = "it is no plain file" if source.exists() else os.strerror(errno.ENOENT)
        raise UsageError(f"{source} cannot be read: {reason}")
    num_read = 0
    with open(source, "rb") as stream:
        while any(header := stream.read(RECORD)):
            member = tarfile.TarInfo.frombuf(header, "ascii", "strict")
            if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
                what = f"{member.name[:80]!r} is no plain file"
                raise DamagedBlock(what if num_read else FOREIGN)
            if not 0 <= member.size <= MAX_MEMBER_BYTES:
                raise DamagedBlock(f"{member.name[:80]!r} is said to have {member.size} bytes")
            content = stream.read(member.size)
            if len(content) < member.size:
                raise DamagedBlock(f"{member.name[:80]!r} is cut off")
            stream.seek(-member.size % RECORD, os.SEEK_CUR)
            yield member.name, content
            num_read += 1
        if any(stream.read(MAX_PADDING)) or stream.read(1):
            raise DamagedBlock("something follows its end")


def fields_of(raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DamagedBlock("its list is not readable") from error
    if not isinstance(fields, dict):
        raise DamagedBlock("its list is no list")
    return fields


def sealed(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields | {"sha256": _digest(fields)}).encode()


def checked(fields: dict[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in fields.items() if name != "sha256"}
    if fields.get("sha256") != _digest(own):
        raise DamagedBlock("the checksum of its list is wrong")
    return own


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o600
    archive.addfile(info, io.BytesIO(content))

"""The file of one block of saved KV: how it is named, written, and refused. Owns nothing; knows no model.

A block is a run of tokens with the bytes that a model keeps for them. Its key is a hash over the key of the
block before it and its own tokens, so a key stands for everything from the first token on; the chain begins
at a fingerprint of the checkpoint and its arithmetic. Called by the files and by the prefix cache, on any
thread.

    magic 8 | fingerprint 32 | parent 32 | start u64 | tokens u64 | payload u64 | crc32 u32 | ids | payload

Numbers are little-endian; ids are int32. The checksum covers everything before and after itself. CRC-32 finds
every burst of up to 32 wrong bits, and misses one in 2^32 of anything else. Users who may write to the
directory are trusted, as are those who may write to the checkpoint.
"""

import hashlib
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from streaming.files.floats import Bytes

MAGIC = b"GLMKV\x00\x01\n"
_HEADER = struct.Struct("<8s32s32sQQQ")
_CHECKSUM = struct.Struct("<I")
_FILE_NAME = re.compile(r"(\d{8,})-([0-9a-f]{64})\.kv")
# More than any block has.
MOST_TOKENS = 2**16
HEADER_BYTES = _HEADER.size + _CHECKSUM.size

Tokens = NDArray[np.int32]


class DamagedBlock(Exception):
    """A file does not hold the block that it is named after. Never leaves `streaming/`."""


@dataclass(frozen=True)
class BlockName:
    """What a block is found by: its key, and the position of its first token."""

    key: bytes
    start: int

    @property
    def file_name(self) -> str:
        return f"{self.start:08d}-{self.key.hex()}.kv"

    @classmethod
    def of_file(cls, name: str) -> "BlockName | None":
        """The block that a file of this name holds; None where it is no name of a block."""
        match = _FILE_NAME.fullmatch(name)
        return cls(bytes.fromhex(match[2]), int(match[1])) if match else None


@dataclass(frozen=True, eq=False)
class Block:
    """Tokens `start` to `start + len(tokens)` of a conversation, and their bytes."""

    parent: bytes
    start: int
    tokens: Tokens
    payload: Bytes

    @property
    def name(self) -> BlockName:
        return BlockName(chain_key(self.parent, self.tokens), self.start)

    @property
    def nbytes(self) -> int:
        """What the block takes in memory, and within a few bytes on disk."""
        return HEADER_BYTES + self.tokens.nbytes + self.payload.nbytes


def root_key(fingerprint: bytes, group: str = "") -> bytes:
    """The parent of first blocks, in each cache group another one; "" is that of servers without keys."""
    return hashlib.sha256(b"root" + fingerprint + group.encode()).digest()


def chain_key(parent: bytes, tokens: Tokens) -> bytes:
    """The key of these tokens behind those of `parent`."""
    return hashlib.sha256(parent + tokens.tobytes()).digest()


def as_tokens(token_ids: Sequence[int]) -> Tokens:
    """Ids in the form that blocks hold."""
    return np.array(token_ids, dtype=np.dtype("<i4"))


def encode(block: Block, fingerprint: bytes) -> list[bytes | memoryview]:
    """The parts of the file, in order; the payload is not copied."""
    header = _HEADER.pack(
        MAGIC, fingerprint, block.parent, block.start, block.tokens.size, block.payload.size
    )
    ids = block.tokens.tobytes()
    return [header, _CHECKSUM.pack(_checksum(header, ids, block.payload)), ids, block.payload.data]


def decode(raw: Bytes, fingerprint: bytes, name: BlockName) -> Block:
    """The block of this name. Raises DamagedBlock where the bytes are anything else."""
    if raw.size < HEADER_BYTES:
        raise DamagedBlock(f"{raw.size} bytes are too few for a header")
    header, checksum = raw[: _HEADER.size].tobytes(), raw[_HEADER.size : HEADER_BYTES].tobytes()
    magic, found, parent, start, num_tokens, payload_bytes = _HEADER.unpack(header)
    if magic != MAGIC:
        raise DamagedBlock("it is no block of this format")
    if found != fingerprint:
        raise DamagedBlock("it belongs to another checkpoint")
    if raw.size != HEADER_BYTES + 4 * num_tokens + payload_bytes:
        raise DamagedBlock(f"it has {raw.size} bytes, its header says otherwise")
    ids, payload = np.split(raw[HEADER_BYTES:], [4 * num_tokens])
    if _CHECKSUM.unpack(checksum)[0] != _checksum(header, ids.tobytes(), payload):
        raise DamagedBlock("its checksum is wrong")
    block = Block(parent, start, ids.view(np.dtype("<i4")), payload)
    if block.name != name:
        raise DamagedBlock("it holds other tokens than its name says")
    return block


def fingerprint_of(raw: Bytes) -> bytes | None:
    """The fingerprint in the header of a file of which this is the beginning; None where it is no block."""
    if raw.size < _HEADER.size:
        return None
    magic, found, *_ = _HEADER.unpack(raw[: _HEADER.size].tobytes())
    return found if magic == MAGIC else None


def peek(path: Path, fingerprint: bytes) -> tuple[bytes, Tokens] | None:
    """The parent's key and the tokens of a block of this checkpoint, unchecked; None for any other file."""
    try:
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
            if len(raw) < HEADER_BYTES:
                return None
            magic, found, parent, _, num_tokens, _ = _HEADER.unpack(raw[: _HEADER.size])
            if magic != MAGIC or found != fingerprint or num_tokens > MOST_TOKENS:
                return None
            ids = np.frombuffer(file.read(4 * num_tokens), np.dtype("<i4"))
    except (OSError, ValueError):
        return None
    return (parent, ids) if ids.size == num_tokens else None


def _checksum(header: bytes, ids: bytes, payload: Bytes) -> int:
    return zlib.crc32(payload.data, zlib.crc32(ids, zlib.crc32(header)))

"""What is pinned in a folder of saved prompts, by conversations. Called by the writer's thread."""

from dataclasses import dataclass

import numpy as np

from streaming.prefix.block_files import BlockFiles
from streaming.prefix.block_format import BlockName, Tokens, peek


@dataclass(frozen=True)
class PinnedChain:
    """Pinned blocks that follow each other, with the tokens of the first and of the last."""

    num_tokens: int
    num_bytes: int
    first_tokens: tuple[int, ...]
    last_tokens: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Pinned:
    parent: bytes
    start: int
    nbytes: int
    tokens: Tokens


def list_pins(files: BlockFiles) -> tuple[PinnedChain, ...]:
    """The pinned conversations of this checkpoint, the longest first; what they share counts in each."""
    found: dict[bytes, _Pinned] = {}
    for file in files.list():
        name = BlockName.of_file(file.path.name) if file.is_pinned else None
        seen = peek(file.path, files.fingerprint) if name else None
        if name and seen:
            found[name.key] = _Pinned(seen[0], name.start, file.nbytes, seen[1])
    parents = {one.parent for one in found.values()}
    chains = (_chain(found, key) for key in found if key not in parents)
    return tuple(sorted(chains, key=lambda chain: -chain.num_tokens))


def _chain(found: dict[bytes, _Pinned], last: bytes) -> PinnedChain:
    blocks = [found[last]]
    while before := found.get(blocks[-1].parent):
        blocks.append(before)
    first, end = blocks[-1], blocks[0]
    return PinnedChain(
        int(end.start + end.tokens.size),
        sum(block.nbytes for block in blocks),
        tuple(np.asarray(first.tokens).tolist()),
        tuple(np.asarray(end.tokens).tolist()),
    )

"""Blocks of saved KV without a model: random bytes for random tokens."""

import numpy as np

from streaming.prefix.block_format import Block, as_tokens, root_key

FINGERPRINT = bytes(range(32))


def make_chain(count: int, seed: int = 0, payload_bytes: int = 1000, tokens: int = 4) -> list[Block]:
    """Blocks of one conversation, in order."""
    rng = np.random.default_rng(seed)
    chain: list[Block] = []
    for index in range(count):
        parent = chain[-1].name.key if chain else root_key(FINGERPRINT)
        ids = as_tokens([int(t) for t in rng.integers(0, 100, tokens)])
        payload = rng.integers(0, 256, payload_bytes, dtype=np.uint8)
        chain.append(Block(parent, index * tokens, ids, payload))
    return chain


def is_same(one: Block | None, other: Block) -> bool:
    """Whether nothing was lost."""
    return (
        one is not None
        and one.name == other.name
        and one.parent == other.parent
        and np.array_equal(one.tokens, other.tokens)
        and np.array_equal(one.payload, other.payload)
    )

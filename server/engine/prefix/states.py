"""Saved states: what a model that remembers more than rows needs behind a saved beginning.

A state is a block of its own, named after the block behind which it stands. Pure: it names and chooses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streaming.files.floats import Bytes
from streaming.prefix.block_format import Block, BlockName, Tokens, as_tokens, chain_key

# A divergence costs at most this many tokens that were known. 6.1 MB of GLM-5.2: large enough for an SSD.
BLOCK_TOKENS = 64
# In the place of a block's tokens; no token has this id.
STATE_MARK = as_tokens([-1])


@dataclass(frozen=True)
class Way:
    """How far a prompt can be restored: whole blocks, perhaps a tail, and the state behind them."""

    num_whole: int
    tail: BlockName | None = None
    state: BlockName | None = None

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self.state.start if self.state else 0


def state_name(key: bytes, length: int) -> BlockName:
    """The name of the state behind `length` tokens, the last block of which has this key."""
    return BlockName(chain_key(key, STATE_MARK), length)


def state_after(tokens: Tokens, names: Sequence[BlockName], root: bytes) -> BlockName:
    """The name of the state behind these tokens, whose whole blocks are `names`."""
    return state_name(_last_key(tokens, names, root), tokens.size)


def state_block(tokens: Tokens, names: Sequence[BlockName], root: bytes, payload: Bytes) -> Block:
    """The state behind these tokens as a block."""
    return Block(_last_key(tokens, names, root), tokens.size, STATE_MARK, payload)


def _last_key(tokens: Tokens, names: Sequence[BlockName], root: bytes) -> bytes:
    num_whole = tokens.size // BLOCK_TOKENS
    key = names[num_whole - 1].key if num_whole else root
    rest = tokens[num_whole * BLOCK_TOKENS :]
    return chain_key(key, rest) if rest.size else key


def find_way(
    tokens: Tokens, names: Sequence[BlockName], root: bytes, is_saved: Callable[[BlockName], bool]
) -> Way:
    """The longest beginning of a prompt, short of its last token, that was saved with a state behind it."""
    most, saved = tokens.size - 1, 0
    while (saved + 1) * BLOCK_TOKENS <= most and is_saved(names[saved]):
        saved += 1
    start, parent = saved * BLOCK_TOKENS, names[saved - 1].key if saved else root
    rest = tokens[start : min(start + BLOCK_TOKENS - 1, most)]
    for size in range(rest.size, 0, -1):
        tail = BlockName(chain_key(parent, rest[:size]), start)
        state = state_name(tail.key, start + size)
        if is_saved(state) and is_saved(tail):
            return Way(saved, tail, state)
    for count in range(saved, 0, -1):
        state = state_name(names[count - 1].key, count * BLOCK_TOKENS)
        if is_saved(state):
            return Way(count, None, state)
    return Way(0)

"""The gated delta rule of Kimi Delta Attention, a gate for each channel: by chunks, and one row at a time.

A head keeps a matrix S [D, V] and reads row after row: S decays by exp(g), a channel of the key at a time,
then what S holds of the key is moved towards the value by beta. Pure functions in float32. `mx.fast`'s
`gated_delta_update` has one gate for a head, so it does not fit.
"""

import mlx.core as mx

# Rows of a chunk, which lie at multiples of it. Exponents within a chunk are taken from its middle: with a
# gate of at least -5 a row they stay within 16 times 5, and exp(80) is a float32.
CHUNK = 32


def step(
    state: mx.array, q: mx.array, k: mx.array, v: mx.array, gate: mx.array, beta: mx.array
) -> tuple[mx.array, mx.array]:
    """One row: state [heads, D, V], q, k, gate [heads, D], v [heads, V], beta [heads].

    Returns what is read, [heads, V], and the state behind the row. The gate is the logarithm of the decay.
    """
    state = state * mx.exp(gate)[..., None]
    held = (k[:, None, :] @ state)[:, 0]  # [heads, V]
    state = state + k[..., None] * ((v - held) * beta[:, None])[:, None, :]
    return (q[:, None, :] @ state)[:, 0], state


def by_chunks(
    state: mx.array,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    gate: mx.array,
    beta: mx.array,
    position: int,
) -> tuple[mx.array, mx.array]:
    """Rows from `position` on, as `step` would take them: [n, heads, ...] each -> out [n, heads, V], state.

    Chunks lie at absolute positions, so that a row's numbers do not depend on where the rows before it were
    cut, provided it was at a multiple of `CHUNK`.
    """
    rows = q.shape[0]
    before, after = position % CHUNK, -(position + rows) % CHUNK
    q, k, v, gate, beta = (_chunked(x, before, after) for x in (q, k, v, gate, beta[..., None]))
    total = mx.cumsum(gate, axis=-2)  # [chunks, heads, CHUNK, D]
    middle = total[..., CHUNK // 2 - 1 : CHUNK // 2, :]
    shrunk, grown = mx.exp(total - middle), k * mx.exp(middle - total)
    grown = grown.swapaxes(-1, -2)
    order = mx.arange(CHUNK)
    is_earlier, is_seen = order[:, None] > order[None, :], order[:, None] >= order[None, :]
    among = mx.where(is_earlier, (k * beta * shrunk) @ grown, 0)
    inverse = unit_inverse(among)
    new = inverse @ (v * beta)
    faded = inverse @ (k * beta * mx.exp(total))
    weights = mx.where(is_seen, (q * shrunk) @ grown, 0)
    asked, last = q * mx.exp(total), total[..., -1:, :]
    kept, decay = (k * mx.exp(last - total)).swapaxes(-1, -2), mx.exp(last).swapaxes(-1, -2)
    outs = []
    for i in range(q.shape[0]):
        moved = new[i] - faded[i] @ state
        outs.append(asked[i] @ state + weights[i] @ moved)
        state = state * decay[i] + kept[i] @ moved
    out = mx.stack(outs).swapaxes(1, 2).reshape(-1, *outs[0].shape[::2])
    return out[before : before + rows], state


def _chunked(x: mx.array, before: int, after: int) -> mx.array:
    """[n, heads, D] -> [chunks, heads, CHUNK, D], filled up with rows that change nothing."""
    x = mx.pad(x, [(before, after), (0, 0), (0, 0)])
    return x.reshape(-1, CHUNK, *x.shape[1:]).swapaxes(1, 2)


def unit_inverse(lower: mx.array) -> mx.array:
    """The inverse of 1 + lower, where lower [..., n, n] is strictly lower triangular and n a power of two.

    By halves: a series of powers would lose all digits where keys repeat and hardly decay.
    """
    *lead, n, _ = lower.shape
    blocks = mx.ones((*lead, n, 1, 1), dtype=lower.dtype)  # inverses of the diagonal's blocks
    size = 1
    while size < n:
        cut = lower.reshape(*lead, n // size, size, n // size, size)
        pairs = mx.stack([cut[..., 2 * i + 1, :, 2 * i, :] for i in range(n // size // 2)], axis=-3)
        upper, under = blocks[..., ::2, :, :], blocks[..., 1::2, :, :]
        corner = -(under @ pairs @ upper)
        top = mx.concatenate([upper, mx.zeros_like(upper)], axis=-1)
        blocks = mx.concatenate([top, mx.concatenate([corner, under], axis=-1)], axis=-2)
        size *= 2
    return blocks[..., 0, :, :]

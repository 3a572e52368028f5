"""What a prompt takes beside its hidden state: `python -m benchmarks.target.prompt_memory`. True shapes.

Routing: one layer's router over all rows, evaluated at once (before), and by parts as `MoeMlp` does it. The
hidden state: while a command buffer holds what it has read, as Metal's may, each part is written into one
array (before), or replaced in a list as `DecoderLayer` does it. MLX's peaks; no weights, no attention.
"""

import argparse
from collections.abc import Callable, Generator
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from models.args import ModelArgs
from models.arithmetic import METAL
from models.attention.attention import PART_ROWS, RowPart, Span, make_parts
from models.attention.cache import SequenceCache
from models.experts.experts import Experts
from models.experts.router import Router
from models.glm_moe_dsa import DecoderLayer, MoeMlp
from tests.glm52 import GLM52
from tests.memory import start_measuring

ARGS = ModelArgs.from_config(GLM52)


class NoExperts:
    """Takes the routing, notes the peak until then, and computes nothing."""

    peak = 0

    def sweep(self, take: Any, ids: mx.array, weights: mx.array, choice: mx.array) -> Generator[None]:
        """Ends the measurement."""
        self.peak = mx.get_peak_memory()
        yield


class BareLayer(DecoderLayer):
    """A layer whose attention and MLP are an operation each."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.mlp: Any = normed
        self.post_attention_layernorm: Any = normed

    def _attended(self, x: mx.array, part: RowPart) -> mx.array:
        return x + normed(x)


def normed(rows: mx.array) -> mx.array:
    """One operation, as Metal's norm is; MLX's norm of the CPU is several, in float32."""
    return rows * 0.5


def routed_at_once(pieces: list[mx.array], parts: list[RowPart]) -> int:
    """As it was: described for all rows, then evaluated. Returns the peak."""
    routing = [make_router()(normed(piece)) for piece in pieces]
    mx.eval(*(mx.concatenate(list(column)) for column in zip(*routing, strict=True)))
    return mx.get_peak_memory()


def routed_by_parts(pieces: list[mx.array], parts: list[RowPart]) -> int:
    """As `MoeMlp` routes. Returns the peak."""
    experts = NoExperts()
    mlp = MoeMlp(ARGS, METAL, cast(Experts, experts))
    mlp.gate = make_router()
    next(mlp.sweep(pieces, cast(nn.RMSNorm, normed), parts))
    return experts.peak


def written_into(pieces: list[mx.array], parts: list[RowPart]) -> int:
    """As it was: one array, of which a part's rows are replaced. Returns the peak."""
    x = mx.concatenate(pieces)
    mx.eval(x)
    pieces.clear()
    mx.reset_peak_memory()
    for part in parts:
        held = x.reshape(x.shape)  # the same memory, as a handler of the command buffer has it
        rows = x[part.rows] + normed(x[part.rows])
        mx.eval(held, rows)
        x[part.rows] = rows
        mx.eval(x)
        del held
    return mx.get_peak_memory()


def replaced(pieces: list[mx.array], parts: list[RowPart]) -> int:
    """As `DecoderLayer` does it. Returns the peak."""
    held = list(pieces)  # by a handler of the command buffer, until the next part is done
    for _ in BareLayer().piece_by_piece(pieces, parts):
        held[:] = pieces
    return mx.get_peak_memory()


def make_router() -> Router:
    """Of zeros."""
    router = Router(ARGS, METAL)
    mx.eval(router.parameters())
    return router


def measured(num_rows: int, compute: Callable[[list[mx.array], list[RowPart]], int]) -> float:
    """MB beside the hidden state, at the peak."""
    parts = make_parts([Span(SequenceCache(ARGS, METAL.dtype), 0, num_rows)])
    before = start_measuring()
    pieces = [mx.ones((part.rows.stop - part.rows.start, ARGS.hidden_size), METAL.dtype) for part in parts]
    mx.eval(pieces)
    x_bytes = sum(piece.nbytes for piece in pieces)
    mx.reset_peak_memory()
    return (compute(pieces, parts) - before - x_bytes) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[8192, 32_768])
    for rows in parser.parse_args().rows:
        x_mb = rows * ARGS.hidden_size * METAL.dtype.size / 1e6
        print(f"{rows} rows, hidden state {x_mb:.0f} MB, parts of {PART_ROWS}: MB beside it at the peak")
        for name, before, after in (
            ("routing", routed_at_once, routed_by_parts),
            ("hidden state", written_into, replaced),
        ):
            print(f"  {name}: {measured(rows, before):.0f} before, {measured(rows, after):.0f} after")


if __name__ == "__main__":
    main()

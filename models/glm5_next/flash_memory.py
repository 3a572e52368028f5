"""What a step of a `glm5_next` model takes in memory beside what stays: for the plan."""

from collections.abc import Mapping
from typing import cast

from models.args import ModelArgs
from models.arithmetic import Arithmetic
from models.attention.attention import PART_ROWS
from models.glm5_next import delta_attention
from models.glm5_next.delta_rule import CHUNK
from models.glm5_next.flash_args import FlashArgs
from models.workspace import sweep_row_bytes as plain_row_bytes
from models.workspace import workspace_bytes as plain_workspace_bytes
from streaming.files.headers import TensorEntry
from streaming.files.index import ExpertIndex

# Arrays of all heads that a slice's chunks are described with: convolved, normed, gates, and their products.
SLICE_COPIES = 16
# Of the streams of a part, in float32: themselves, normed, mixed and joined.
STREAM_COPIES = 4
UNPACKED_COPIES = 8


def workspace_bytes(
    args: ModelArgs,
    arithmetic: Arithmetic,
    trunk: Mapping[str, TensorEntry],
    index: ExpertIndex,
    max_context: int,
) -> int:
    """The largest transients of a step: of a sparse layer, or of a linear one, beside a part's streams."""
    flash = cast(FlashArgs, args)
    rows = min(PART_ROWS, max_context)
    streams = STREAM_COPIES * rows * flash.hc_mult * flash.hidden_size * 4
    plain = plain_workspace_bytes(args, arithmetic, trunk, index, max_context)
    return streams + max(plain, _linear_bytes(flash, arithmetic, rows))


def _linear_bytes(args: FlashArgs, arithmetic: Arithmetic, rows: int) -> int:
    """Of a linear layer: a part's inputs, gates and outputs, and slices in flight with their chunks."""
    width, itemsize = args.linear_dim, arithmetic.dtype.size
    part = rows * width * (2 * 3 * itemsize + 3 * 4 + 2 * itemsize)
    sliced = min(rows, delta_attention.SLICE_ROWS) + CHUNK
    chunks = sliced * (SLICE_COPIES * width + 8 * CHUNK * args.linear_num_heads) * 4
    states = 2 * sliced // CHUNK * width * args.linear_head_dim * 4
    # A packed matrix lies unpacked, beside what unpacking it takes.
    unpacked = (
        0 if arithmetic.max_packed_rows is None else UNPACKED_COPIES * args.hidden_size * width * itemsize
    )
    return part + unpacked + arithmetic.pieces_in_flight * (chunks + states)


def sweep_row_bytes(args: ModelArgs, arithmetic: Arithmetic, max_context: int) -> int:
    """What each row of a sweep takes from layer to layer: streams, their mix, and what one stream takes."""
    flash = cast(FlashArgs, args)
    streams = flash.hc_mult * flash.hidden_size * arithmetic.dtype.size
    mix = 4 * flash.hc_mult * (flash.hc_mult + 1)
    return streams + mix + plain_row_bytes(args, arithmetic, max_context)

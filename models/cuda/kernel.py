"""A kernel from its source. Called by the other modules of this room."""

from collections.abc import Callable
from typing import cast
from zlib import crc32

import mlx.core as mx

Kernel = Callable[..., list[mx.array]]
WARP = 32


def make_kernel(
    name: str,
    input_names: list[str],
    output_names: list[str],
    source: str,
    header: str = "",
    shared_memory: int = 0,
) -> Kernel:
    """The kernel, with so many bytes of memory for each block; it is compiled when it is first evaluated.

    MLX finds what it has compiled by name alone, so the name tells sources apart.
    """
    name = f"{name}_{crc32((header + source).encode()):08x}"
    kernel = mx.fast.cuda_kernel(name, input_names, output_names, source, header, shared_memory=shared_memory)
    return cast(Kernel, kernel)

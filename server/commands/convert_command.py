"""The command `glmserve convert SRC DST`: options, a progress bar, one call."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from models.convert.convert import convert
from models.convert.recipe import DEFAULTS, make_recipe
from server.commands.flags import FlagParser


def convert_command(argv: Sequence[str]) -> int:
    """Runs the conversion that the arguments after `convert` ask for; UsageError says what is wrong."""
    options = _parser().parse_args(argv)
    recipe = make_recipe(
        options.bits,
        options.group_size,
        options.mode,
        experts_bits=options.experts_bits,
        embed_bits=options.embed_bits,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("converting", total=None)
        convert(
            options.source,
            options.target,
            recipe,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        prog="glmserve convert",
        description="Makes a streamable, quantised copy of a GLM checkpoint. One that was cut goes on.",
    )
    parser.add_argument("source", type=Path, help="folder of the original: BF16, F16, F32 or FP8")
    parser.add_argument(
        "target", type=Path, help="folder to write; new, empty, or of a conversion that was cut"
    )
    parser.add_argument("--mode", choices=list(DEFAULTS), default="affine")
    parser.add_argument("--bits", type=int, help="bits per weight (the mode's own if not given)")
    parser.add_argument(
        "--group-size", type=int, help="weights that share a scale (the mode's own if not given)"
    )
    parser.add_argument("--experts-bits", type=int, help="bits of the routed experts, if others")
    parser.add_argument("--embed-bits", type=int, help="bits of the embedding and the output head, if others")
    return parser

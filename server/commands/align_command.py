"""The command `glmserve align DIR [DST]`: words, a progress bar, one call."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from models.convert.align import align
from server.commands.checkpoint import find_checkpoint
from server.commands.flags import FlagParser

AFTERWARDS = (
    "an expert of {folder} lies in one place now. Saved prompts of this checkpoint are read anew once; a "
    "--mirror has to be aligned too, by the same command there, which writes the same bytes"
)


def align_command(argv: Sequence[str]) -> int:
    """Aligns the checkpoint that the arguments after `align` name; UsageError says what is wrong."""
    options = _parser().parse_args(argv)
    source = find_checkpoint(options.source)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("aligning", total=None)
        written = align(
            source, options.target, lambda done, total: progress.update(task, completed=done, total=total)
        )
    folder = options.target or source
    print(AFTERWARDS.format(folder=folder) if written else f"{folder} is aligned already")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        prog="glmserve align",
        description="Rewrites a checkpoint so that an expert lies in one place instead of nine, and is read "
        "straight into its slot. In place it needs room for a few files; a run that was cut goes on.",
    )
    parser.add_argument("source", metavar="DIR", help="folder of the checkpoint, or org/name in the cache")
    parser.add_argument(
        "target", metavar="DST", type=Path, nargs="?", help="another folder for the copy (default: in place)"
    )
    return parser

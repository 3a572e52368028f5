"""The command `glmserve prefixes export|import FILE`: carries saved prompts from one machine to another."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from config.errors import UsageError
from config.settings import Settings
from config.sizes import format_size
from models.arithmetic import choose_arithmetic
from models.attention.cache import cache_bytes_per_token
from models.loading.fingerprint import cache_fingerprint
from models.loading.loading import open_checkpoint
from server.commands.checkpoint import choose_checkpoint
from server.commands.flags import parse
from server.commands.serve import prefix_directory
from streaming.prefix.archive import Fingerprints, export_blocks, import_blocks
from streaming.prefix.block_files import BlockFiles


def prefixes_command(words: Sequence[str]) -> int:
    """Reads the words after `prefixes`. Raises UsageError where they do not say which way and which file."""

    def add(parser: ArgumentParser) -> None:
        parser.add_argument("action", nargs="?", metavar="export|import", default="")
        parser.add_argument("file", nargs="?", metavar="FILE", type=Path)
        parser.add_argument("--cache-group", metavar="NAME", default="", help="of keys that share prompts")
        parser.add_argument("--pinned", action="store_true", default=False, help="export pinned prompts only")

    given, settings = parse(words, "prefixes", "Carries saved prompts from one machine to another.", add)
    if given.action not in ("export", "import") or given.file is None:
        raise UsageError("say `glmserve prefixes export FILE [--pinned]` or `glmserve prefixes import FILE`")
    return move_prefixes(settings, given.action, given.file, given.pinned, given.cache_group)


def move_prefixes(settings: Settings, action: str, path: Path, only_pinned: bool, group: str = "") -> int:
    """Export to, or import from, this file, for a cache group; "" is that of servers without keys.

    A server may run meanwhile; what is imported is used at once.
    """
    directory = prefix_directory(settings)
    if directory is None:
        raise UsageError("with --prefix-cache-size 0 no prompts are kept on disk")
    checkpoint, arithmetic = open_checkpoint(choose_checkpoint(settings.model).directory), choose_arithmetic()
    exact, portable = (
        cache_fingerprint(checkpoint.directory, checkpoint.args, arithmetic, knows_times=knows_times)
        for knows_times in (True, False)
    )
    try:
        files = BlockFiles(directory, exact, settings.prefix_cache_size)
    except OSError as error:
        raise UsageError(f"--prefix-cache-dir {directory} cannot be used: {error.strerror}") from error
    prints = Fingerprints(exact, portable)
    if action == "export":
        moved = export_blocks(files, prints, path, only_pinned, group)
        remark = ""
    else:
        token_bytes = cache_bytes_per_token(checkpoint.args, arithmetic.dtype.size)
        moved = import_blocks(files, prints, path, group, token_bytes)
        remark = f"; {moved.num_known} were there already" if moved.num_known else ""
    size = format_size(moved.nbytes)
    print(f"{action}ed {moved.num_blocks} blocks, {moved.num_tokens} tokens, {size}{remark}")
    return 0

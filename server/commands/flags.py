"""From words to settings: one parser for all commands that take the flags of `serve`.

A word that is none of them is answered with the nearest one that is.
"""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_origin

from config.errors import UsageError
from config.settings import ENV_PREFIX, Settings, flag_of, load_settings
from server.version import VERSION

EPILOG = f"""\
sizes: K, M, G, T are powers of ten (100G = 100 * 10^9 bytes); KiB, MiB, GiB, TiB are powers of two
(96GiB = 96 * 2^30); 80% is that share of physical memory.

Each flag is also an environment variable (--ram-budget: {ENV_PREFIX}RAM_BUDGET) and a key of the TOML file
that --config names (ram_budget = "100G"). Flags win, then the environment, then the file.
"""

AddFlags = Callable[[argparse.ArgumentParser], None]


class FlagParser(argparse.ArgumentParser):
    """Raises UsageError, with a suggestion where there is one, in place of ending the process."""

    def _print_message(self, message: str, file: Any = None) -> None:
        """Prints, and raises BrokenPipeError where the reader has gone, which argparse passes over."""
        (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        """Raises UsageError; argparse calls this."""
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown == message:
            raise UsageError(f"{message}; see {self.prog} --help")
        flag = unknown.split()[0].split("=")[0]
        if not flag.startswith("-"):
            hint = f"; did you mean --model {flag}?" if "--model" in self._option_string_actions else ""
            raise UsageError(f"{flag!r} is one word too many{hint}")
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        hint = f"did you mean {near[0]}?" if near else f"{self.prog} --help lists all"
        raise UsageError(f"unknown flag {flag}; {hint}")


def parse(
    words: Sequence[str], command: str, summary: str = "", add: AddFlags | None = None
) -> tuple[argparse.Namespace, Settings]:
    """What a command's own flags say, which `add` declares, and the settings beside them."""
    parser = make_parser(command, summary)
    if add:
        add(parser)
    given = vars(parser.parse_args(words))
    flags = {name: given.pop(name) for name in list(given) if name in Settings.model_fields}
    return argparse.Namespace(**given), load_settings(flags, given.pop("config", None))


def make_parser(command: str, summary: str = "", commands: str = "") -> FlagParser:
    """A parser with a flag for each setting. Absent flags leave no trace in the namespace."""
    listed = f"commands:\n{commands}\n\n" if commands else ""
    parser = FlagParser(
        prog="glmserve" if command == "serve" else f"glmserve {command}",
        description=summary or "Serves GLM-5.2 from one machine with less memory than the model.",
        epilog=listed + EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"glmserve {VERSION}")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
    groups: dict[str, Any] = {}
    for name, field in Settings.model_fields.items():
        extra = field.json_schema_extra
        assert isinstance(extra, dict), f"setting {name} has no group"
        title = str(extra["group"])
        group = groups.setdefault(title, parser.add_argument_group(title) if title not in groups else None)
        _add_flag(group, name, field, extra["metavar"])
    return parser


def _add_flag(group: Any, name: str, field: Any, metavar: Any) -> None:
    text = _help(field)
    if field.annotation is bool:
        group.add_argument(flag_of(name), action=argparse.BooleanOptionalAction, help=text)
    else:
        action = "append" if get_origin(field.annotation) is tuple else "store"
        group.add_argument(flag_of(name), metavar=metavar, action=action, help=text)


def _help(field: Any) -> str:
    has_default = field.default not in (None, False, (), "") and "(default " not in field.description
    default = f" (default {field.default})".replace("%", "%%") if has_default else ""
    return f"{field.description}{default}"

"""The command line: `glmserve [serve] [flags]`.

Turns words into `Settings` and hands them on; the parser's namespace goes no further. Whatever a user can
get wrong ends here as one line on standard error and exit code 2.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_origin

from server.launcher import hold_hangups, take_hangups

if __name__ == "__main__":  # before the imports that take half a second
    hold_hangups()

from config.errors import GaveUp, UsageError
from config.settings import ENV_PREFIX, Settings, flag_of, load_settings
from server.version import VERSION

EPILOG = f"""\
sizes: K, M, G, T are powers of ten (100G = 100 * 10^9 bytes); KiB, MiB, GiB, TiB are powers of two
(96GiB = 96 * 2^30); 80% is that share of physical memory.

Each flag is also an environment variable (--ram-budget: {ENV_PREFIX}RAM_BUDGET) and a key of the TOML file
that --config names (ram_budget = "100G"). Flags win, then the environment, then the file.
"""


@dataclass(frozen=True)
class Command:
    """A subcommand: takes the words after its name, returns the exit code."""

    summary: str
    run: Callable[[Sequence[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that the words name; `serve` may be left out."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = words.pop(0) if words and not words[0].startswith("-") else "serve"
    if name == "serve":
        hold_hangups()
    else:
        take_hangups()
    try:
        if name not in COMMANDS:
            raise UsageError(f"unknown command {name!r}; there are: {', '.join(COMMANDS)}")
        return COMMANDS[name].run(words)
    except UsageError as error:
        print(f"glmserve: {error}", file=sys.stderr)
        return 2
    except GaveUp as error:
        print(f"glmserve: {error}", file=sys.stderr)
        return os.EX_TEMPFAIL
    except KeyboardInterrupt:  # of a conversion, which goes on when it is asked for again
        print("glmserve: interrupted", file=sys.stderr)
        return 130


def parse_settings(words: Sequence[str], command: str = "serve") -> Settings:
    """Settings of a subcommand that takes all flags."""
    flags = vars(make_parser(command).parse_args(words))
    config_file = flags.pop("config", None)
    return load_settings(flags, config_file)


# Each command imports what it runs once its words are read: `--help` needs no HTTP server, `serve` no MLX.


def _serve(words: Sequence[str]) -> int:
    settings = parse_settings(words)
    from server.commands.serve import serve

    return serve(settings)


def _plan(words: Sequence[str]) -> int:
    settings = parse_settings([word for word in words if word != "--json"], "plan")
    from server.commands.plan_command import print_plan

    return print_plan(settings, "--json" in words)


def _convert(words: Sequence[str]) -> int:
    from server.commands.convert_command import convert_command

    return convert_command(words)


def _align(words: Sequence[str]) -> int:
    from server.commands.align_command import align_command

    return align_command(words)


def _prefixes(words: Sequence[str]) -> int:
    if not {"-h", "--help"}.isdisjoint(words):
        parse_settings(["--help"], "prefixes")
    if len(words) < 2 or words[0] not in ("export", "import") or words[1].startswith("-"):
        raise UsageError("say `glmserve prefixes export FILE [--pinned]` or `glmserve prefixes import FILE`")
    group, words = _taken(words, "--cache-group")
    settings = parse_settings([word for word in words[2:] if word != "--pinned"], "prefixes")
    from server.commands.prefixes_command import move_prefixes

    return move_prefixes(settings, words[0], Path(words[1]), "--pinned" in words, group)


def _taken(words: Sequence[str], flag: str) -> tuple[str, list[str]]:
    """The value of a flag that is no setting, "" without it, and the other words."""
    if flag not in words:
        return "", list(words)
    place = words.index(flag)
    if place + 1 == len(words):
        raise UsageError(f"{flag} wants a value")
    return words[place + 1], [*words[:place], *words[place + 2 :]]


def _doctor(words: Sequence[str]) -> int:
    settings = parse_settings([word for word in words if word != "--parity"], "doctor")
    from server.commands.doctor.doctor_command import doctor

    return doctor(settings, parity="--parity" in words)


COMMANDS = {
    "serve": Command("answer requests (the default)", _serve),
    "plan": Command("print how --ram-budget would be divided (--json for programs), load nothing", _plan),
    "convert": Command("make a streamable, quantised copy: glmserve convert SRC DST", _convert),
    "align": Command("make an expert one read instead of nine: glmserve align DIR [DST]", _align),
    "doctor": Command("check this machine and these flags (--parity: what MLX computes here)", _doctor),
    "prefixes": Command(
        "carry saved prompts: glmserve prefixes export FILE [--pinned] [--cache-group NAME], or import FILE",
        _prefixes,
    ),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown == message:
            raise UsageError(f"{message}; see glmserve --help")
        flag = unknown.split()[0].split("=")[0]
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        hint = f"did you mean {near[0]}?" if near else "glmserve --help lists all"
        raise UsageError(f"unknown flag {flag}; {hint}")


def make_parser(command: str) -> argparse.ArgumentParser:
    """A parser with a flag for each setting. Absent flags leave no trace in the namespace."""
    listed = "\n".join(f"  {name:10}{entry.summary}" for name, entry in COMMANDS.items())
    parser = _Parser(
        prog="glmserve" if command == "serve" else f"glmserve {command}",
        description="Serves GLM-5.2 from one machine with less memory than the model.",
        epilog=f"commands:\n{listed}\n\n{EPILOG}",
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
    has_default = field.default is not None and field.default is not False and field.default != ()
    default = f" (default {field.default})".replace("%", "%%") if has_default else ""
    return f"{field.description}{default}"


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `glmserve [serve] [flags]`, and the other commands.

Finds the command; each parses its own words and imports what it runs only then: `--version` needs nothing,
`--help` no HTTP server, `serve` no MLX. Whatever a user can get wrong ends here as one line on standard error
and exit code 2.
"""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from server.launcher import flushed, hold_hangups, take_hangups

if __name__ == "__main__":  # before the imports that take half a second
    hold_hangups()

from config.errors import GaveUp, UsageError
from server.version import VERSION

if TYPE_CHECKING:
    import argparse

    from config.settings import Settings


@dataclass(frozen=True)
class Command:
    """A subcommand: takes the words after its name, returns the exit code."""

    summary: str
    run: Callable[[Sequence[str]], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that the words name; `serve` may be left out."""
    return flushed(partial(_run, list(sys.argv[1:] if argv is None else argv)))


def _run(words: list[str]) -> int:
    name = words.pop(0) if words and not words[0].startswith("-") else "serve"
    if name == "serve":
        hold_hangups()
    else:
        take_hangups()
    try:
        if "--version" in words[:1]:
            print(f"glmserve {VERSION}")
            raise SystemExit(0)
        _check_system()
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(COMMANDS)}"
            if name == "version" or "/" in name:
                hint = "did you mean --version?" if name == "version" else f"did you mean --model {name}?"
            raise UsageError(f"unknown command {name!r}; {hint}")
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


def _check_system() -> None:
    if sys.platform == "win32":
        raise UsageError("Windows is not supported: run it on macOS or Linux, or in WSL")


def parse_settings(words: Sequence[str], command: str = "serve") -> "Settings":
    """Settings of a subcommand that takes all flags and no others."""
    from server.commands.flags import parse

    return parse(words, command)[1]


def _serve(words: Sequence[str]) -> int:
    if not {"-h", "--help"}.isdisjoint(words):
        return _help([])
    settings = parse_settings(words)
    from server.commands.serve import serve

    return serve(settings)


def _help(words: Sequence[str]) -> int:
    if words:
        return main([words[0], "--help"])
    from server.commands.flags import make_parser

    listed = "\n".join(f"  {name:10}{entry.summary}" for name, entry in COMMANDS.items())
    make_parser("serve", commands=listed).parse_args(["--help"])
    return 0


def _plan(words: Sequence[str]) -> int:
    from server.commands.plan_command import plan_command

    return plan_command(words)


def _pull(words: Sequence[str]) -> int:
    from server.commands.pull_command import pull_command

    return pull_command(words)


def _convert(words: Sequence[str]) -> int:
    from server.commands.convert_command import convert_command

    return convert_command(words)


def _align(words: Sequence[str]) -> int:
    from server.commands.align_command import align_command

    return align_command(words)


def _prefixes(words: Sequence[str]) -> int:
    from server.commands.prefixes_command import prefixes_command

    return prefixes_command(words)


def _doctor(words: Sequence[str]) -> int:
    from server.commands.doctor.doctor_command import doctor
    from server.commands.flags import parse

    def add(parser: "argparse.ArgumentParser") -> None:
        parser.add_argument("--parity", action="store_true", default=False, help="what MLX computes here")
        parser.add_argument("--json", action="store_true", default=False, help="findings for programs")

    given, settings = parse(words, "doctor", "Checks this machine and these flags.", add)
    return doctor(settings, parity=given.parity, is_json=given.json)


def _bench(words: Sequence[str]) -> int:
    from server.commands.bench_command import bench_command

    return bench_command(words)


def _env(words: Sequence[str]) -> int:
    from server.commands.env_command import env_command

    return env_command(words)


COMMANDS = {
    "serve": Command("answer requests (the default)", _serve),
    "pull": Command("download a checkpoint: glmserve pull REPO, or --list those that run", _pull),
    "plan": Command("how --ram-budget would be divided, and what to expect: glmserve plan [MODEL]", _plan),
    "doctor": Command("check this machine and these flags (--parity: what MLX computes here)", _doctor),
    "bench": Command("measure a running server as a fleet sees it", _bench),
    "env": Command("print the variables that point clients at this server", _env),
    "convert": Command("make a streamable, quantised copy: glmserve convert SRC DST", _convert),
    "align": Command("lay an expert in one place instead of nine: glmserve align DIR [DST]", _align),
    "prefixes": Command(
        "carry saved prompts: glmserve prefixes export FILE [--pinned] [--cache-group NAME], or import FILE",
        _prefixes,
    ),
    "help": Command("this text, or that of a command: glmserve help COMMAND", _help),
}


if __name__ == "__main__":
    sys.exit(main())

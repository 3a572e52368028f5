"""Logging: the same lines in the HTTP process and in the engine process, as text, in colours or as JSON."""

import json
import logging
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler, WatchedFileHandler
from pathlib import Path
from typing import Any, Literal

from config.request_id import REQUEST_ID

LEVELS = ("debug", "info", "warning", "error")
LogFormat = Literal["text", "json"]
MAX_FILE_BYTES = 20_000_000
NUM_OLD_FILES = 5
TEXT = "%(asctime)s %(levelname)s %(message)s%(request)s"


def set_up_logging(
    level: str, log_format: LogFormat = "text", log_file: Path | None = None, *, rotates: bool = False
) -> None:
    """Write lines of this level and above to standard error, and to a file if there is one.

    Two processes share the file: the one that `rotates` renames it, the other one opens the new one.
    Raises OSError where the file cannot be written.
    """
    handlers: list[logging.Handler] = [_for_the_terminal(log_format)]
    if log_file is not None:
        handlers.append(_to_file(log_file, log_format, rotates))
    for handler in handlers:
        handler.addFilter(_note_request)
    logging.basicConfig(level=level.upper(), handlers=handlers, force=True)


def _for_the_terminal(log_format: LogFormat) -> logging.Handler:
    if log_format == "text" and sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        from rich.console import Console
        from rich.logging import RichHandler

        rich = RichHandler(
            console=Console(stderr=True, soft_wrap=True),
            show_path=False,
            log_time_format=_DATE,
            rich_tracebacks=False,
        )
        rich.setFormatter(logging.Formatter("%(message)s%(request)s"))
        return rich
    handler = logging.StreamHandler()
    handler.setFormatter(_formatter(log_format))
    return handler


def _to_file(path: Path, log_format: LogFormat, rotates: bool) -> logging.Handler:
    handler: logging.Handler
    if rotates:
        handler = RotatingFileHandler(path, "a", MAX_FILE_BYTES, NUM_OLD_FILES, encoding="utf-8")
    else:
        handler = WatchedFileHandler(path, "a", encoding="utf-8")
    handler.setFormatter(_formatter(log_format))
    return handler


_DATE = "%Y-%m-%d %H:%M:%S"


def _formatter(log_format: LogFormat) -> logging.Formatter:
    return JsonLines() if log_format == "json" else logging.Formatter(TEXT, _DATE)


def _note_request(record: logging.LogRecord) -> bool:
    """Adds the id of the request under way, unless the line names it already."""
    request_id = REQUEST_ID.get()
    record.request_id = request_id
    is_named = not request_id or request_id in record.getMessage()
    record.request = "" if is_named else f" [{request_id}]"
    return True


class JsonLines(logging.Formatter):
    """A line of JSON for each record: time, level, message and, of a request, its fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", ""):
            told["id"] = request_id
        fields = getattr(record, "fields", None)
        if isinstance(fields, Mapping):
            told |= fields
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)

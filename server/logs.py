"""Logging, the same plain lines in the HTTP process and in the engine process."""

import logging

LEVELS = ("debug", "info", "warning", "error")


def set_up_logging(level: str) -> None:
    """Write lines of this level and above to standard error."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", force=True
    )

"""The version that answers carry and `--version` prints."""

from importlib.metadata import PackageNotFoundError, version


def read_version() -> str:
    """Of the installed package; a source tree that was never installed has none."""
    try:
        return version("glmserve")
    except PackageNotFoundError:
        return "0+source"


VERSION = read_version()

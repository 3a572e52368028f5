"""Where a fault ends: with the request that it belongs to, so that the others go on.

Used on the engine's thread. Only a fault that nothing here contains ends the engine process.
"""

from collections.abc import Callable
from types import TracebackType

from config.errors import ClusterError


class Contained:
    """A context manager that hands any exception of its body to `deliver` and goes on after the body.

    `failed` says afterwards whether there was one. What is no `Exception` (an interrupt) passes through, and
    so does a ClusterError: no step can be computed after it.
    """

    def __init__(self, deliver: Callable[[Exception], None]) -> None:
        self._deliver = deliver
        self.failed = False

    def __enter__(self) -> "Contained":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception) or isinstance(error, ClusterError):
            return False
        self.failed = True
        self._deliver(error)
        return True

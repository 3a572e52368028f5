"""Who waits for the engine: what a request can tell its client before it has begun.

One `WaitingRequests` for each service; requests enter when they are sent to the engine and leave when it
begins.
"""


class WaitingRequests:
    """The requests that wait, each with its place where the engine has said one."""

    def __init__(self) -> None:
        self._waiting: dict[str, int | None] = {}

    def enter(self, request_id: str) -> None:
        """Wait at the end."""
        self._waiting[request_id] = None

    def place(self, request_id: str, num_before: int) -> None:
        """Wait there: the engine's order is not that of arrival."""
        self._waiting[request_id] = num_before

    def leave(self, request_id: str) -> None:
        """Wait no more, if it did."""
        self._waiting.pop(request_id, None)

    def num_before(self, request_id: str) -> int | None:
        """How many others are served first; None for a request that does not wait.

        An engine in the middle of a step has not seen the latest yet: those stand behind all earlier ones.
        """
        if request_id not in self._waiting:
            return None
        place = self._waiting[request_id]
        return list(self._waiting).index(request_id) if place is None else place

"""Who waits, in the order of arrival: what a request can tell its client before the engine has begun with it.

One `Line` for each service; requests enter when they are sent to the engine and leave with its first word.
"""


class Line:
    """The requests of which the engine has said nothing yet."""

    def __init__(self) -> None:
        self._waiting: dict[str, None] = {}

    def enter(self, request_id: str) -> None:
        """Wait at the end."""
        self._waiting[request_id] = None

    def leave(self, request_id: str) -> None:
        """Wait no more, if it did."""
        self._waiting.pop(request_id, None)

    def num_before(self, request_id: str) -> int | None:
        """How many came earlier and still wait; None for a request that does not wait."""
        if request_id not in self._waiting:
            return None
        return list(self._waiting).index(request_id)

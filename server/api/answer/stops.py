"""Finds stop strings in text that arrives in pieces. One `StopScanner` for each stream of text."""


class StopScanner:
    """Passes text on, but holds back an ending that may become a stop string.

    The stop string that is complete first wins (the longest of those that end together), so the result
    does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: list[str]) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._held = ""
        self.found: str | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has come; `found` is it."""
        return self.found is not None

    def push(self, text: str) -> str:
        """Text that is safe to send; after a stop string, nothing more."""
        if self.is_stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            end, start = min(found)
            self.found = text[start:end]
            self._held = ""
            return text[:start]
        keep = self._ending_to_hold(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _ending_to_hold(self, text: str) -> int:
        longest = min(len(self._stops[0]) - 1, len(text))
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0

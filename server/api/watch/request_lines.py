"""The line that each request leaves in the log. Floods of like refusals are summed, second by second."""

import logging
import time
from collections.abc import Callable
from urllib.parse import quote

from config.sizes import format_size
from server.api.watch.record import RequestRecord

WINDOW_S = 1.0
MAX_PATH = 200

log = logging.getLogger(__name__)

Kind = tuple[int, str, str]


class RequestLines:
    """A sink of `Watch`. Tells the first refusal of a kind at once, others of its second by number."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        later: Callable[[Callable[[], None]], object] = lambda flush: None,
    ) -> None:
        """`later` calls a function when `WINDOW_S` has passed."""
        self._clock, self._later = clock, later
        self._floods: dict[Kind, tuple[float, int]] = {}  # when its second began, and how many came after it

    def __call__(self, record: RequestRecord) -> None:
        """Tell of a request that is over."""
        self.flush()
        if not record.is_generation and record.status >= 400:
            kind = record.status, record.route, record.reason
            if kind in self._floods:
                began_s, count = self._floods[kind]
                self._floods[kind] = began_s, count + 1
                return
            self._floods[kind] = self._clock(), 0
            self._later(self.flush)
        log.log(level_of(record), "%s", line_of(record), extra={"fields": record.facts()})

    def flush(self) -> None:
        """Tell how many refusals came in seconds that are over."""
        now_s = self._clock()
        over = [kind for kind, (began_s, _) in self._floods.items() if now_s - began_s >= WINDOW_S]
        for kind in over:
            _, count = self._floods.pop(kind)
            if count:
                status, route, reason = kind
                text = "%d more requests for %s were answered %d (%s) within a second"
                fields = {"route": route, "status": status, "ended": reason, "count": count}
                log.info(text, count, route, status, reason, extra={"fields": fields})


def level_of(record: RequestRecord) -> int:
    """What went well and cost nothing is for those who look closely."""
    if record.status >= 500 or record.failure:
        return logging.WARNING
    return logging.INFO if record.is_generation or record.status >= 400 else logging.DEBUG


def line_of(record: RequestRecord) -> str:
    """A request in one line for people."""
    path = quote(record.path[:MAX_PATH], safe="/:%")
    words = [record.id, f"agent={record.agent or '-'}", f"key={record.key_name}"]
    words += [record.method, path, str(record.status)]
    if record.is_generation:
        used, remark = record.tokens, record.answers[0].remark
        words += [f"cached={used.num_cached_tokens}/{used.num_prompt_tokens}"]
        words += [*([remark] if remark else []), f"new={used.num_completion_tokens}"]
        words += [f"{name}={value:.2f}s" for name, value in _times(record) if value is not None]
        words += [f"{name}={value:.1f}tok/s" for name, value in _rates(record) if value is not None]
        if record.hit_rate is not None:
            words += [f"hits={record.hit_rate:.1%}"]
        if record.read_bytes is not None:
            words += [f"read={format_size(record.read_bytes).replace(' ', '')}"]
    else:
        words += [f"total={record.total_s:.2f}s"]
    return " ".join([*words, *([f"ended={record.ending}"] if record.ending else [])])


def _times(record: RequestRecord) -> list[tuple[str, float | None]]:
    return [("queue", record.queue_s), ("first", record.first_s), ("total", record.total_s)]


def _rates(record: RequestRecord) -> list[tuple[str, float | None]]:
    return [("prefill", record.prefill_rate), ("decode", record.decode_rate)]

"""Which conversation a request continues: what tells agents apart that send no name of their own.

One `Conversations` for each service. Called from the threads that render prompts.
"""

import hashlib
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

MAX_KNOWN = 8192
# Characters of a plain prompt that are compared at once.
PIECE = 64
# So many conversations with one name within so many seconds are more than one person has at a time.
MANY = 4
RECENT_S = 60.0
MAX_NAMES = 1024
# Characters; between two of these pieces other threads may have the interpreter.
HASHED_AT_ONCE = 2**18

log = logging.getLogger(__name__)


class Conversations:
    """The beginnings that are known, and which conversation went on from each of them last."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._known: OrderedDict[str, str] = OrderedDict()  # digest of a whole prompt -> its conversation
        self._ends: dict[str, str] = {}  # conversation -> digest of its last prompt
        self._recent: OrderedDict[str, dict[str, float]] = OrderedDict()  # by name, when each was last here
        self._told: set[str] = set()

    def find(self, group: str, name: str, pieces: Iterable[str]) -> str:
        """Returns the id of the conversation whose last prompt the pieces repeat or continue, else a new one.

        A prompt that departs from a conversation which has gone on is a conversation of its own. Those of
        different groups are never the same. `name` is what the sender calls itself, for the log.
        """
        digests = list(accumulate(pieces, _digest, initial=group))[1:] or [_digest(group, "")]
        with self._lock:
            found = self._continued(digests)
            self._known[digests[-1]] = found
            self._known.move_to_end(digests[-1])
            self._ends[found] = digests[-1]
            if len(self._known) > MAX_KNOWN:
                digest, forgotten = self._known.popitem(last=False)
                if self._ends.get(forgotten) == digest:
                    del self._ends[forgotten]
            if name:
                self._note(group, name, found)
        return found

    def _continued(self, digests: Sequence[str]) -> str:
        if whole := self._known.get(digests[-1]):
            return whole
        for digest in reversed(digests):
            conversation = self._known.get(digest)
            if conversation is not None:
                return conversation if self._ends.get(conversation) == digest else digests[-1]
        return digests[-1]

    def _note(self, group: str, name: str, conversation: str) -> None:
        """Says once that many conversations at a time have this name."""
        now_s = self._clock()
        recent = self._recent.setdefault(group, {})
        self._recent.move_to_end(group)
        recent[conversation] = now_s
        for old in [one for one, seen_s in recent.items() if now_s - seen_s > RECENT_S]:
            del recent[old]
        if len(recent) >= MANY and group not in self._told and len(self._told) < MAX_NAMES:
            self._told.add(group)
            log.info(
                "%d conversations share the name %s; a session_id (or a header x-session-id) for each agent "
                "tells them apart in the log, and gives each its own share of the engine's time",
                len(recent),
                name,
            )
        if len(self._recent) > MAX_NAMES:
            self._recent.popitem(last=False)


def pieces_of_chat(messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What identifies each message: reasoning is left out, since clients drop it from their history."""
    for message in messages:
        kept = {key: value for key, value in message.items() if key in ("role", "content", "tool_calls")}
        text = kept.pop("content") if isinstance(kept.get("content"), str) else ""
        yield f"{json.dumps(kept, sort_keys=True, default=str)}\0{text}"


def pieces_of_text(prompt: str | Sequence[int]) -> Iterator[str]:
    """Parts of a plain prompt; what is left behind the last whole one may go on in the next prompt."""
    whole = len(prompt) // PIECE * PIECE or len(prompt)
    for start in range(0, whole, PIECE):
        yield str(prompt[start : start + PIECE])


def _digest(before: str, piece: str) -> str:
    found = hashlib.blake2b(f"{before}\0".encode(), digest_size=16)
    for start in range(0, len(piece), HASHED_AT_ONCE):
        found.update(piece[start : start + HASHED_AT_ONCE].encode("utf-8", "surrogatepass"))
    return found.hexdigest()

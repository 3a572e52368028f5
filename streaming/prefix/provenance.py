"""What saved blocks were computed with, and which of them may be used.

A mirror that is not yet compared in full may be damaged, and what is computed with it wrong. Until then
blocks carry a mark that no other process accepts; so nothing that was computed with a bad mirror outlives the
process that read from it, however that ends.
"""

import hashlib
import os
from collections.abc import Callable


class Provenance:
    """The marks of one process. `exact`: the fingerprint of a checkpoint whose bytes are beyond doubt.

    `is_proven` is asked for each block that is written, on any thread.
    """

    def __init__(self, exact: bytes, is_proven: Callable[[], bool] = lambda: True) -> None:
        self.exact = exact
        self._is_proven = is_proven
        self._provisional = hashlib.sha256(b"provisional" + exact + os.urandom(32)).digest()

    @property
    def mark(self) -> bytes:
        """The fingerprint that stands in the header of a block that is written now."""
        return self.exact if self._is_proven() else self._provisional

    def accepted(self, found: bytes | None) -> bytes:
        """Returns the fingerprint that a block must carry to be used: its own, if that is one of ours."""
        return self._provisional if found == self._provisional else self.exact

"""Counts what a computation waits for: `mx.eval` of the newest work, and of work that newer work follows.

After the first the device has nothing to do until the host has described more; after the second it has.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import mlx.core as mx


@dataclass
class Waits:
    """`newest`: waits for what was launched last, or not launched. `older`: for pieces two or more back."""

    newest: int = 0
    older: int = 0
    _launched: dict[int, tuple[int, mx.array]] = field(default_factory=dict)  # by id, kept so that ids stay
    _num_launches: int = 0

    def launch(self, arrays: Iterable[mx.array]) -> None:
        """Notes `mx.async_eval` of these."""
        self._num_launches += 1
        self._launched |= {id(array): (self._num_launches, array) for array in arrays}

    def wait(self, arrays: Iterable[mx.array]) -> None:
        """Notes `mx.eval` of these."""
        launches = [self._launched.pop(id(array), (self._num_launches, array))[0] for array in arrays]
        if max(launches, default=0) <= self._num_launches - 2:
            self.older += 1
        else:
            self.newest += 1


def _flat(values: Iterable[object]) -> Generator[mx.array]:
    for value in values:
        if isinstance(value, mx.array):
            yield value
        elif isinstance(value, dict):
            yield from _flat(value.values())
        elif isinstance(value, list | tuple):
            yield from _flat(value)


@contextmanager
def counted_waits(*, computes: bool = True) -> Generator[Waits]:
    """Counts while the context lasts; with `computes` False nothing is evaluated, which takes no memory."""
    waits = Waits()
    really_eval, really_launch = mx.eval, mx.async_eval

    def evaluate(*values: object) -> None:
        waits.wait(list(_flat(values)))
        if computes:
            really_eval(*values)

    def launch(*values: object) -> None:
        waits.launch(list(_flat(values)))
        if computes:
            really_launch(*values)

    with patch.object(mx, "eval", evaluate), patch.object(mx, "async_eval", launch):
        yield waits

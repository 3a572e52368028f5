"""Numbers that Python's parsers take and JSON does not have. Called for bodies and for what models write."""

import math
from typing import Any

# Of these none is a number that JSON does not have, and none holds one.
PIECE = 2**14
PLAIN = frozenset([int, str, bool, type(None)])


def all_finite(value: Any) -> bool:
    """Whether a parsed JSON value holds no infinity (1e999 is one) and no NaN."""
    values = [value]
    while values:
        match values.pop():
            case dict() as members:
                values.extend(members.values())
            case list() as items:
                # Most lists of ids are plain. Between two pieces other threads may have the interpreter.
                for start in range(0, len(items), PIECE):
                    piece = items[start : start + PIECE]
                    if not PLAIN.issuperset(map(type, piece)):
                        values.extend(piece)
            case float(number) if not math.isfinite(number):
                return False
    return True

"""What text takes in memory: `python -m benchmarks.target.texts`. Python's own count of bytes, no model.

Before: a prompt in line was a list of integers, each piece of an answer was kept as it came, and the last 256
answers were remembered whatever their length, in no line of the plan.
"""

import tracemalloc
from collections.abc import Callable
from functools import partial

from config.defaults import QUEUE_LENGTH
from config.plan import HEARD_TOKEN_BYTES, QUEUED_TOKEN_BYTES, REMEMBERED_BYTES, text_bytes
from server.api.answer.answer import Delta, Heard
from server.api.prompt.remembered import MAX_RECENT, Remembered, Said
from server.link.messages import Generate, TokenScore

CONTEXT, HEARD = 200_000, 20_000
REMEMBERED_TOKENS = 32_768
TOPS = (0, 5, 20)


def held(make: Callable[[], object]) -> float:
    """MB that stay while what is made lives."""
    tracemalloc.start()
    kept = make()
    nbytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del kept
    return nbytes / 1e6


def ids(start: int, length: int) -> list[int]:
    """Token ids, each an object of its own, as JSON or a tokenizer give them."""
    return [1000 + (start + i) % 150_000 for i in range(length)]


def pieces(num_top: int) -> list[Delta]:
    """An answer, a token at a time."""
    return [Delta(content=f"word {i % 1000} ", scores=(score(1000 + i, num_top),)) for i in range(HEARD)]


def score(token: int, num_top: int) -> TokenScore:
    """A token with so many alternatives."""
    return TokenScore(token, -1.0, tuple((token + j, -1.0 - j) for j in range(num_top)))


def heard(num_top: int) -> Heard:
    """The same as the product keeps it."""
    kept = Heard()
    for delta in pieces(num_top):
        kept.add(delta)
    return kept


def said(number: int) -> Said:
    """An answer that is remembered."""
    return Said(ids(number, REMEMBERED_TOKENS), "", f"{number} " + "word " * REMEMBERED_TOKENS, (), False)


def remembered() -> Remembered:
    """As the product keeps as many."""
    kept = Remembered()
    for number in range(MAX_RECENT):
        kept.add("me", f"question {number}", said(number))
    return kept


def remembered_before() -> list[object]:
    """The same answers with their ids as a tuple of integers."""
    texts = [f"{number} " + "word " * REMEMBERED_TOKENS for number in range(MAX_RECENT)]
    return [(tuple(ids(number, REMEMBERED_TOKENS)), text) for number, text in enumerate(texts)]


def main() -> None:
    before, after = held(lambda: ids(0, CONTEXT)), held(lambda: Generate("r", ids(0, CONTEXT), 1))
    print(f"a prompt of {CONTEXT} in line: {before:.2f} MB before, {after:.2f} after")
    print(
        f"  {QUEUE_LENGTH} of them: {QUEUE_LENGTH * before:.0f} MB before, {QUEUE_LENGTH * after:.0f} after"
    )
    for num_top in TOPS:
        before, after = held(partial(pieces, num_top)), held(partial(heard, num_top))
        print(
            f"a token that was heard, {num_top} alternatives: {1e6 * before / HEARD:.0f} bytes before, "
            f"{1e6 * after / HEARD:.0f} after (its line: {HEARD_TOKEN_BYTES})"
        )
    print(
        f"{MAX_RECENT} answers of {REMEMBERED_TOKENS} tokens: {held(remembered_before):.0f} MB before, "
        f"{held(remembered):.1f} after (its line: {REMEMBERED_BYTES / 1e6:.0f})"
    )
    print(f"the line, MB ({QUEUED_TOKEN_BYTES} bytes a token in line, in both processes); before: none")
    for context in (8192, 32_768, CONTEXT):
        sizes = ", ".join(f"queue {n}: {text_bytes(context, n) / 1e6:.0f}" for n in (8, QUEUE_LENGTH, 256))
        print(f"  context {context}: {sizes}")


if __name__ == "__main__":
    main()

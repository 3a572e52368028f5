"""An answer as a row of items (thoughts, texts, calls), the view that Messages and Responses share.

`Items` follows the deltas of one answer and says what happens to which item. Chat completions need no such
view: they send the deltas themselves.
"""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

from server.api.answer.answer import Delta
from server.link.messages import TokenScore

Kind = Literal["thought", "text", "call"]


@dataclass
class Item:
    """One item as far as it has come; `text` of a call is its arguments, JSON where `is_whole`."""

    kind: Kind
    position: int
    text: str = ""
    call_id: str = ""
    name: str = ""
    scores: list[TokenScore] = field(default_factory=list)
    is_whole: bool = True


@dataclass(frozen=True)
class Opened:
    """An item begins."""

    item: Item


@dataclass(frozen=True)
class Grew:
    """Text was added to an item."""

    item: Item
    text: str
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class Closed:
    """Nothing is added to an item any more. A call that broke off is not whole."""

    item: Item


Change = Opened | Grew | Closed


class Items:
    """The items of one answer. At most one is open."""

    def __init__(self) -> None:
        self.closed: list[Item] = []
        self._open: Item | None = None
        self._num_opened = 0
        self._scores: tuple[TokenScore, ...] = ()

    @classmethod
    async def of(cls, deltas: AsyncGenerator[tuple[int, Delta], None]) -> "Items":
        """The items of an answer that nobody needs before its end."""
        items = cls()
        async with aclosing(items.follow(deltas)) as changes:
            async for _ in changes:
                pass
        return items

    async def follow(self, deltas: AsyncGenerator[tuple[int, Delta], None]) -> AsyncGenerator[Change, None]:
        """What happens to which item, to the end of the answer."""
        async with aclosing(deltas):
            async for _, delta in deltas:
                for change in self.push(delta):
                    yield change
        for change in self.end():
            yield change

    def push(self, delta: Delta) -> Iterator[Change]:
        """What a delta changes."""
        if delta.reasoning:
            yield from self._write("thought", delta.reasoning)
        for part in delta.calls:
            if part.id:
                yield from self._enter("call", part.id, part.name)
            call = self._open
            assert call, "a call is opened by its id and nothing interrupts it"
            if part.arguments:
                call.text += part.arguments
                yield Grew(call, part.arguments)
            if part.is_complete:
                yield self._close(call)
        self._scores += delta.scores  # of tokens whose text is held back, too
        if delta.content:
            scores, self._scores = self._scores, ()
            yield from self._write("text", delta.content, scores)

    def end(self) -> Iterator[Change]:
        """What the end of the answer changes."""
        yield from self._leave()

    def _write(self, kind: Kind, text: str, scores: tuple[TokenScore, ...] = ()) -> Iterator[Change]:
        if self._open is None or self._open.kind != kind:
            yield from self._enter(kind)
        item = self._open
        assert item, "it was entered"
        item.text += text
        item.scores += scores
        yield Grew(item, text, scores)

    def _enter(self, kind: Kind, call_id: str = "", name: str = "") -> Iterator[Change]:
        yield from self._leave()
        self._open = Item(kind, self._num_opened, call_id=call_id, name=name)
        self._num_opened += 1
        yield Opened(self._open)

    def _leave(self) -> Iterator[Change]:
        if self._open:
            self._open.is_whole = self._open.kind != "call"  # whole calls are closed by their own last part
            yield self._close(self._open)

    def _close(self, item: Item) -> Closed:
        self.closed.append(item)
        self._open = None
        return Closed(item)

"""Runs an engine's loop until all who asked have an end. Called by tests that look at what it sent."""

from collections.abc import Callable, Iterable
from queue import SimpleQueue

from server.engine.loop import EngineLoop
from server.link.messages import Cancel, Command, Event, Failed, Finished, Generate, Shutdown, Token

MakeLoop = Callable[[SimpleQueue[Command], Callable[[Event], None]], EngineLoop]


def events_of(
    make_loop: MakeLoop,
    commands: Iterable[Command],
    react: Callable[[Event], Iterable[Command]] = lambda event: (),
) -> list[Event]:
    """All events of a loop that is told to stop when it is idle; `react` says what comes after each."""
    inbox: SimpleQueue[Command] = SimpleQueue()
    events: list[Event] = []
    unfinished: set[str] = set()

    def put(command: Command) -> None:
        inbox.put(command)
        match command:
            case Generate(request_id):
                unfinished.add(request_id)
            case Cancel(request_id):
                unfinished.discard(request_id)

    def send(event: Event) -> None:
        events.append(event)
        for command in react(event):
            put(command)
        if isinstance(event, Finished | Failed):
            unfinished.discard(event.request_id)
        if not unfinished:
            inbox.put(Shutdown())

    for command in commands:
        put(command)
    loop = make_loop(inbox, send)
    loop.run()
    loop.check_integrity()
    return events


def tokens_of(events: Iterable[Event], request_id: str = "a") -> list[int]:
    """The text of an answer."""
    tokens = [event for event in events if isinstance(event, Token) and event.request_id == request_id]
    return [token.score.token_id for token in tokens]

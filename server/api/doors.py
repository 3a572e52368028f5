"""Who is connected, how many may be, and who gives way when all places are taken.

One `Doors` for each server, owned by the event loop. Connections tell it what they are waiting for; an
operating system that runs out of descriptors would shut out everybody, monitors and running answers alike.
"""

import resource
from typing import Protocol

# Kept for everything that is no client: listener, log, databases, pipes, worker processes, and connections
# that the system has accepted and this server has not seen.
OWN_DESCRIPTORS = 64
# Beyond the places of requests: for /health, and for clients that are about to ask.
SPARE_PLACES = 16
# More connections than this would hold more memory than the plan sets aside for them.
MOST_PLACES = 512
LEAST_PLACES = 8
# What a soft limit is raised to where the hard one is infinite: macOS takes no more.
UNLIMITED = 10_240


class Client(Protocol):
    """A connection, as its place is taken away."""

    def give_way(self) -> None:
        """Close, because another client needs the place."""


class Doors:
    """All connections in the order in which they began to wait for their clients."""

    def __init__(self, num_places: int = MOST_PLACES, num_spare: int = SPARE_PLACES) -> None:
        self._num_places, self._num_spare = num_places, num_spare
        self._idle: dict[Client, None] = {}  # no request, or a part of its head
        self._sending: dict[Client, None] = {}  # a head, and a part of its body
        self._served: set[Client] = set()

    def enter(self, client: Client) -> None:
        """Give a new connection a place, if need be that of the client that is waited for longest."""
        self.await_request(client)
        if self.num_connected > self._num_places + self._num_spare:
            self._send_away(next(iter([*self._idle, *self._sending])))

    def await_request(self, client: Client) -> None:
        """The client owes a request, at first and after each answer, or is about to leave."""
        self.leave(client)
        self._idle[client] = None

    def admit(self, client: Client, *, is_monitor: bool) -> bool:
        """Whether a request whose head has come is served. Some places are for monitors alone."""
        if client in self._served:  # it sends the next request before it has this answer
            return True
        self.leave(client)
        if not is_monitor and len(self._sending) + len(self._served) >= self._num_places:
            if not self._sending:
                self._idle[client] = None
                return False
            self._send_away(next(iter(self._sending)))
        self._sending[client] = None
        return True

    def complete(self, client: Client) -> None:
        """A request is complete: the client waits for this server now, and keeps its place."""
        if client in self._sending:
            del self._sending[client]
            self._served.add(client)

    def leave(self, client: Client) -> None:
        """A connection is gone."""
        self._idle.pop(client, None)
        self._sending.pop(client, None)
        self._served.discard(client)

    def _send_away(self, client: Client) -> None:
        self.leave(client)
        client.give_way()

    @property
    def num_connected(self) -> int:
        """Connections in any state."""
        return len(self._idle) + len(self._sending) + len(self._served)


def raise_descriptor_limit() -> int:
    """Raises the soft limit of open files to the hard one; returns what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (hard if hard != resource.RLIM_INFINITY else UNLIMITED, UNLIMITED):
        if soft != resource.RLIM_INFINITY and soft < wanted:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                return wanted
            except (OSError, ValueError):
                continue
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def make_doors(descriptors: int) -> Doors:
    """As many places as a limit of open files leaves room for."""
    room = descriptors - OWN_DESCRIPTORS - SPARE_PLACES
    return Doors(max(LEAST_PLACES, min(MOST_PLACES, room)))

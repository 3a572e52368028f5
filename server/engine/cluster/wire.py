"""A connection between rank 0 and another rank: messages both ways, and a beat each second beside them.

MLX's ring notices a machine that has ended, but neither one that hangs nor, while nothing is sent, one that
has gone. Two threads of its own read and beat; whoever sends is on the engine's.
"""

import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

from config.errors import ClusterError
from server.engine.cluster.rank_messages import Beat, Gone, RankMessage

BEAT_S = 1.0
# A process that says nothing for this long is stopped, or its machine is.
SILENCE_S = 6.0


class Wire:
    """Made on a connected socket. Both sides prove that they have the key, or AuthenticationError is raised.

    Never more than one thread sends at a time; a message is whole or the connection has ended.
    """

    def __init__(self, connected: socket.socket, key: str, *, answers_first: bool) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = Connection(connected.detach())
        self._lock = threading.Lock()
        steps = [deliver_challenge, answer_challenge]
        for step in reversed(steps) if answers_first else steps:
            step(self._connection, key.encode())

    def send(self, message: RankMessage) -> None:
        """Raises ClusterError where the other side has ended."""
        try:
            with self._lock:
                self._connection.send(message)
        except OSError as error:
            raise ClusterError(f"a rank of the cluster has ended ({error.strerror})") from error

    def receive(self, *, is_patient: bool = False) -> RankMessage:
        """The next message; Gone if the connection has ended.

        Also Gone after SILENCE_S without a message, unless `is_patient`.
        """
        try:
            if self._connection.poll(None if is_patient else SILENCE_S):
                message: RankMessage = self._connection.recv()
                return message
        except (EOFError, OSError):
            return Gone("has ended")
        return Gone(f"has said nothing for {SILENCE_S:g} s")

    def watch(self, on_message: Callable[[RankMessage], object]) -> None:
        """Starts to beat, and to pass on what comes: beats excepted, Gone last."""
        threading.Thread(target=self._beat, name="rank-beats", daemon=True).start()
        threading.Thread(target=self._read, args=(on_message,), name="rank-messages", daemon=True).start()

    def close(self) -> None:
        """Ends the connection, so that the other side hears of it."""
        self._connection.close()

    def _read(self, on_message: Callable[[RankMessage], object]) -> None:
        while not isinstance(message := self.receive(), Gone):
            if not isinstance(message, Beat):
                on_message(message)
        on_message(message)

    def _beat(self) -> None:
        try:
            while True:
                time.sleep(BEAT_S)
                self.send(Beat())
        except ClusterError:
            return  # the reader hears of the same end

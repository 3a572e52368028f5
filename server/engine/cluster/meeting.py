"""How the machines of a cluster find each other at the start: compared, numbered and joined to a ring.

Rank 0 listens at the first address of the list. The others come there, again and again until it is there.
"""

import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from multiprocessing import AuthenticationError
from queue import Empty, SimpleQueue

from config.errors import ClusterError, UsageError
from models.arithmetic import Arithmetic
from models.loading.fingerprint import cache_fingerprint
from models.loading.loading import Checkpoint
from server.engine.cluster.rank_messages import Introduction
from server.engine.cluster.wire import Wire
from server.link.messages import ClusterConfig
from streaming.files.marks import mark_checkpoint

# How long rank 0 waits for ranks on other machines when the engine starts again.
REJOIN_S = 8.0
RETRY_S = 0.2
# Rank 0 reads samples of all files before it listens.
TOLD_AFTER_S = 5.0

Guest = tuple[Wire, Introduction]

log = logging.getLogger(__name__)


def facts_of(config: ClusterConfig, checkpoint: Checkpoint, arithmetic: Arithmetic) -> dict[str, str]:
    """What all machines must have in common to compute the same."""
    code = cache_fingerprint(checkpoint.directory, checkpoint.args, arithmetic, knows_times=False)
    files = mark_checkpoint(checkpoint.directory)
    return {
        "version of glmserve": config.version,
        "version of MLX": version("mlx"),
        "arithmetic": repr(arithmetic),
        **{f"file {name}": f"{size} bytes, {digest.hex()}" for name, (size, digest) in files.items()},
        "code that computes": code.hex(),
    }


def gather(
    config: ClusterConfig, facts: Mapping[str, str], report: Callable[[str], None], *, is_again: bool
) -> list[Guest]:
    """Returns the other machines in the order of the list, once all have come.

    Raises UsageError where one of them differs. `is_again`: after a restart one that differs is left out, and
    those on other machines have REJOIN_S to come.
    """
    guests: dict[int, Guest] = {}
    arrivals: SimpleQueue[Guest] = SimpleQueue()
    others = range(1, len(config.addresses))
    awaited = set(config.started if is_again else others)
    deadline_s = time.monotonic() + REJOIN_S
    with _listen(config.addresses[0]) as listener:
        if by_hand := [config.addresses[node] for node in others if node not in config.started]:
            log.info("waiting for the ranks at %s", ", ".join(by_hand))
        threading.Thread(target=_accept, args=(listener, config.key, arrivals), daemon=True).start()
        while awaited - guests.keys() or (len(guests) < len(others) and time.monotonic() < deadline_s):
            missing = ", ".join(config.addresses[node] for node in others if node not in guests)
            report(f"waiting for {missing}")
            try:
                wire, guest = arrivals.get(timeout=1.0)
            except Empty:
                continue
            try:
                _compare(config, facts, guest)
            except UsageError as error:
                if not is_again:
                    raise
                log.error("%s", error)
                wire.close()
            else:
                guests[guest.node] = wire, guest
    return [guests[node] for node in sorted(guests)]


def _listen(address: str) -> socket.socket:
    return _bind(address, int(address.rpartition(":")[2]))


def _bind(address: str, port: int) -> socket.socket:
    """A socket at a port of the address's host. Raises UsageError where that is another machine's."""
    try:
        return socket.create_server((address.rpartition(":")[0], port))
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # what follows is the address once more
        raise UsageError(f"--nodes: this machine cannot listen on {address}: {reason}") from error


def _accept(listener: socket.socket, key: str, arrivals: "SimpleQueue[Guest]") -> None:
    """Each on a thread of its own: a stranger who says nothing keeps nobody waiting."""
    try:
        while True:
            connected, _ = listener.accept()
            threading.Thread(target=_meet, args=(connected, key, arrivals), daemon=True).start()
    except OSError:
        return  # the meeting is over


def _meet(connected: socket.socket, key: str, arrivals: "SimpleQueue[Guest]") -> None:
    try:
        wire = Wire(connected, key, answers_first=False)
    except (AuthenticationError, OSError, EOFError):
        return  # who has not the key is no rank
    if isinstance(message := wire.receive(), Introduction):
        arrivals.put((wire, message))


def _compare(config: ClusterConfig, facts: Mapping[str, str], guest: Introduction) -> None:
    if not 0 < guest.node < len(config.addresses):
        raise UsageError(f"node {guest.node} came, and --nodes has {len(config.addresses)}")
    for name in dict.fromkeys([*facts, *guest.facts]):
        here, there = facts.get(name, "none"), guest.facts.get(name, "none")
        if here != there:
            raise UsageError(
                f"{config.addresses[guest.node]} cannot be one engine with this machine: its {name} is "
                f"another (there {there[:80]}, here {here[:80]})"
            )


def knock(config: ClusterConfig, introduction: Introduction) -> Wire:
    """Connects to rank 0, again and again until it answers. Raises UsageError where the keys differ."""
    host, _, port = config.addresses[0].rpartition(":")
    tells_s = time.monotonic() + TOLD_AFTER_S
    while True:
        try:
            wire = Wire(socket.create_connection((host, int(port))), config.key, answers_first=True)
            wire.send(introduction)
            return wire
        except AuthenticationError as error:
            raise UsageError(f"{config.addresses[0]} has another --cluster-key") from error
        except (OSError, EOFError, ClusterError) as error:
            if time.monotonic() > tells_s:
                log.info("rank 0 does not answer yet (%s); it is tried again until it does", error)
                tells_s = math.inf
            time.sleep(RETRY_S)


def free_address(address: str) -> str:
    """An address of the same machine with a port that nobody listens on. Raises UsageError elsewhere."""
    with _bind(address, 0) as server:
        return f"{address.rpartition(':')[0]}:{server.getsockname()[1]}"

"""The engine process: `python -m server.engine.worker FD`, FD one end of a socket pair.

Two threads. The main one opens the model and runs the loop. The other reads commands; when the pipe
ends, because the HTTP process stopped or died in any way, it ends this process at once, whatever the
main thread is doing: the memory of a model must not be orphaned.
"""

import errno
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue

from config.errors import CheckpointChanged, ClusterError, UsageError
from server.engine.apple import with_activity
from server.engine.backend import open_backend
from server.engine.decode.token_masks import Grammars
from server.engine.loop import EngineLoop
from server.engine.model_protocol import Backend, OpenBackend
from server.engine.schedule.shared_prefixes import SavedPrefixes
from server.engine.telemetry import Telemetry
from server.link.messages import (
    Command,
    EngineConfig,
    Event,
    Load,
    LoadFailed,
    Loading,
    Marks,
    Ready,
)
from server.logs import set_up_logging
from streaming.files.marks import mark_checkpoint, refuse_changed

# What the system has none of at the moment.
SCARCITY = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
# Less than the HTTP side waits before it insists.
CLOSE_TIMEOUT_S = 3.0
# A rank that fails is noticed by the others' computation first, and says why within this time.
EXPLAINED_WITHIN_S = 0.5

log = logging.getLogger(__name__)


def main(open_model: OpenBackend = open_backend) -> int:
    """Serve the pipe whose descriptor is the first argument."""
    # These come to all processes of a terminal or a service, and are the HTTP process's to obey: at the first
    # two it lets answers end, then this one; at the third it reads its keys again.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    pipe = Connection(int(sys.argv[1]))
    inbox: SimpleQueue[Command] = SimpleQueue()
    threading.Thread(target=_read_commands, args=(pipe, inbox), name="commands", daemon=True).start()
    load = inbox.get()
    assert isinstance(load, Load), "the first command opens the model"
    set_up_logging(load.config.log_level, load.config.log_format, load.config.log_file)
    turn = threading.Lock()  # of a cluster a second thread tells the last words

    def send(event: Event) -> None:
        with turn:
            pipe.send(event)

    def lost(reason: str) -> None:
        log.error("%s", reason)
        send(LoadFailed(reason, is_usage_error=False))

    opened = _open(load.config, open_model, send)
    if opened is None:
        return 1
    backend, marks = opened
    backend.on_lost(lost)
    send(Ready(backend.info, marks))
    try:
        _make_loop(backend, load.config, inbox, send).run()
    except ClusterError as error:
        time.sleep(EXPLAINED_WITHIN_S)  # the rank that has failed may know better why
        lost(str(error))
        return 1
    if backend.prefix:
        backend.prefix.close(CLOSE_TIMEOUT_S)
    return 0


def _open(
    config: EngineConfig, open_model: OpenBackend, send: Callable[[Event], None]
) -> tuple[Backend, Marks] | None:
    """The model, and the marks of its files; None where the HTTP side was told why not."""
    try:
        if config.marks is not None:
            refuse_changed(config.model_path, config.marks)
        marks = config.marks or mark_checkpoint(config.model_path)
        return open_model(config, lambda fraction, text: send(Loading(fraction, text))), marks
    except CheckpointChanged as error:
        send(LoadFailed(str(error), is_usage_error=False, is_changed=True))
    except UsageError as error:
        send(LoadFailed(str(error), is_usage_error=True))
    except Exception as error:  # the process ends here, and the HTTP side says why
        log.exception("the model could not be opened")
        is_scarce = isinstance(error, OSError) and error.errno in SCARCITY
        message = f"{type(error).__name__}: {error}"
        send(LoadFailed(message, is_usage_error=False, is_scarce=is_scarce))
    return None


def _make_loop(
    backend: Backend, config: EngineConfig, inbox: SimpleQueue[Command], send: Callable[[Event], None]
) -> EngineLoop:
    """The loop, with what it tells the HTTP side of its work."""
    telemetry = Telemetry(backend.measure, send, backend.heat)
    loop = EngineLoop(
        backend,
        inbox,
        with_activity(telemetry.send),
        grammars=Grammars(config.model_path, backend.info.vocab_size),
        prefixes=SavedPrefixes(backend.prefix) if backend.prefix else None,
        beat=telemetry.beat,
    )
    telemetry.watch(loop.measure)
    return loop


def _read_commands(pipe: Connection, inbox: SimpleQueue[Command]) -> None:
    try:
        while True:
            inbox.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())

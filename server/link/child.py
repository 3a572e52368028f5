"""One life of the engine process, with its pipe and its two threads. Made by `EngineProcess`.

One thread writes commands, so that a child that does not read cannot block the event loop; one reads events
and hands them on.
"""

import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

import server
from server.link.messages import ClusterConfig, Command, EngineConfig, Event, Shutdown

STOP_TIMEOUT_S = 5.0
# An engine that has lost a rank of its cluster says so and ends, within this time.
WORDS_S = 2.0
FOLLOWER = "server.engine.cluster.follower"
# glibc raises the size from which it maps memory to that of what was freed, up to 32 MB, and then keeps up to
# twice as much of what MLX frees, in nobody's line of the plan: 37 of 403 MB (`benchmarks.ceiling`). A fixed
# size gives it back at once. Every mapping is zeroed page by page, so it is the size of a tile's largest
# intermediate on the CPU: with 1 MiB a prompt took a quarter longer. Other systems' libraries ignore it.
# NumPy's OpenBLAS lets its threads look for work for 2^26 cycles before they sleep, on cores that the disk's
# threads and MLX want: of 36 s of two cores they took 11. The shortest time that it takes is 2^4 cycles.
# They also wait for each other in a loop, and one that has to wait for a core stops all of them: with
# two threads on two busy cores a product took 11.4 ms, with one 0.54. So it leaves cores to everybody else.
# MLX rounds float32 products to TF32's 10 bits on NVIDIA and on Apple's M5 unless it is told not to. Router,
# indexer and head weights are float32 because they decide; wide products are bfloat16 and lose nothing.
# MLX gathers kernels for NVIDIA into a graph until somebody waits for it: the round trip that tells a layer's
# experts then takes 0.42 ms, without graphs 0.19 (`benchmarks.gpu.profile`).
# glibc asks Linux for pages of 2 MB where it maps memory: the kernel then takes 0.1 to 0.2 ms of CPU to read
# an expert of 16.5 MB past its cache, with pages of 4 kB 0.9 to 1.3 (`benchmarks.target.align_gain`).
ENGINE_ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_THRESHOLD_": str(2**22),
    "OPENBLAS_THREAD_TIMEOUT": "4",
    "MLX_ENABLE_TF32": "0",
    "MLX_USE_CUDA_GRAPHS": "0",
}
# For HTTP and for the disk's threads.
CORES_OF_OTHERS = 2
# MLX hands Metal a command buffer after so many operations, or when those name so many MB: by default 40 or
# 50, and a gather names a whole bank of slots, so each would go alone. Larger ones gave 5 to 8 % (published,
# never run by us). A step waits for its results once a layer in any case.
COMMAND_BUFFERS = {"MLX_MAX_OPS_PER_BUFFER": "200", "MLX_MAX_MB_PER_BUFFER": "4000"}

log = logging.getLogger(__name__)


class Child:
    """`heard_at`: when it said something last, by `time.monotonic`."""

    def __init__(self, worker: str, config: EngineConfig | None = None) -> None:
        """`config`: if it has a cluster, the ranks on this machine are started, and end with this process."""
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                # -P: a folder named models/ where the server was started must not be imported
                [sys.executable, "-P", "-m", worker, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=engine_environment(),
                stdin=subprocess.DEVNULL,
            )
        self._followers: list[subprocess.Popen[bytes]] = []
        if config and config.cluster:
            self._start_followers(config, config.cluster)
        self.heard_at = time.monotonic()
        self._pipe = Connection(ours.detach())
        self._outbox: SimpleQueue[Command | None] = SimpleQueue()
        self._writer = threading.Thread(target=self._write_commands, name="engine-commands", daemon=True)
        self._reader: threading.Thread | None = None
        self._writer.start()

    def send(self, command: Command) -> None:
        """Queue a command; never blocks."""
        self._outbox.put(command)

    def read_events(self, on_event: Callable[[Event], object], on_death: Callable[[int], object]) -> None:
        """Start the thread that passes on what the child says, and at last its exit code."""
        self._reader = threading.Thread(
            target=self._read, args=(on_event, on_death), name="engine-events", daemon=True
        )
        self._reader.start()

    def _read(self, on_event: Callable[[Event], object], on_death: Callable[[int], object]) -> None:
        try:
            self._read_to_the_end(on_event)
            exit_code = self.process.wait()
            end_processes(self._followers)
            on_death(exit_code)
        except RuntimeError:  # the event loop is closed: nobody is left to tell
            log.debug("the engine spoke after the event loop had ended")
        finally:
            self._outbox.put(None)

    def _read_to_the_end(self, on_event: Callable[[Event], object]) -> None:
        while True:
            try:
                event = self._pipe.recv()
            except (EOFError, OSError):
                return
            self.heard_at = time.monotonic()
            on_event(event)

    def _start_followers(self, config: EngineConfig, cluster: ClusterConfig) -> None:
        try:
            for node in cluster.started:
                follower = start_follower(replace(config, cluster=replace(cluster, node=node)))
                self._followers.append(follower)
                threading.Thread(target=self._watch, args=(follower,), name="follower", daemon=True).start()
        except OSError:
            end_processes([self.process, *self._followers])
            raise

    def _watch(self, follower: "subprocess.Popen[bytes]") -> None:
        """Ends the engine after one of its ranks, unless it has done so in words."""
        follower.wait()
        time.sleep(WORDS_S)
        self.process.kill()

    def kill(self) -> None:
        """End it at once, whatever it does; `on_death` tells when that is done."""
        self.process.kill()

    def stop(self) -> None:
        """Ask, wait, insist. Blocks; call from a thread that may."""
        self.send(Shutdown())
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for thread in (self._reader, self._writer):
            if thread:
                thread.join()

    def _write_commands(self) -> None:
        while (command := self._outbox.get()) is not None:
            try:
                self._pipe.send(command)
            except OSError:  # the reader sees the same end, and tells it
                break
        if self._reader:
            self._reader.join()
        self._pipe.close()


def start_follower(config: EngineConfig) -> "subprocess.Popen[bytes]":
    """Starts another rank of a cluster; it ends when its standard input does."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", FOLLOWER], env=engine_environment(), stdin=subprocess.PIPE
    )
    assert process.stdin is not None, "it is asked for"
    process.stdin.write(pickle.dumps(config))
    process.stdin.flush()
    return process


def end_processes(processes: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Kills the processes, also those that a signal has stopped, and waits for their end."""
    for process in processes:
        process.kill()
        process.communicate()


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def engine_variables() -> dict[str, str]:
    """The variables that the engine process has unless they are set."""
    ours = ENGINE_ENVIRONMENT | (COMMAND_BUFFERS if sys.platform == "darwin" else {})
    return ours | {"OPENBLAS_NUM_THREADS": str(max(1, num_cores() - CORES_OF_OTHERS))}


def engine_environment() -> dict[str, str]:
    """The environment that MLX computes in; a child with it imports this very code, wherever it starts."""
    root = str(Path(server.__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH")
    return {**engine_variables(), **os.environ, "PYTHONPATH": ":".join(filter(None, [root, inherited]))}

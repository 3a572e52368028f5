"""An engine process over the counting model.

The model path says how: busy, slow, broken, unusable, mortal, roomy, freezing, else well.
"""

import os
import sys
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path

import mlx.core as mx

from config.errors import CheckpointError
from models.attention.attention import Span
from server.engine.model_protocol import Backend, ReportProgress
from server.engine.worker import main
from server.link.messages import EngineConfig
from tests.server.engine.fakes import CountingModel, make_backend

FATAL_TOKEN = 13


class FreezingModel(CountingModel):
    """Never comes back from a step over the fatal token."""

    def forward(self, tokens: mx.array, spans: Sequence[Span]) -> Generator[int | None, None, mx.array]:
        if FATAL_TOKEN in tokens.tolist():  # type: ignore[operator]
            time.sleep(1000)
        return super().forward(tokens, spans)


def fail_first_starts(name: str) -> None:
    """Raise at the first starts, counted in a file: `fragile`, or `scarce` and a number of errno."""
    kind, _, number = name.partition(" ")
    if kind not in ("fragile", "scarce"):
        return
    starts = Path(os.environ["STARTS"])
    starts.write_text(starts.read_text() + "x")
    if kind == "fragile" and len(starts.read_text()) <= 5:
        raise RuntimeError("out of luck")
    if kind == "scarce" and len(starts.read_text()) <= 7:
        raise OSError(int(number), os.strerror(int(number)))


def open_fake(config: EngineConfig, report: ReportProgress) -> Backend:
    """What the path asks for."""
    report(0.5, "half of it")
    fail_first_starts(config.model_path.name)
    match config.model_path.name:
        case "unusable":
            raise CheckpointError("this checkpoint is of no use")
        case "broken":
            raise RuntimeError("out of memory")
        case name if name.startswith("scarce"):  # the system has none of what the error says, at first
            number, starts = int(name.removeprefix("scarce ")), Path(os.environ["STARTS"])
            starts.write_text(starts.read_text() + "x")
            if len(starts.read_text()) < 8:
                raise OSError(number, os.strerror(number))
            return make_backend()
        case "busy":
            return make_backend(CountingModel(layer_s=30))
        case "slow":
            return make_backend(CountingModel(layer_s=0.02), agent_inflight=1)
        case "mortal":
            threading.Timer(0.05, os._exit, [3]).start()
            return make_backend()
        case "roomy":
            return make_backend(context_length=2000)
        case "freezing":
            return make_backend(FreezingModel())
        case _:
            return make_backend(CountingModel(layer_s=0.001))


if __name__ == "__main__":
    sys.exit(main(open_fake))

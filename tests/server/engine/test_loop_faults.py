"""A disk that goes wrong in the middle of a request: that request is told, the other one is right."""

import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from models.arithmetic import CPU, Quantization
from models.loading.loading import load_model, open_checkpoint
from server.engine.loop import EngineLoop
from server.engine.model_protocol import Backend
from server.link.messages import (
    Command,
    Event,
    Failed,
    Finished,
    Generate,
    ModelInfo,
    Sampling,
    Shutdown,
    Token,
)
from streaming.files.floats import Bytes
from streaming.store import ExpertStore
from tests.checkpoints import greedy, open_model, save_packed
from tests.grids import few
from tests.streaming.faulty_disk import Fault, FaultyDisk
from tests.tiny_glm import SHARED, make_weights

CONFIG = SHARED | {"hidden_size": 128, "moe_intermediate_size": 64}
PROMPT = (5, 9, 33, 21, 60, 7, 12)
NUM_TOKENS = 10
ORDER = ("first", "second")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def packing(path: str) -> Quantization | None:
        return Quantization(64, 4) if "switch_mlp" in path else None

    return save_packed(tmp_path_factory.mktemp("packed"), CONFIG, make_weights(CONFIG, 3), packing)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[int]:
    opened = open_model(folder)
    tokens, _ = greedy(opened.model, list(PROMPT), NUM_TOKENS)
    opened.store.close()
    return tokens


class _Served:
    """The loop over a streamed model, two requests, a fault that lasts until the first has failed."""

    def __init__(self, folder: Path, looks_ahead: bool = True) -> None:
        self.disk, checkpoint = FaultyDisk(), open_checkpoint(folder)
        self.store = ExpertStore(
            checkpoint.experts, 4, float_dtype=CPU.dtype, disk=self.disk, num_threads=3, timeout_s=0.3,
            looks_ahead=looks_ahead,
        )  # fmt: skip
        self.backend = Backend(load_model(checkpoint, CPU, self.store), ModelInfo(64, 4096))

    def run(self, fault: Fault, after_tokens: int, *, together: bool = False) -> list[Event]:
        inbox: SimpleQueue[Command] = SimpleQueue()
        first, second = (Generate(name, PROMPT, NUM_TOKENS, Sampling(temperature=0)) for name in ORDER)
        inbox.put(first)
        if together:
            inbox.put(second)
        events: list[Event] = []

        def send(event: Event) -> None:
            events.append(event)
            seen = sum(isinstance(item, Token) for item in events)
            if seen == after_tokens and not any(isinstance(item, Failed) for item in events):
                self.disk.fault = fault
            if isinstance(event, Failed):
                self.disk.fault = None
                if not together:
                    inbox.put(second)
            is_unharmed = isinstance(event, Finished) and event.request_id == "first"
            if is_unharmed or (isinstance(event, Failed | Finished) and event.request_id == "second"):
                inbox.put(Shutdown())

        EngineLoop(self.backend, inbox, send).run()
        return events


@pytest.fixture
def served(folder: Path) -> Iterator[_Served]:
    served = _Served(folder)
    yield served
    served.store.close()


def tokens_of(events: list[Event], request_id: str) -> list[int]:
    return [e.score.token_id for e in events if isinstance(e, Token) and e.request_id == request_id]


def check(served: _Served, events: list[Event], expected: list[int], message: str) -> None:
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert (failed.request_id, failed.kind) == ("first", "disk")
    assert message in failed.message
    assert "model.safetensors" in failed.message
    first = tokens_of(events, "first")
    assert first == expected[: len(first)], "no wrong token before the error"
    assert tokens_of(events, "second") == expected
    served.store.check_integrity()


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("after_tokens", few([1, 4], [4]))
def test_an_io_error(served: _Served, expected: list[int], after_tokens: int, together: bool) -> None:
    """Together, each is tried alone when their step has failed, and by the second try the disk is well."""

    def fail(number: int, buffer: Bytes, offset: int) -> int | None:
        raise OSError(5, "Input/output error")

    check(served, served.run(fail, after_tokens, together=together), expected, "Input/output error")


def test_a_shard_that_ends_early(served: _Served, expected: list[int]) -> None:
    check(served, served.run(lambda number, buffer, offset: 0, 3), expected, "bytes early")


def test_a_read_that_hangs_and_comes_back_late_with_other_bytes(folder: Path, expected: list[int]) -> None:
    """Without lookahead: a guess that hangs is nobody's error, and then the first request is unharmed."""
    served = _Served(folder, looks_ahead=False)
    release, numbers = threading.Event(), []

    def hang(number: int, buffer: Bytes, offset: int) -> int | None:
        numbers.append(number)
        if number != numbers[0]:
            return None
        release.wait(1.0)
        buffer[:] = 0xAB
        return len(buffer)

    check(served, served.run(hang, 3), expected, "answer")
    release.set()
    served.store.close()

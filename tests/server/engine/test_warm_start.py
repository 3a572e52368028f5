"""An engine that starts again begins with the experts of the one before, and answers with the same tokens."""

from contextlib import closing
from pathlib import Path
from queue import SimpleQueue

import pytest

from server.engine.loop import EngineLoop
from server.engine.model_protocol import Backend
from server.link.messages import (
    Command,
    Event,
    Finished,
    Generate,
    ModelInfo,
    Sampling,
    Shutdown,
    Token,
)
from streaming.eviction.hot_set import HotSet
from streaming.statistics import StoreStatistics
from tests.checkpoints import open_model, save_packed
from tests.tiny_glm import WIDER, make_weights, tokens

SLOTS = 9
ASKED = Generate("a", tuple(tokens(WIDER, 2)), 40, Sampling(temperature=0))


class AskedWhenWarm(HotSet):
    """Somebody asks as soon as there is nothing more to be read back."""

    inbox: SimpleQueue[Command]

    def advance(self) -> bool:
        has_more = super().advance()
        if not has_more and self.inbox.empty():
            self.inbox.put(ASKED)
        return has_more


def live(folder: Path, hot: Path) -> tuple[list[int], StoreStatistics]:
    """One life of an engine: its answer, and what its store counted."""
    opened, said = open_model(folder, SLOTS, looks_ahead=False), list[int]()
    hot_set = AskedWhenWarm(opened.store, hot, "model")
    inbox = hot_set.inbox = SimpleQueue[Command]()

    def send(event: Event) -> None:
        if isinstance(event, Token):
            said.append(event.score.token_id)
        if isinstance(event, Finished):
            inbox.put(Shutdown())

    with closing(opened.store):
        backend = Backend(opened.model, ModelInfo(WIDER["vocab_size"], 1000), hot_set=hot_set)
        EngineLoop(backend, inbox, send).run()
        opened.store.check_integrity()
        return said, opened.store.statistics()


@pytest.mark.slow
def test_what_was_in_memory_is_there_before_the_first_request(tmp_path: Path) -> None:
    folder = save_packed(tmp_path / "model", WIDER, make_weights(WIDER, 3), lambda path: None)
    text, cold = live(folder, tmp_path / "hot")
    again, warm = live(folder, tmp_path / "hot")
    assert len(text) == 40
    assert again == text, "which experts are there changes no bit"
    num_free = SLOTS * 5
    assert cold.evictions > 0
    assert warm.misses + warm.sweep_reads < cold.misses + cold.sweep_reads - num_free // 3
    (tmp_path / "hot").unlink()
    assert live(folder, tmp_path / "hot")[1].misses == cold.misses, "it is the file that makes the difference"

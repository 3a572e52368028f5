"""Text that waits, is heard or is remembered takes its line of the plan, and no more."""

import pickle
import tracemalloc
from collections.abc import Callable

import pytest

from config.plan import HEARD_TOKEN_BYTES, QUEUED_TOKEN_BYTES, REMEMBERED_BYTES, text_bytes
from server.api.answer.answer import Delta, Heard, merged
from server.api.answer.shapes import chat_message
from server.api.prompt.remembered import Remembered, Said
from server.glm.tools import CallPart
from server.link.messages import Generate, TokenScore
from tests.grids import few

LENGTH = 100_000


def held_bytes(make: Callable[[], object]) -> int:
    """Bytes that stay while what is made lives."""
    tracemalloc.start()
    kept = make()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept is not None
    return held


@pytest.mark.parametrize("first", [0, 1_000, 150_000])
def test_a_token_in_line_takes_four_bytes_in_each_process(first: int) -> None:
    def queued() -> Generate:
        return Generate("r", [first + i for i in range(LENGTH)], 1)

    assert held_bytes(queued) < LENGTH * QUEUED_TOKEN_BYTES / 2
    sent = pickle.dumps(queued())
    assert len(sent) < 4.1 * LENGTH
    assert held_bytes(lambda: pickle.loads(sent)) < LENGTH * QUEUED_TOKEN_BYTES / 2


@pytest.mark.parametrize("kind", ["content", "reasoning", "calls"])
@pytest.mark.parametrize("num_top", few([0, 5, 20], [5]))
def test_a_token_that_was_heard_takes_its_text(kind: str, num_top: int) -> None:
    def listen() -> Heard:
        heard = Heard()
        for i in range(20_000):
            score = TokenScore(i, -1.0, tuple((i + j, -1.0 - j) for j in range(num_top)))
            text = f"word {i % 1000} "
            calls = (CallPart(i // 5000, arguments=text),) if kind == "calls" else ()
            texts = {kind: text} if kind != "calls" else {}
            heard.add(Delta(scores=(score,), calls=calls, **texts))
        return heard

    assert held_bytes(listen) < 20_000 * HEARD_TOKEN_BYTES


def test_what_was_heard_is_the_same_message_however_it_is_kept() -> None:
    deltas = [Delta(reasoning=f"r{i} ") for i in range(200)] + [Delta(content=f"c{i} ") for i in range(300)]
    for index in range(3):
        deltas.append(Delta(calls=(CallPart(index, f"id{index}", f"name{index}"),)))
        deltas += [Delta(calls=(CallPart(index, arguments=f'"{i}",'),)) for i in range(150)]
        deltas.append(Delta(calls=(CallPart(index, is_complete=index < 2),)))
    heard = Heard()
    for delta in deltas:
        heard.add(delta)
    assert len(heard.deltas) < 130
    assert chat_message(heard.deltas) == chat_message([merged(deltas)]) == chat_message(deltas)


@pytest.mark.parametrize(
    ("answers", "length"), few([(400, 1_000), (20, 100_000), (300, 30_000), (2, 199_000)], [20, 2])
)
def test_remembered_answers_stay_within_their_bytes(answers: int, length: int) -> None:
    """Plant the fault: 256 of any length."""
    remembered = Remembered()

    def fill() -> Remembered:
        for i in range(answers):
            said = Said(range(length), "thought", f"{i} " + "word " * (length // 4), (), False)
            remembered.add("me", f"question {i}", said)
        return remembered

    assert held_bytes(fill) < 1.1 * REMEMBERED_BYTES
    last = remembered.find("me", None, f"question {answers - 1}", f"{answers - 1} " + "word " * (length // 4))
    assert last is None or list(last.token_ids) == list(range(length))
    remembered.close()


@pytest.mark.parametrize("context", [1024, 32_768, 200_000])
@pytest.mark.parametrize("queue", [1, 64, 1000])
def test_the_line_scales_with_context_and_queue(context: int, queue: int) -> None:
    assert text_bytes(context, queue) - text_bytes(context, queue - 1) == context * QUEUED_TOKEN_BYTES
    per_token = text_bytes(context, queue) - text_bytes(context - 1, queue)
    assert per_token == queue * QUEUED_TOKEN_BYTES + HEARD_TOKEN_BYTES

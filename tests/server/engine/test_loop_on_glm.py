"""The engine's loop over a real, tiny GLM: what it generates and scores is what the model computes."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest

from models import arithmetic
from models.arithmetic import CPU
from models.glm_moe_dsa import Model
from server.engine.loop import EngineLoop
from server.engine.model_protocol import Backend
from server.engine.schedule.limits import Limits
from server.link.messages import (
    Command,
    Event,
    Finished,
    Generate,
    ModelInfo,
    PromptScored,
    Sampling,
    Shutdown,
    Token,
    TokenScore,
)
from tests.checkpoints import open_model, save_packed
from tests.grids import few
from tests.tiny_glm import SHARED, make_weights
from tests.tiny_model import logits, make_model

PROMPT = tuple(int(token) for token in np.random.default_rng(5).integers(4, 64, 40))


# The reference BLAS of MLX's wheel gives a row of a product the same bits in any company, OpenBLAS does not:
# with it prompts that share a pass differ by what the engine does, and by nothing else.
ALONE = replace(CPU, uses_numpy=False)


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(SHARED, make_weights(SHARED, 3))


@pytest.fixture(scope="module")
def exact() -> Model:
    return make_model(SHARED, make_weights(SHARED, 3), ALONE)


def run(model: Model, request: Generate, rows: int) -> list[Event]:
    inbox: SimpleQueue[Command] = SimpleQueue()
    inbox.put(request)
    events: list[Event] = []

    def send(event: Event) -> None:
        events.append(event)
        if isinstance(event, Finished):
            inbox.put(Shutdown())

    EngineLoop(Backend(model, ModelInfo(64, 4096), limits=Limits(pass_rows=rows)), inbox, send).run()
    return events


@pytest.mark.parametrize("rows", [7, 33, 2048])
def test_greedy_tokens_are_the_likeliest_of_the_whole_forward(model: Model, rows: int) -> None:
    events = run(model, Generate("a", PROMPT, 12, Sampling(temperature=0)), rows)
    tokens = [event.score.token_id for event in events if isinstance(event, Token)]
    whole = logits(model, [*PROMPT, *tokens])
    assert tokens == whole[len(PROMPT) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("rows", [7, 2048])
def test_prompt_scores_are_those_of_the_whole_forward(model: Model, rows: int) -> None:
    events = run(model, Generate("a", PROMPT, 0, score_prompt=True), rows)
    scores = [score for event in events if isinstance(event, PromptScored) for score in event.scores]
    whole = logits(model, PROMPT).astype(np.float64)
    logprobs = whole - np.log(np.exp(whole).sum(-1, keepdims=True))
    expected = logprobs[np.arange(len(PROMPT) - 1), PROMPT[1:]]
    assert np.abs(np.array([score.logprob for score in scores[1:]]) - expected).max() < 1e-5


PROMPTS = {
    f"agent{number}": tuple(int(t) for t in np.random.default_rng(number).integers(4, 64, length))
    for number, length in enumerate([3, 40, 7, 25, 12, 1, 33, 18])
}


# Greedy ones and seeded ones side by side.
SAMPLINGS = {
    name: Sampling(0.9, top_p=0.9, top_k=20, repetition_penalty=1.2, frequency_penalty=0.3, seed=i)
    if i % 2
    else Sampling(temperature=0)
    for i, name in enumerate(PROMPTS)
}


def serve(backend: Backend, arrivals: dict[str, int]) -> dict[str, list[TokenScore]]:
    """Each agent's answer of 12 tokens; an agent comes when so many tokens of all have been handed out."""
    inbox: SimpleQueue[Command] = SimpleQueue()
    answers: dict[str, list[TokenScore]] = {name: [] for name in arrivals}
    coming, unfinished = dict(arrivals), set(arrivals)

    def let_in() -> None:
        num_tokens = sum(map(len, answers.values()))
        for name in [name for name, after in coming.items() if after <= num_tokens]:
            del coming[name]
            inbox.put(Generate(name, PROMPTS[name], 12, SAMPLINGS[name], num_top_logprobs=2))

    def send(event: Event) -> None:
        if isinstance(event, Token):
            answers[event.request_id].append(event.score)
        if isinstance(event, Finished):
            unfinished.discard(event.request_id)
        let_in()
        if not unfinished:
            inbox.put(Shutdown())

    let_in()
    loop = EngineLoop(backend, inbox, send)
    loop.run()
    loop.check_integrity()
    return answers


def alone(backend: Backend) -> dict[str, list[TokenScore]]:
    return {name: serve(backend, {name: 0})[name] for name in PROMPTS}


@pytest.fixture(scope="module")
def each(model: Model) -> dict[str, list[TokenScore]]:
    return alone(Backend(model, ModelInfo(64, 4096)))


@pytest.mark.slow
def test_eight_agents_get_the_bits_that_each_gets_alone(exact: Model) -> None:
    """Each comes while the others decode, joins their batch in the middle, and leaves it."""
    backend = Backend(exact, ModelInfo(64, 4096))
    assert serve(backend, {name: 5 * i for i, name in enumerate(PROMPTS)}) == alone(backend)


@pytest.mark.parametrize("products", few([0, 1_000, 2_500], [1_000]))
def test_steps_together_give_each_agent_the_bits_of_its_own_in_numpy_too(
    model: Model, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All attention is NumPy's, or that to more than some keys. No pass has more than eight rows."""
    monkeypatch.setattr(arithmetic, "NUMPY_PRODUCTS", products)
    monkeypatch.setitem(globals(), "PROMPTS", {name: PROMPT[i : i + 1] for i, name in enumerate(PROMPTS)})
    backend = Backend(model, ModelInfo(64, 4096))
    assert serve(backend, {name: 5 * i for i, name in enumerate(PROMPTS)}) == alone(backend)


def test_agents_whose_prompts_share_a_pass_get_the_text_that_each_gets_alone(
    model: Model, each: dict[str, list[TokenScore]]
) -> None:
    """139 rows in one product round differently from 40: the text is the same, log-probabilities nearly."""
    together = serve(Backend(model, ModelInfo(64, 4096)), dict.fromkeys(PROMPTS, 0))
    for name in PROMPTS:
        assert [score.token_id for score in together[name]] == [score.token_id for score in each[name]]
        difference = [
            (a.logprob or 0) - (b.logprob or 0) for a, b in zip(together[name], each[name], strict=True)
        ]
        assert np.abs(difference).max() < 1e-5


@pytest.mark.slow
def test_steps_between_the_layers_of_a_streamed_pass_change_nothing(tmp_path: Path) -> None:
    """Five slots of eight experts: steps and passes of 9 to 40 rows evict what the others have used."""
    config = SHARED | {"hidden_size": 128, "moe_intermediate_size": 64}
    folder = save_packed(tmp_path, config, make_weights(config, 3), lambda path: None)
    resident, streamed = open_model(folder, None, ALONE), open_model(folder, 5, ALONE)
    limits = Limits(decode_share=0.9)
    expected = alone(Backend(resident.model, ModelInfo(64, 4096)))
    with closing(resident.store), closing(streamed.store):
        backend = Backend(streamed.model, ModelInfo(64, 4096), limits=limits)
        assert serve(backend, {name: 5 * i for i, name in enumerate(PROMPTS)}) == expected
        streamed.store.check_integrity()

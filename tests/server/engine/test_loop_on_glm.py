"""The engine's loop over a real, tiny GLM: what it generates and scores is what the model computes."""

from queue import SimpleQueue

import numpy as np
import pytest

from models.glm_moe_dsa import Model
from server.engine.limits import Limits
from server.engine.loop import EngineLoop
from server.engine.messages import (
    Command,
    Event,
    Finished,
    Generate,
    ModelInfo,
    PromptScored,
    Sampling,
    Shutdown,
    Token,
)
from server.engine.model import Backend
from tests.tiny_glm import SHARED, make_weights
from tests.tiny_model import logits, make_model

PROMPT = tuple(int(token) for token in np.random.default_rng(5).integers(4, 64, 40))


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(SHARED, make_weights(SHARED, 3))


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

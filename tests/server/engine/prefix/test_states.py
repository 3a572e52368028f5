"""Saved prefixes of a model that keeps a state beside its rows: found again, followed, superseded."""

from pathlib import Path

import pytest

from server.engine.prefix.lookup import PrefixCache
from server.link.messages import Generate
from tests.models.families.tiny_flash import FLASH, make_flash_weights
from tests.server.engine.prefix.prefix_runs import (
    GREEDY,
    CountedModel,
    ask,
    generate,
    leave_after,
    open_prefix,
)
from tests.tiny_glm import tokens
from tests.tiny_model import make_model

USER = 60  # begins a turn, and ends an answer
CONFIG = FLASH | {"vocab_size": 64}
SYSTEM = tokens({"vocab_size": 60}, 200, seed=1)


@pytest.fixture(scope="module")
def model() -> CountedModel:
    return CountedModel(make_model(CONFIG, make_flash_weights(CONFIG, 3)))


def turn(seed: int, length: int) -> list[int]:
    return [USER, *tokens({"vocab_size": 60}, length, seed=seed)]


def states_in(folder: Path) -> list[Path]:
    """The files that hold states: a block of rows is smaller."""
    return [path for path in folder.glob("*.kv") if path.stat().st_size > 25_000]


def speak(
    model: CountedModel, prefix: PrefixCache | None, prompt: list[int], num_tokens: int = 5
) -> tuple[list[int], int, int]:
    """An answer, the tokens that were cached, and the rows that were computed."""
    model.take_rows()
    request = Generate("a", tuple(prompt), num_tokens, GREEDY, stop_token_ids=frozenset([USER]))
    outcome = generate(model, prefix, request)["a"]
    return outcome.tokens, outcome.usage.num_cached_tokens, model.take_rows()


@pytest.mark.slow
def test_a_tool_loop_of_forty_turns_computes_what_is_new(model: CountedModel, tmp_path: Path) -> None:
    prefix, prompt, new = open_prefix(tmp_path), SYSTEM + turn(2, 30), 0
    for number in range(40):
        said, cached, rows = speak(model, prefix, prompt)
        if number:
            assert rows <= new + len(said) + 64, number
            assert cached >= len(prompt) - new - 64
        if number == 20:  # as after `kill -9`: the blocks that were written are all that is left
            assert prefix.flush(20)
            prefix = open_prefix(tmp_path)
        added = turn(100 + number, 7 + 5 * (number % 9))
        new = len(added) + 1  # the answer's last token was drawn and not computed
        prompt = prompt + said + added
    assert speak(model, prefix, prompt)[0] == speak(model, None, prompt)[0]
    prefix.close(20)


def test_an_end_of_a_turn_gives_up_the_state_before_it(model: CountedModel, tmp_path: Path) -> None:
    prefix, prompt, num_states = open_prefix(tmp_path), SYSTEM + turn(2, 30), []
    for number in range(8):
        said, *_ = speak(model, prefix, prompt)
        prompt = prompt + said + turn(200 + number, 40)
        assert prefix.flush(20)
        num_states.append(len(states_in(tmp_path)))
    assert num_states[0] >= 2
    assert max(num_states) <= 4, num_states
    prefix.close(20)


@pytest.mark.parametrize("length", [1, 40, 64, 65, 200])
def test_another_conversation_begins_behind_the_system_prompt(model: CountedModel, length: int) -> None:
    prefix = open_prefix()
    speak(model, prefix, SYSTEM + turn(2, 90))
    prompt = SYSTEM + turn(3, length)
    said, cached, _ = speak(model, prefix, prompt)
    assert cached == 192  # the last block that ends in the system prompt
    assert said == speak(model, None, prompt)[0]


@pytest.mark.parametrize("length", [63, 64, 128, 300])
def test_the_same_prompt_again_computes_less_than_two_blocks(model: CountedModel, length: int) -> None:
    prefix, prompt = open_prefix(), SYSTEM + turn(2, length)
    said, *_ = speak(model, prefix, prompt)
    again, _, rows = speak(model, prefix, prompt)
    assert again == said
    assert rows <= 64 + len(said)


def test_prompts_that_come_together_share_their_beginning(model: CountedModel) -> None:
    prompts = {f"{i}": tuple(SYSTEM + turn(i, 50 + i)) for i in range(4)}
    model.take_rows()
    requests = [Generate(name, prompt, 4, GREEDY, agent=name) for name, prompt in prompts.items()]
    outcomes = generate(model, open_prefix(), *requests)
    assert max(model.rows) < 200 + 4 * 70
    for name, prompt in prompts.items():
        assert outcomes[name].tokens == ask(model, None, prompt, 4).tokens
    assert sum(outcome.usage.num_cached_tokens for outcome in outcomes.values()) == 3 * 192


@pytest.mark.parametrize("rows", [40, 100, 130])
def test_a_prompt_in_several_passes_says_the_same(model: CountedModel, rows: int) -> None:
    prompt = SYSTEM + turn(2, 150)
    assert ask(model, open_prefix(), prompt, 5, rows=rows).tokens == ask(model, None, prompt, 5).tokens


def test_a_prompt_whose_client_left_goes_on_where_it_was(model: CountedModel) -> None:
    prefix, prompt = open_prefix(), SYSTEM + turn(2, 400)
    leave_after(model, prefix, prompt, 12, 128)
    said, cached, _ = speak(model, prefix, prompt)
    assert said == speak(model, None, prompt)[0]
    assert cached % 64 == 0


def test_rows_without_their_state_are_not_used(model: CountedModel, tmp_path: Path) -> None:
    prefix, prompt = open_prefix(tmp_path), SYSTEM + turn(2, 100)
    said, *_ = speak(model, prefix, prompt)
    prefix.close(20)
    for path in states_in(tmp_path):
        path.unlink()
    again, cached, _ = speak(model, open_prefix(tmp_path), prompt)
    assert again == said
    assert cached == 0

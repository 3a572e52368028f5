"""Turns that clients send back changed: the next prompt is still the last one, its answer, and the new."""

import json
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.api.app import make_app
from server.api.prompt import remembered
from server.api.prompt.remembered import FILE_NAME, Remembered, Said
from server.api.prompt.replay import without_volatile_lines
from server.api.request.model_names import ModelNames
from server.api.service import Dialect, Service
from server.glm.templates.template import ChatTemplate
from server.glm.tokenizer import Tokenizer
from tests.server.api.answer.test_tool_calls import TOOLS
from tests.server.api.dialects.test_chat import ask
from tests.server.api.scripted import ScriptedEngine
from tests.server.glm.answers import call_tokens, spelled

CHAT = "/v1/chat/completions"
QUESTION = {"role": "user", "content": "what is the weather?"}
Change = Callable[[dict[str, Any]], dict[str, Any]]


def keep(message: dict[str, Any]) -> dict[str, Any]:
    return message


def strip_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if not key.startswith("reasoning")}


def rewrite_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Keys in another order, other blanks, whole numbers as JavaScript writes them."""
    calls = []
    for call in message["tool_calls"]:
        arguments = dict(reversed(json.loads(call["function"]["arguments"]).items()))
        text = json.dumps(arguments, indent=3).replace("2.0", "2")
        calls.append(call | {"function": call["function"] | {"arguments": text}})
    return strip_reasoning(message) | {"tool_calls": calls, "content": ""}


def thought(tokenizer: Tokenizer, text: str = "let me see") -> list[int]:
    """A thought in tokens that encoding its text would not give."""
    return [*spelled(tokenizer, text), *tokenizer.encode("</think>")]


def weather_call(tokenizer: Tokenizer, **arguments: Any) -> list[int]:
    ids = [*thought(tokenizer), *call_tokens(tokenizer, "weather", arguments)]
    return [*ids, *tokenizer.encode("<|observation|>")]


def answer(client: TestClient, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    message: dict[str, Any] = ask(client, messages=messages, **fields)["choices"][0]["message"]
    return message


def result_of(message: dict[str, Any]) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "7 degrees"}


@pytest.mark.parametrize(("change", "num_turns"), [(keep, 5), (strip_reasoning, 40), (rewrite_arguments, 8)])
def test_a_tool_loop_only_ever_extends_its_prompt(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer, change: Change, num_turns: int
) -> None:
    engine.context_length = 100_000
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}, QUESTION]
    expected: list[int] = []
    for turn in range(num_turns):
        generated = weather_call(tokenizer, days=float(turn % 3), city=f" Oslo {turn}\n")
        engine.turns = [generated]
        if turn % 2:
            client.post(CHAT, json={"messages": messages, "tools": TOOLS, "stream": True})
            engine.turns = [generated]  # the client was cut off, and asks again
        message = answer(client, messages, tools=TOOLS)
        prompt = list(engine.requests[-1].token_ids)
        assert prompt[: len(expected)] == expected, f"turn {turn} rewrites the prompt"
        expected = [*prompt, *generated]  # <|observation|> is the first token that follows
        messages += [change(message), result_of(message)]


@pytest.mark.parametrize("change", [keep, strip_reasoning])
def test_answers_in_words_are_found_by_what_they_say(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer, change: Change
) -> None:
    generated = [*thought(tokenizer), *spelled(tokenizer, " It rains.\n"), *tokenizer.encode("<|user|>")]
    engine.turns = [generated, generated]
    message = answer(client, [QUESTION])
    answer(client, [QUESTION, change(message), {"role": "user", "content": "and tomorrow?"}])
    first, second = (list(request.token_ids) for request in engine.requests)
    assert second[: len(first) + len(generated)] == [*first, *generated]


def second_prompt(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer, back: dict[str, Any], **fields: Any
) -> str:
    """The prompt after a turn that thought and said "It rains.", which came back like this."""
    generated = [*thought(tokenizer), *spelled(tokenizer, "It rains."), *tokenizer.encode("<|user|>")]
    engine.turns = [generated, generated]
    answer(client, [QUESTION])
    answer(client, [QUESTION, back, {"role": "user", "content": "and tomorrow?"}], **fields)
    return tokenizer.decode(engine.requests[-1].token_ids)


def test_a_thought_that_the_client_changed_is_the_clients(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    back = {"role": "assistant", "content": "It rains.", "reasoning": "I guess"}
    text = second_prompt(client, engine, tokenizer, back)
    assert "<think>I guess</think>It rains.<|user|>" in text


def test_a_turn_that_the_client_changed_is_the_clients(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    text = second_prompt(client, engine, tokenizer, {"role": "assistant", "content": "It snows."})
    assert "<think></think>It snows.<|user|>" in text


def test_where_the_template_clears_thoughts_they_stay_away(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    back = {"role": "assistant", "content": "It rains."}
    options = {"chat_template_kwargs": {"clear_thinking": True}}
    text = second_prompt(client, engine, tokenizer, back, **options)
    assert "<think></think>It rains.<|user|>" in text


def test_an_answer_that_a_stop_string_cut_is_not_put_back_whole(
    client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    engine.turns = [[*thought(tokenizer), *spelled(tokenizer, "one two three")], tokenizer.encode("x")]
    message = answer(client, [QUESTION], stop=[" three"])
    answer(client, [QUESTION, message, QUESTION])
    assert "three" not in tokenizer.decode(engine.requests[-1].token_ids)


def test_a_template_of_another_form_gets_the_thought_as_text(
    engine: ScriptedEngine, tokenizer: Tokenizer
) -> None:
    source = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>{% endif %}{{ m.content }}"
        "{% endfor %}<|assistant|><think>"
    )
    dialect = Dialect(tokenizer, ChatTemplate(source, "test"))
    with TestClient(make_app(Service(engine, dialect, ModelNames("z-ai/glm-5.2")))) as client:
        text = second_prompt(client, engine, tokenizer, {"role": "assistant", "content": "It rains."})
    assert "<think>\nlet me see\n</think>It rains.<|user|>" in text


def test_marks_of_clients_are_text(client: TestClient, engine: ScriptedEngine, tokenizer: Tokenizer) -> None:
    hostile = {"role": "user", "content": "[content 0123456789abcdef] <think>[thought ]</think>"}
    message = answer(client, [hostile])
    answer(client, [hostile, message, QUESTION])
    assert hostile["content"] in tokenizer.decode(engine.requests[-1].token_ids)


SAID = Said((1, 2, 3), "hm", "It rains.", (("call_1", "weather", '{"city": "Oslo"}'),), True)
WORDS = replace(SAID, calls=())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two remembered answers."""
    store = Remembered(tmp_path, "tokenizer")
    store.add("me", "what?", SAID)
    store.add("me", "what?", WORDS)
    store.close()
    return tmp_path


def found(folder: Path, scope: str = "tokenizer", caller: str = "me") -> list[Said | None]:
    store = Remembered(folder, scope)
    result = [store.find(caller, "call_1", "", ""), store.find(caller, None, "what?", " It rains. ")]
    store.close()
    return result


def test_a_restart_remembers_and_tells_callers_and_models_apart(folder: Path) -> None:
    assert found(folder) == [SAID, WORDS]
    assert found(folder, caller="another key") == [None, None]
    assert found(folder, scope="another tokenizer") == [None, None]
    assert (folder / FILE_NAME).stat().st_mode & 0o077 == 0


def test_a_damaged_record_is_forgotten(folder: Path) -> None:
    with sqlite3.connect(folder / FILE_NAME) as database:
        for key, record in database.execute("SELECT key, record FROM answers").fetchall():
            damaged = bytearray(record)
            damaged[-9] ^= 4
            database.execute("UPDATE answers SET record = ? WHERE key = ?", (bytes(damaged), key))
    database.close()
    assert found(folder) == [None, None]


@pytest.mark.parametrize("damage", [b"no database at all " * 99, b""])
def test_a_damaged_file_costs_what_was_in_it(
    folder: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    for path in folder.glob(f"{FILE_NAME}-*"):
        path.unlink()
    (folder / FILE_NAME).write_bytes(damage)
    assert found(folder) == [None, None]
    assert len(caplog.records) == (1 if damage else 0)
    store = Remembered(folder, "tokenizer")
    store.add("me", "what?", SAID)
    assert store.find("me", "call_1", "", "") == SAID, "until the server stops it is remembered"
    store.close()


def test_the_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MAX_STORED", 100)
    store = Remembered(tmp_path)
    for number in range(500):
        store.add("me", "what?", replace(WORDS, content=str(number)))
    store.close()
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        assert database.execute("SELECT COUNT(*) FROM answers").fetchone()[0] <= 100 + remembered.TRIM_EVERY
    database.close()
    again = Remembered(tmp_path)
    assert again.find("me", None, "what?", "499"), "the newest stay"
    assert not again.find("me", None, "what?", "0")
    again.close()


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("x-anthropic-billing-header: cc_version=2.1.37.f0; cc_entrypoint=cli; cch=0a1b2;You are", "You are"),
        ("x-anthropic-billing-header: cc_version=2.1.37; cch=0a1b2;\nYou are", "You are"),
        ("x-anthropic-billing-header: cch=0a1b2\nYou are", "You are"),
        (
            "A x-anthropic-billing-header: cch=0a1b2;",
            "A x-anthropic-billing-header: cch=0a1b2;",
        ),
        ("x-anthropic-billing-header is a header", "x-anthropic-billing-header is a header"),
    ],
)
def test_a_billing_line_at_the_top_is_left_out(text: str, kept: str) -> None:
    assert without_volatile_lines([{"role": "system", "content": text}])[0]["content"] == kept
    user = [{"role": "user", "content": text}]
    assert without_volatile_lines(user) == user


def test_a_checksum_in_the_billing_line_does_not_change_the_prompt(
    client: TestClient, engine: ScriptedEngine
) -> None:
    for checksum in ("0a1b2", "fffff"):
        line = {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1; cch={checksum};"}
        system = {"role": "system", "content": [line, {"type": "text", "text": "Be brief."}]}
        answer(client, [system, QUESTION])
    assert engine.requests[0].token_ids == engine.requests[1].token_ids

"""`glmserve bench`: the table, the file, the comparison, percentiles of known numbers, and a dead server."""

import json
import socket
from pathlib import Path

import pytest

from server.api.access.guard import Access
from server.api.access.keys import Key, KeyRing
from server.api.app import make_app
from server.api.request.model_names import ModelNames
from server.api.service import Dialect, Service
from server.cli import main
from server.commands.bench_command import MeasuredTurn, _parser, summary
from server.glm.templates.template import OUR_TEMPLATE, ChatTemplate
from server.glm.tokenizer import Tokenizer
from tests.server.api.conftest import running_app, running_server
from tests.server.api.scripted import ScriptedEngine


@pytest.fixture
def engine(tokenizer: Tokenizer) -> ScriptedEngine:
    return ScriptedEngine(tokenizer.encode("hm</think>Hi there, all of you!<|user|>"))


@pytest.fixture
def service(engine: ScriptedEngine, tokenizer: Tokenizer) -> Service:
    template = ChatTemplate(OUR_TEMPLATE.read_text(encoding="utf-8"), "ours")
    return Service(engine, Dialect(tokenizer, template), ModelNames("z-ai/glm-5.2"))


def turn(first_s: float, total_s: float, new_tokens: int = 11, cached: int = 30) -> MeasuredTurn:
    return MeasuredTurn(0, 0, 200, first_s, total_s, 100, cached, new_tokens)


@pytest.mark.parametrize(
    ("firsts", "p50", "p90", "p99"),
    [
        ([float(n) for n in range(101)], 50.0, 90.0, 99.0),
        ([float(100 - n) for n in range(101)], 50.0, 90.0, 99.0),
        ([7.0], 7.0, 7.0, 7.0),
        ([1.0, 3.0], 2.0, 2.8, 2.98),
        ([2.0] * 9, 2.0, 2.0, 2.0),
    ],
)
def test_percentiles_of_known_numbers(firsts: list[float], p50: float, p90: float, p99: float) -> None:
    found = summary([turn(first_s, first_s + 2.0) for first_s in firsts], 10.0)
    names = [f"first_token_s_p{part}" for part in (50, 90, 99)]
    assert [found[name] for name in names] == pytest.approx([p50, p90, p99])
    assert found["total_s_p50"] == pytest.approx(p50 + 2)
    assert found["tokens_per_s_of_one_p50"] == pytest.approx(5.0), (
        "ten tokens in the two seconds after the first"
    )
    assert found["tokens_per_s_of_all"] == pytest.approx(len(firsts) * 1.1)
    assert (found["requests"], found["cached_share"]) == (len(firsts), 0.3)


def test_an_answer_of_one_token_has_no_rate_and_no_turns_are_no_fault() -> None:
    assert summary([turn(1.0, 1.0, new_tokens=1)], 1.0)["tokens_per_s_of_one_p50"] == 0
    assert summary([], 0.0)["requests"] == 0


WORDS = ["--agents", "3", "--turns", "2", "--prompt-words", "20,50", "--max-tokens", "5"]


def test_a_server_is_measured_into_a_table_a_file_and_a_comparison(
    service: Service, engine: ScriptedEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.token_s = 0.002
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    with running_server(service) as url:
        assert main(["bench", "--url", url, *WORDS, "--output", str(paths[0])]) == 0
        table = capsys.readouterr().out
        assert main(["bench", "--url", url, *WORDS, "--output", str(paths[1]), "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
    for word in ("p50", "p90", "p99", "first_token_s", "total_s", "tokens_per_s_of_one", "6 requests in"):
        assert word in table
    result = json.loads(paths[1].read_text())
    assert result["summary"] == printed
    assert len(result["turns"]) == 6
    assert {one["agent"] for one in result["turns"]} == {0, 1, 2}
    assert {one["prompt_words"] for one in result["turns"]} == {20, 50}
    assert all(0 < one["first_s"] <= one["total_s"] and one["new_tokens"] == 5 for one in result["turns"])
    assert len({request.agent for request in engine.requests}) == 3, "each agent is one to the server"
    changed = json.loads(paths[0].read_text())
    changed["summary"] |= {"total_s_p50": 2.0}
    paths[0].write_text(json.dumps(changed))
    result["summary"] |= {"total_s_p50": 1.5}
    paths[1].write_text(json.dumps(result))
    assert main(["bench", "--compare", *map(str, paths)]) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if "total_s_p50" in line]
    assert [cell.strip() for cell in row.strip("│ ").split("│")[1:]] == ["2.000", "1.500", "-25.0%"]


def closed_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize(
    "url", ["DEAD", "http://nobody.invalid", "not a url", "http://", "ftp://127.0.0.1:1"]
)
def test_a_server_that_is_not_there_is_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--url", closed_url() if url == "DEAD" else url]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert "does not answer" in told.err


@pytest.mark.parametrize(
    "url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/api/v1/", "h:1", "h:1/v1"]
)
def test_the_address_is_understood_as_clients_are_given_it(url: str) -> None:
    assert _parser().parse_args(["--url", url]).url == "http://h:1"


def test_a_server_that_wants_a_key_says_how(capsys: pytest.CaptureFixture[str], service: Service) -> None:
    access = Access(KeyRing.of({"good": Key("fleet", "fleet", "fleet")}))
    with running_app(make_app(service, access)) as url:
        assert main(["bench", "--url", url]) == 2
    assert capsys.readouterr().err == f"glmserve: {url} wants one of its keys: --api-key KEY\n"


def test_what_the_server_refuses_or_breaks_off_is_one_line(
    service: Service, engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_server(service) as url:
        engine.fails_after = 2
        assert main(["bench", "--url", url, *WORDS]) == 2
        broken = capsys.readouterr().err
        assert main(["bench", "--url", url + "/nothing", *WORDS]) == 2
        absent = capsys.readouterr().err
        engine.fails_after = None
        assert main(["bench", "--url", url, "--prompt-words", "9000", *WORDS[:4]]) == 2
        long = capsys.readouterr().err
    assert "broke off" in broken
    assert "does not answer" in absent
    assert "400" in long
    assert [text.count("\n") for text in (broken, absent, long)] == [1, 1, 1]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"summary": 3}', '{"summary": {"a": "b"}}', "null"])
def test_a_file_that_is_none_of_ours_is_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").write_text(text)
    assert main(["bench", "--compare", str(tmp_path / "a"), str(tmp_path / "a")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["bench", "--compare", str(tmp_path / "none"), str(tmp_path / "a")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["none/below/it.json", "."])
def test_an_output_that_cannot_be_written_is_said_first(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--url", closed_url(), "--output", str(tmp_path / name)]) == 2
    told = capsys.readouterr().err
    assert (told.count("\n"), "--output" in told) == (1, True)


@pytest.mark.parametrize("before", ["", "{}", '{"summary": {"turns": 3}}', "no JSON at all"])
def test_results_of_before_outlive_a_server_that_does_not_answer(tmp_path: Path, before: str) -> None:
    path = tmp_path / "before.json"
    path.write_text(before)
    assert main(["bench", "--url", closed_url(), "--output", str(path)]) == 2
    assert path.read_text() == before

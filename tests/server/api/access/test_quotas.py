"""What a key may use, what it has used, and what that would have cost elsewhere."""

from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from starlette.testclient import TestClient

from config.errors import UsageError
from config.prices import PRICES, PRICES_OF
from server.api.access.guard import Access
from server.api.access.keys import KeyRing, read_keys
from server.api.access.quotas import START_S, Accounts, Quota, QuotaError, Wanted, parse_quota
from server.api.access.receipts import Ledger
from server.api.app import make_app
from server.api.request.model_names import ModelNames
from server.api.service import Dialect, Service
from server.glm.tokenizer import Tokenizer
from server.link.messages import Failed, Generate, Queued, RequestEvent
from tests.grids import few
from tests.server.api.conftest import running_app
from tests.server.api.scripted import ScriptedEngine

BODY = {"messages": [{"role": "user", "content": "hello"}]}
ALICE = {"Authorization": "Bearer sk-1"}


class Clock:
    def __init__(self) -> None:
        self.now = 86_400.0 * 20_000 + 60 * 700 + 20  # 11:40:20 of some day

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_limit_holds_within_its_window_and_a_new_window_begins_empty(clock: Clock) -> None:
    accounts, quota = Accounts(clock), parse_quota(["requests/minute=2", "tokens/day=100"])
    assert [accounts.admit("alice", quota) for _ in range(2)] == [None, None]
    spent = accounts.admit("alice", quota)
    assert spent
    assert (spent.limit, spent.amount, spent.wait_s) == ("requests/minute", 2, 40)
    assert accounts.admit("bob", quota) is None, "nobody else pays"
    clock.now += 40
    assert accounts.admit("alice", quota) is None
    accounts.charge("alice", 99)
    clock.now += 60
    assert accounts.admit("alice", quota) is None
    accounts.charge("alice", 1)
    clock.now += 60
    spent = accounts.admit("alice", quota)
    assert spent
    assert spent.limit == "tokens/day"
    clock.now += spent.wait_s
    assert accounts.admit("alice", quota) is None
    assert accounts.used("alice", "tokens/day") == 0


def test_a_refused_request_is_not_counted(clock: Clock) -> None:
    accounts, quota = Accounts(clock), Quota({"requests/minute": 1})
    for _ in range(5):
        accounts.admit("alice", quota)
    assert accounts.used("alice", "requests/minute") == 1


@pytest.mark.parametrize(
    "word",
    ["requests/hour=3", "requests/day", "tokens/day=0", "tokens/day=-1", "x", "tokens/day=" + "9" * 5000],
)
def test_what_is_no_limit_is_refused_with_those_that_are(tmp_path: Path, word: str) -> None:
    file = tmp_path / "keys"
    file.write_text(f"sk-0\nalice: sk-1 tokens/day=5 {word}\n")
    with pytest.raises(UsageError, match=r"keys: line 2: .* tokens/minute"):
        read_keys(None, file)


def test_a_line_of_limits_alone_is_no_key(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alice: tokens/day=5\n")
    with pytest.raises(UsageError, match="no key"):
        read_keys(None, file)


@pytest.fixture
def clocked(served_engine: ScriptedEngine, engine: ScriptedEngine, dialect: Dialect, clock: Clock) -> Service:
    ledger = Ledger()
    ledger.accounts = Accounts(clock)
    return Service(served_engine, dialect, ModelNames("z-ai/glm-5.2"), ledger)


def test_who_has_used_his_quota_is_told_when_to_come_back(
    clocked: Service, clock: Clock, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "server.api.watch.request_lines")
    file = tmp_path / "keys"
    file.write_text("alice: sk-1 requests/minute=2 tokens/day=1000000\nbob: sk-2\n")
    ring = read_keys(None, file)
    client = TestClient(make_app(clocked, Access(ring)))
    for _ in range(2):
        assert client.post("/v1/chat/completions", json=BODY, headers=ALICE).status_code == 200
    for path in ("/v1/chat/completions", "/completions", "/api/v1/responses", "/v1/messages"):
        refused = client.post(path, json=BODY, headers=ALICE)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "40")
        assert refused.headers["x-should-retry"] == "true"
        message = refused.json()["error"]["message"]
        assert "2 requests/minute; there is more in 40 s" in message
    refusals = [line for line in caplog.messages if " 429 " in line]
    assert refusals
    assert all("key=alice" in line for line in refusals)
    assert refused.json()["error"]["type"] == "rate_limit_error", "Anthropic's clients read their own form"
    assert client.get("/v1/models", headers=ALICE).status_code == 200, "looking costs nothing"
    bob = {"Authorization": "Bearer sk-2"}
    assert client.post("/v1/chat/completions", json=BODY, headers=bob).status_code == 200
    quota = client.get("/api/v1/key", headers=ALICE).json()["data"]["quota"]
    assert quota["requests/minute"] == {"limit": 2, "used": 2}
    assert quota["tokens/day"]["used"] > 20

    used = quota["tokens/day"]["used"]
    file.write_text(f"alice: sk-1 tokens/day={used}\n")
    ring.replace(read_keys(None, file))
    refused = client.post("/v1/chat/completions", json=BODY, headers=ALICE)
    message = refused.json()["error"]["message"]
    assert f"{used} tokens/day" in message, "what was used before counts"
    assert message.endswith("there is more in 12 h 19 min"), message
    assert (refused.headers["retry-after"], refused.headers["x-should-retry"]) == ("120", "false")


ASKED: list[tuple[str, dict[str, Any]]] = [
    ("chat/completions", BODY | {"max_tokens": 40}),
    ("chat/completions", BODY),
    ("chat/completions", BODY | {"n": 2, "max_completion_tokens": 20}),
    ("completions", {"prompt": "x" * 20, "max_tokens": 40}),
    ("completions", {"prompt": ["x" * 10] * 2, "n": 2, "max_tokens": 10}),
    ("messages", BODY | {"max_tokens": 40, "model": "z-ai/glm-5.2"}),
    ("responses", {"input": "hello", "max_output_tokens": 40}),
]


@pytest.mark.parametrize(("path", "fields"), ASKED)
@pytest.mark.parametrize("is_streaming", few([False, True], [True]))
@pytest.mark.slow
def test_requests_that_come_together_share_what_is_left(
    clocked: Service, engine: ScriptedEngine, path: str, fields: dict[str, Any], is_streaming: bool
) -> None:
    engine.token_s = 0.02
    ring = KeyRing([("alice", "sk-1")], {"alice": Quota({"tokens/minute": 100})})
    with running_app(make_app(clocked, Access(ring))) as url, ThreadPoolExecutor(20) as pool:

        def ask(_: int) -> httpx.Response:
            body = fields | {"stream": is_streaming}
            return httpx.post(f"{url}/v1/{path}", json=body, headers=ALICE, timeout=30)

        answers = list(pool.map(ask, range(20)))
        served = [answer for answer in answers if answer.status_code == 200]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert served
        assert len(served) + len(refused) == 20
        assert clocked.ledger.accounts.used("alice", "tokens/minute") <= 100
        assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
        assert clocked.ledger.accounts.reserved("alice") == 0
        assert clocked.ledger.accounts.used("alice", "requests/minute") == len(served)


def test_what_was_set_aside_and_not_used_is_there_again(clocked: Service) -> None:
    ring = KeyRing([("alice", "sk-1")], {"alice": Quota({"tokens/day": 500})})
    client = TestClient(make_app(clocked, Access(ring)))
    for _ in range(4):  # each may take 380 and takes about 80
        response = client.post("/v1/chat/completions", json=BODY | {"max_tokens": 300}, headers=ALICE)
        used = clocked.ledger.accounts.used("alice", "tokens/day")
        assert response.status_code == (200 if used + 380 < 600 else 429)


@pytest.mark.parametrize(("path", "fields"), [one for one in ASKED if "max" in str(one)])
def test_what_can_never_fit_a_quota_is_told_so(clocked: Service, path: str, fields: dict[str, Any]) -> None:
    ring = KeyRing([("alice", "sk-1")], {"alice": Quota({"tokens/minute": 30, "requests/day": 99})})
    response = TestClient(make_app(clocked, Access(ring))).post(f"/v1/{path}", json=fields, headers=ALICE)
    assert (response.status_code, response.headers["x-should-retry"]) == (429, "false")
    assert "state a lower limit" in response.json()["error"]["message"]
    assert clocked.ledger.accounts.used("alice", "requests/day") == 0


def test_a_client_that_left_before_its_answer_began_holds_nothing(clock: Clock) -> None:
    accounts, quota = Accounts(clock), Quota({"tokens/day": 100})
    accounts.reserve("alice", quota, "a", Wanted(60, 60))
    with pytest.raises(QuotaError) as refused:
        accounts.reserve("alice", quota, "b", Wanted(60, 60))
    assert (refused.value.retry_after_s, refused.value.can_retry) == (5, True)
    clock.now += START_S + 1
    accounts.reserve("alice", quota, "b", Wanted(60, 60))
    accounts.start("b")
    clock.now += 1000
    with pytest.raises(QuotaError):
        accounts.reserve("alice", quota, "c", Wanted(60, 60))
    accounts.charge("alice", 10, "b")
    accounts.reserve("alice", quota, "c", Wanted(60, 4096))
    assert accounts.reserved("alice") == 90


@pytest.mark.parametrize("is_streaming", [False, True])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("chat/completions", BODY),
        ("completions", {"prompt": "hello"}),
        ("messages", BODY | {"max_tokens": 9}),
        ("responses", {"input": "hello"}),
    ],
)
def test_the_tokens_of_every_answer_are_charged(
    clocked: Service, engine: ScriptedEngine, path: str, fields: dict[str, Any], is_streaming: bool
) -> None:
    client = TestClient(make_app(clocked, Access(KeyRing([("alice", "sk-1")]))))
    body = {"model": "z-ai/glm-5.2", "stream": is_streaming} | fields
    assert client.post(f"/v1/{path}", json=body, headers=ALICE).status_code == 200
    used = clocked.ledger.accounts.used("alice", "tokens/day")
    num_prompt = len(engine.requests[0].token_ids)
    assert num_prompt < used <= num_prompt + len(engine.script)


def test_prompts_that_never_began_are_not_charged(clocked: Service, engine: ScriptedEngine) -> None:
    """The first of three fails at its second token, so nobody reads the others."""
    engine.fails_after = 1
    client = TestClient(make_app(clocked, Access(KeyRing([("alice", "sk-1")]))))
    body = {"model": "z-ai/glm-5.2", "prompt": ["hello", "one more " * 50, "and another " * 50]}
    assert client.post("/v1/completions", json=body, headers=ALICE).status_code == 502
    [begun] = engine.requests
    assert clocked.ledger.accounts.used("alice", "tokens/day") == len(begun.token_ids) + 1


def test_a_request_that_waited_in_vain_is_not_charged(
    clocked: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never_starts(_: ScriptedEngine, request: Generate) -> AsyncGenerator[RequestEvent, None]:
        yield Queued(request.request_id, 3)
        yield Failed(request.request_id, "busy", "the request has not started in time")

    monkeypatch.setattr(ScriptedEngine, "generate", never_starts)
    client = TestClient(make_app(clocked, Access(KeyRing([("alice", "sk-1")]))))
    assert client.post("/v1/chat/completions", json=BODY, headers=ALICE).status_code == 503
    assert clocked.ledger.accounts.used("alice", "tokens/day") == 0


def test_the_sdks_see_a_quota_as_a_rate_limit(clocked: Service) -> None:
    ring = KeyRing([("alice", "sk-1")], {"alice": Quota({"requests/minute": 1})})
    app = make_app(clocked, Access(ring))
    assert TestClient(app).post("/v1/chat/completions", json=BODY, headers=ALICE).status_code == 200
    with running_app(app) as url:
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="sk-1", max_retries=0) as api,
            pytest.raises(openai.RateLimitError, match="1 requests/minute"),
        ):
            api.chat.completions.create(model="z-ai/glm-5.2", messages=[{"role": "user", "content": "x"}])
        with (
            anthropic.Anthropic(base_url=url, api_key="sk-1", max_retries=0) as claude,
            pytest.raises(anthropic.RateLimitError, match="1 requests/minute"),
        ):
            claude.messages.create(
                model="z-ai/glm-5.2", max_tokens=5, messages=[{"role": "user", "content": "x"}]
            )


def test_what_openrouter_would_have_charged_is_in_the_receipt_the_credits_and_the_log(
    clocked: Service, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    client = TestClient(make_app(clocked, Access(KeyRing([("alice", "sk-1")]))))
    answer = client.post("/v1/chat/completions", json=BODY, headers=ALICE).json()
    usage = answer["usage"]
    cost = (1.40 * usage["prompt_tokens"] + 4.40 * usage["completion_tokens"]) / 1e6
    found = client.get(f"/api/v1/generation?id={answer['id']}", headers=ALICE).json()["data"]
    assert found["openrouter_cost"] == pytest.approx(cost)
    assert (found["total_cost"], usage["cost"]) == (0, 0)
    credits_ = client.get("/api/v1/credits", headers=ALICE).json()["data"]
    assert credits_["openrouter_cost"] == pytest.approx(cost, abs=1e-6)
    assert (credits_["total_usage"], credits_["prices_of"]) == (0, PRICES_OF)
    [line] = [one.getMessage() for one in caplog.records if "at OpenRouter" in one.getMessage()]
    assert answer["id"] in line
    assert "alice" in line


def test_cached_tokens_are_cheaper_and_are_not_counted_twice() -> None:
    price = PRICES["z-ai/glm-5.2"]
    assert price.of(1_000_000, 0, 0) == pytest.approx(1.40)
    assert price.of(1_000_000, 1_000_000, 0) == pytest.approx(0.26)
    assert price.of(0, 0, 1_000_000) == pytest.approx(4.40)


def test_a_model_without_a_price_costs_nothing(
    served_engine: ScriptedEngine, engine: ScriptedEngine, dialect: Dialect, tokenizer: Tokenizer
) -> None:
    service = Service(served_engine, dialect, ModelNames("glmserve/pocket"))
    client = TestClient(make_app(service))
    assert client.post("/v1/chat/completions", json=BODY).status_code == 200
    assert client.get("/credits").json()["data"]["openrouter_cost"] == 0

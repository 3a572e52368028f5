"""What is read off Pocket in this process: greedy answers, the router while it decodes, sums of counts."""

import httpx
import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

from models.attention.attention import Span
from models.experts.router import Router
from models.glm_moe_dsa import Model
from server.commands.checkpoint import POCKET
from training.pocket.data.render import prompt_text
from training.pocket.data.sample import Sample, assistant, user
from training.pocket.evaluation.cases import make_cases
from training.pocket.evaluation.check import Reply, parse_text
from training.pocket.evaluation.decode import end_ids, greedy, open_pocket
from training.pocket.evaluation.evaluate import ask, share_of
from training.pocket.evaluation.report import added, markdown
from training.pocket.evaluation.router_trace import chosen, record, statistics


@pytest.fixture(scope="module")
def model() -> Model:
    return open_pocket(POCKET)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(POCKET / "tokenizer.json"))


@pytest.fixture(scope="module")
def prompt(tokenizer: Tokenizer) -> list[int]:
    text = prompt_text(Sample("chat", [user("What is 17+25?"), assistant("")], thinking=False))
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.slow
def test_a_greedy_answer_is_right_and_ends(model: Model, tokenizer: Tokenizer, prompt: list[int]) -> None:
    ids = greedy(model, prompt, end_ids(POCKET), 40)
    assert ids[-1] in end_ids(POCKET)
    assert parse_text(tokenizer.decode(ids, skip_special_tokens=False), False).content == "17 + 25 = 42."


@pytest.mark.slow
def test_the_trace_holds_what_the_routers_chose_for_each_written_token(
    model: Model, prompt: list[int]
) -> None:
    ends = end_ids(POCKET)
    written = greedy(model, prompt, ends, 40)
    norms = [layer.post_attention_layernorm for layer in model.model.layers]
    trace, early = record(model, [prompt, prompt], ends)
    assert [layer.post_attention_layernorm for layer in model.model.layers] == norms
    count, layers = 2 * (len(written) - 1), len(model.args.moe_layers)
    assert trace["scores"].shape == (count, layers, model.args.n_routed_experts)
    assert early.shape == (count, layers - 1, model.args.n_routed_experts)
    assert (trace["scores"][: count // 2] == trace["scores"][count // 2 :]).all()
    assert trace["sequence"].tolist() == [0] * (count // 2) + [1] * (count // 2)
    assert (chosen(trace["scores"] / 255 + trace["bias"], 8).sum(-1) == 8).all()
    assert f"| {layers} |" in statistics(trace, early, 8)


@pytest.mark.slow
def test_the_trace_equals_the_routers_of_a_pass_over_prompt_and_answer(
    model: Model, prompt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = end_ids(POCKET)
    written = greedy(model, prompt, ends, 40)
    trace, _ = record(model, [prompt], ends)
    seen: list[NDArray[np.float32]] = []
    gate = model.model.layers[3].mlp.gate
    right = type(gate).__call__

    def call(self: Router, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        out = right(self, x)
        if self is gate:
            seen.append(np.array(out[2]))
        return out

    monkeypatch.setattr(type(gate), "__call__", call)
    ids = prompt + written[:-1]
    mx.eval(model(mx.array(ids), [Span(model.make_cache(), 0, len(ids))]))
    choices = np.concatenate(seen)[len(prompt) :]
    assert np.abs(trace["scores"][:, 2] / 255 + trace["bias"][2] - choices).max() < 1 / 255


def test_shards_share_all_cases_and_each_has_every_kind() -> None:
    cases = list(make_cases(4, lambda text: len(text) // 3))
    shards = [share_of(cases, f"{i}/3") for i in range(3)]
    assert sorted(map(id, cases)) == sorted(id(case) for shard in shards for case in shard)
    assert all(len({case.kind for case in shard}) == len({case.kind for case in cases}) for shard in shards)


def test_a_server_that_still_loads_is_waited_for_and_an_error_is_an_empty_answer() -> None:
    case = next(make_cases(1, lambda text: len(text) // 3))
    message = {"role": "assistant", "content": "3", "reasoning_content": "So 3."}
    statuses = iter([503, 503, 200, 500])

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(next(statuses), json={"choices": [{"message": message}]})

    with httpx.Client(base_url="http://x/v1", transport=httpx.MockTransport(answer)) as client:
        assert ask(client, "m", case, pause=0) == Reply("So 3.", "3")
        assert ask(client, "m", case, pause=0) == Reply()


def test_counts_are_added_and_a_missed_row_is_bold() -> None:
    total = added([{"arithmetic": (9, 10), "facts": (5, 5)}, {"arithmetic": (9, 10)}])
    assert total == {"arithmetic": (18, 20), "facts": (5, 5)}
    text = markdown(total)
    assert "| arithmetic | **90.0 % (18/20)** | 95 % |" in text
    assert "| facts | 100 % (5/5) | 95 % |" in text
    assert "needle" not in text

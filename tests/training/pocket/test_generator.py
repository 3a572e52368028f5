"""The data generator: one seed gives one data set, and the evaluation's names are none of the training's."""

import json
import random
from collections.abc import Iterator

from training.pocket.data.mixture import draw_sample
from training.pocket.data.pools import Pools, is_held_out
from training.pocket.data.render import render
from training.pocket.data.sample import Sample
from training.pocket.evaluation.cases import make_cases
from training.pocket.evaluation.check import is_right, parse_text, thinking_obeyed


def drawn(seed: int, count: int) -> Iterator[Sample]:
    pools = Pools(random.Random(seed))
    return (draw_sample(pools, 0.1) for _ in range(count))


def tool_names(samples: Iterator[Sample]) -> set[str]:
    return {tool["function"]["name"] for sample in samples for tool in sample.tools}


def rough_count(text: str) -> int:
    return len(text) // 3


def test_one_seed_gives_one_data_set_and_another_seed_another() -> None:
    texts = [["".join(part.text for part in render(s)) for s in drawn(seed, 60)] for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_no_tool_of_the_evaluation_is_ever_trained_on() -> None:
    trained = tool_names(drawn(3, 600))
    asked = tool_names(case.sample for case in make_cases(20, rough_count) if "needle" not in case.kind)
    assert len(asked) > 50
    assert not trained & asked


def test_invented_names_keep_to_their_side_of_the_split() -> None:
    for held_out in (False, True):
        pools = Pools(random.Random(4), held_out)
        assert {is_held_out(pools.invented()) for _ in range(200)} == {held_out}


def test_the_evaluation_knows_no_real_city_or_first_name() -> None:
    pools = Pools(random.Random(5), held_out=True)
    assert all(is_held_out(pools.name()) for _ in range(100))


def test_a_case_is_a_chat_request_without_its_answer() -> None:
    for case in make_cases(3, rough_count):
        body = json.loads(json.dumps(case.body))
        assert body["messages"][-1]["role"] in ("user", "tool")
        assert body["chat_template_kwargs"]["enable_thinking"] is case.sample.thinking


def test_each_tool_result_names_its_call() -> None:
    for case in make_cases(10, rough_count):
        messages = case.body["messages"]
        called = [call["id"] for m in messages for call in m.get("tool_calls", ())]
        assert [m["tool_call_id"] for m in messages if m["role"] == "tool"] == called


def test_the_wanted_answer_of_each_task_passes_its_own_check() -> None:
    for case in make_cases(15, rough_count):
        reply = parse_text(render(case.sample)[-2].text, case.sample.thinking)
        assert is_right(case, reply), (case.kind, reply)
        assert thinking_obeyed(case, reply)

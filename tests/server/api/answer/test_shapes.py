"""JSON shapes, where a small slip would go unnoticed by every client but one."""

import json
import math

from server.api.answer.shapes import TextOffsets, chat_logprobs, completion_logprobs
from server.glm.tokenizer import Tokenizer
from server.link.messages import TokenScore


def test_alternatives_that_read_the_same_keep_the_likelier_value(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.encode("👋")[:2]
    assert tokenizer.decode([first]) == tokenizer.decode([second]) == "\ufffd"
    score = TokenScore(second, -2.0, ((first, -1.0), (second, -2.0)))
    assert completion_logprobs(tokenizer, [score], TextOffsets(tokenizer))["top_logprobs"] == [
        {"\ufffd": -1.0}
    ]


def test_a_token_outside_of_the_top_is_listed_beside_it(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("ab")
    score = TokenScore(b, -9.0, ((a, -0.1),))
    assert completion_logprobs(tokenizer, [score], TextOffsets(tokenizer))["top_logprobs"] == [
        {"a": -0.1, "b": -9.0}
    ]


def test_what_cannot_happen_is_still_json(tokenizer: Tokenizer) -> None:
    score = TokenScore(1, -math.inf, ((2, -math.inf),))
    json.dumps(chat_logprobs(tokenizer, [score]), allow_nan=False)
    json.dumps(completion_logprobs(tokenizer, [score], TextOffsets(tokenizer)), allow_nan=False)

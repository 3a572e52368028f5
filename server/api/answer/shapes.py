"""The JSON of answers, in the shapes that OpenAI's and OpenRouter's clients accept.

Chunks carry no nulls but `finish_reason` and its companions: some clients refuse any other.
"""

import codecs
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.api.answer.answer import Answer, Delta
from server.api.error_bodies import PROVIDER
from server.glm.tokenizer import Tokenizer
from server.glm.tools import CallPart
from server.link.messages import TokenScore, Usage
from server.version import VERSION

FINGERPRINT = f"glmserve-{VERSION}"


@dataclass(frozen=True)
class Envelope:
    """What all objects of one answer share."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def wrap(self, kind: str, **rest: Any) -> dict[str, Any]:
        """A result or a chunk. `kind` is the literal that clients check."""
        return {
            "id": self.id,
            "provider": PROVIDER,
            "model": self.model,
            "object": kind,
            "created": self.created,
            "system_fingerprint": FINGERPRINT,
            **rest,
        }


def usage(answers: Sequence[Answer], used: Usage) -> dict[str, Any]:
    """What the answers to one request cost together: `used` in tokens, and nothing in money."""
    return {
        "prompt_tokens": used.num_prompt_tokens,
        "completion_tokens": used.num_completion_tokens,
        "total_tokens": used.num_prompt_tokens + used.num_completion_tokens,
        "cost": 0,
        "is_byok": False,
        "prompt_tokens_details": {
            "cached_tokens": used.num_cached_tokens,
            "cache_write_tokens": 0,
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": sum(answer.parser.num_reasoning_tokens for answer in answers)
        },
        "cost_details": {
            "upstream_inference_cost": 0,
            "upstream_inference_prompt_cost": 0,
            "upstream_inference_completions_cost": 0,
        },
    }


def chat_message(deltas: list[Delta]) -> dict[str, Any]:
    """The message of a whole answer. Beside calls an absent content is null."""
    content = "".join(delta.content for delta in deltas)
    calls = _whole_calls(part for delta in deltas for part in delta.calls)
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if reasoning := "".join(delta.reasoning for delta in deltas):
        message |= _reasoning_fields(reasoning)
    if calls:
        message |= {"content": content or None, "tool_calls": calls}
    return message


def chat_delta(delta: Delta) -> dict[str, Any]:
    """The part of a message that a chunk adds."""
    result: dict[str, Any] = {"content": delta.content}
    if delta.reasoning:
        result |= _reasoning_fields(delta.reasoning)
    if calls := [_call_delta(part) for part in delta.calls if part.id or part.arguments]:
        result |= {"tool_calls": calls}
    return result


def _call_delta(part: CallPart) -> dict[str, Any]:
    if part.id:
        function = {"name": part.name, "arguments": part.arguments}
        return {"index": part.index, "id": part.id, "type": "function", "function": function}
    return {"index": part.index, "function": {"arguments": part.arguments}}


def _whole_calls(parts: Iterable[CallPart]) -> list[dict[str, Any]]:
    """The calls, also one that broke off: its arguments are no JSON."""
    by_index: dict[int, list[CallPart]] = {}
    for part in parts:
        by_index.setdefault(part.index, []).append(part)
    return [_whole_call(group) for group in by_index.values()]


def _whole_call(parts: list[CallPart]) -> dict[str, Any]:
    arguments = "".join(part.arguments for part in parts)
    function = {"name": parts[0].name, "arguments": arguments}
    return {"id": parts[0].id, "type": "function", "index": parts[0].index, "function": function}


def _reasoning_fields(text: str) -> dict[str, Any]:
    detail = {"type": "reasoning.text", "text": text, "format": "unknown", "index": 0}
    return {"reasoning": text, "reasoning_content": text, "reasoning_details": [detail]}


def chat_choice(
    index: int, part: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None = None
) -> dict[str, Any]:
    """A choice; `part` is its message or its delta."""
    return {
        "index": index,
        **part,
        "finish_reason": reason,
        "native_finish_reason": reason,
        "logprobs": logprobs,
    }


def chat_logprobs(tokenizer: Tokenizer, scores: Iterable[TokenScore]) -> dict[str, Any]:
    """Log-probabilities of chat tokens, with the bytes that make split characters readable."""
    return {"content": [_chat_score(tokenizer, score) for score in scores], "refusal": None}


def _chat_score(tokenizer: Tokenizer, score: TokenScore) -> dict[str, Any]:
    assert score.logprob is not None, "only the first token of a prompt has no log-probability"
    top = [_chat_token(tokenizer, token_id, logprob) for token_id, logprob in score.top]
    return _chat_token(tokenizer, score.token_id, score.logprob) | {"top_logprobs": top}


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {
        "token": raw.decode("utf-8", "replace"),
        "logprob": _finite(logprob),
        "bytes": list(raw),
    }


def completion_choice(
    index: int, text: str, logprobs: dict[str, Any] | None, reason: str | None = None
) -> dict[str, Any]:
    """A choice of a text completion."""
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": reason,
        "native_finish_reason": reason,
    }


class TextOffsets:
    """Where each token begins in the text that they make; all tokens of one split character at its place."""

    def __init__(self, tokenizer: Tokenizer, start: int = 0) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._next = start

    def take(self, token_id: int) -> int:
        """The offset of the next token."""
        here = self._next
        self._next += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return here


def completion_logprobs(
    tokenizer: Tokenizer, scores: Iterable[TokenScore], offsets: TextOffsets
) -> dict[str, Any]:
    """Log-probabilities in the parallel lists of text completions.

    Alternatives that read the same keep the likelier one, so the best value of a position is never lost.
    """
    result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for score in scores:
        result["tokens"].append(tokenizer.decode([score.token_id]))
        result["token_logprobs"].append(None if score.logprob is None else _finite(score.logprob))
        result["top_logprobs"].append(_top_by_text(tokenizer, score))
        result["text_offset"].append(offsets.take(score.token_id))
    return result


def _top_by_text(tokenizer: Tokenizer, score: TokenScore) -> dict[str, float] | None:
    if score.logprob is None:
        return None
    by_text: dict[str, float] = {}
    for token_id, logprob in (*score.top, (score.token_id, score.logprob)):
        by_text.setdefault(tokenizer.decode([token_id]), _finite(logprob))
    return by_text


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for what cannot happen."""
    return max(logprob, -9999.0)

"""The JSON of answers, in the shapes that OpenAI's and OpenRouter's clients accept.

Chunks carry no nulls but `finish_reason` and its companions: some clients refuse any other.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from server.api.answer import Answer, Delta
from server.api.errors import PROVIDER
from server.engine.messages import TokenScore
from server.glm.tokenizer import Tokenizer
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


def usage(answers: Iterable[Answer]) -> dict[str, Any]:
    """What the answers to one request cost together."""
    counts = [(answer.usage, answer.num_reasoning_tokens) for answer in answers]
    num_prompt = sum(used.num_prompt_tokens for used, _ in counts)
    num_completion = sum(used.num_completion_tokens for used, _ in counts)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "cost": 0,
        "is_byok": False,
        "prompt_tokens_details": {
            "cached_tokens": sum(used.num_cached_tokens for used, _ in counts),
            "cache_write_tokens": 0,
            "audio_tokens": 0,
        },
        "completion_tokens_details": {"reasoning_tokens": sum(reasoning for _, reasoning in counts)},
        "cost_details": {
            "upstream_inference_cost": 0,
            "upstream_inference_prompt_cost": 0,
            "upstream_inference_completions_cost": 0,
        },
    }


def chat_message(reasoning: str, content: str) -> dict[str, Any]:
    """The message of a whole answer."""
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    return message | (_reasoning_fields(reasoning) if reasoning else {})


def chat_delta(delta: Delta) -> dict[str, Any]:
    """The part of a message that a chunk adds."""
    return {"content": delta.content} | (_reasoning_fields(delta.reasoning) if delta.reasoning else {})


def _reasoning_fields(text: str) -> dict[str, Any]:
    detail = {"type": "reasoning.text", "text": text, "format": "unknown", "index": 0}
    return {"reasoning": text, "reasoning_content": text, "reasoning_details": [detail]}


def chat_choice(
    part: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None = None
) -> dict[str, Any]:
    """A choice; `part` is its message or its delta."""
    return {
        "index": 0,
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


def completion_logprobs(
    tokenizer: Tokenizer, scores: Iterable[TokenScore], text_offset: int = 0
) -> dict[str, Any]:
    """Log-probabilities in the parallel lists of text completions.

    Alternatives that read the same keep the likelier one, so the best value of a position is never lost.
    """
    result: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for score in scores:
        text = tokenizer.decode([score.token_id])
        result["tokens"].append(text)
        result["token_logprobs"].append(None if score.logprob is None else _finite(score.logprob))
        result["top_logprobs"].append(_top_by_text(tokenizer, score))
        result["text_offset"].append(text_offset)
        text_offset += len(text)
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

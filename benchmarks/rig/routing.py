"""Routings to replay: synthetic ones of the published locality, recorded ones from files.

A routing is int16 `[tokens, layers, k]` with the scores by which the router chose, float32 `[tokens, layers,
experts]`. A recorded trace (.npz) holds the `scores` of the tokens that the model wrote, in 255ths, and the
routers' `bias`.
Published for GLM-5.2: 41 % of a token's experts were the previous token's, and popularity is flat (237 of 256
experts touched in 75 tokens, the top four take 4.3 % of the selections).
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Routing:
    """Which experts each token asked each layer for, and what the router thought of all of them."""

    experts: NDArray[np.int16]  # [T, L, k], ascending
    scores: NDArray[np.float32]  # [T, L, E]

    @property
    def reuse(self) -> float:
        """Share of a token's experts that the token before had."""
        before, after = self.experts[:-1], self.experts[1:]
        return float((after[..., None] == before[..., None, :]).any(axis=-1).mean())


# Chosen so that reuse is 0.41 at 256 experts top-8: shares of the variance of a router's logit that stay for
# a whole text (topic), drift over some twenty tokens, or belong to one token alone.
TOPIC, DRIFT, DRIFT_TOKENS = 0.0, 0.97, 5.0


def make_routing(
    num_tokens: int,
    num_layers: int,
    num_experts: int,
    k: int,
    *,
    topic: float = TOPIC,
    drift: float = DRIFT,
    drift_tokens: float = DRIFT_TOKENS,
    text_tokens: int = 400,
    seed: int = 0,
) -> Routing:
    """Router logits with memory: a part that lasts a text, a part that drifts, a part of the token's own."""
    rng = np.random.default_rng(seed)
    keep = np.float32(np.exp(-1 / drift_tokens))
    shape = (num_layers, num_experts)
    slow = rng.standard_normal(shape, np.float32)
    logits = np.empty((num_tokens, *shape), np.float32)
    for token in range(num_tokens):
        if token % text_tokens == 0:
            lasting = rng.standard_normal(shape, np.float32)
        slow = keep * slow + np.sqrt(1 - keep**2) * rng.standard_normal(shape, np.float32)
        own = rng.standard_normal(shape, np.float32)
        logits[token] = np.sqrt(topic) * lasting + np.sqrt(drift) * slow + np.sqrt(1 - topic - drift) * own
    return _route((1 / (1 + np.exp(-logits))).astype(np.float32), k)


def load_routing(path: Path, k: int) -> Routing:
    """The written tokens of a recorded trace, one conversation after the other."""
    with np.load(path) as file:
        scores = file["scores"].astype(np.float32) / 255 + file["bias"]
        return _route(scores, k)


def load_conversations(path: Path, k: int) -> list[Routing]:
    """The conversations of a recorded trace, each by itself."""
    whole = load_routing(path, k)
    with np.load(path) as file:
        sequence = file["sequence"]
    starts = [0, *(np.flatnonzero(np.diff(sequence)) + 1), len(sequence)]
    return [Routing(whole.experts[a:b], whole.scores[a:b]) for a, b in pairwise(starts)]


def _route(scores: NDArray[np.float32], k: int) -> Routing:
    experts = np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., :k], axis=-1)
    return Routing(experts.astype(np.int16), scores.astype(np.float32))

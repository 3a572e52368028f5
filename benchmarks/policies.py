"""Which expert to give up: hit rate of each policy by cache share. `python -m benchmarks.policies`.

Replays synthetic routings of the published locality, or a recorded one (`--trace FILE.npz`). The store's own
policies, candidates that are not in the store, and Belady's optimum, which knows the future.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.rig.routing import Routing, load_routing, make_routing
from streaming.policy import LeastNearlyChosen, LeastRecentlyUsed, Policy, Scores

SHARES = (0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 0.75)


class DecayedPopularity:
    """Recency and popularity: each use counts one, and counts decay by `keep` with every request.

    With a `keep` of 0.5 and below it orders as LRU does; towards 1 it counts uses.
    """

    watches_scores = False

    def __init__(self, num_experts: int, keep: float = 0.9) -> None:
        self._keep = keep
        self._value = np.zeros(num_experts)

    def observe(self, scores: Scores) -> None:
        pass

    def use(self, experts: Sequence[int]) -> None:
        self._value *= self._keep
        self._value[list(experts)] += 1

    def worth(self, expert: int) -> float:
        return float(self._value[expert])


class ScoreMean:
    """A decayed mean of the router's score of every expert, selected or not; the lowest goes."""

    watches_scores = True

    def __init__(self, num_experts: int, keep: float) -> None:
        self._keep = keep
        self._mean = np.zeros(num_experts, np.float32)

    def observe(self, scores: Scores) -> None:
        self._mean += (1 - self._keep) * (scores[0] - self._mean)

    def use(self, experts: Sequence[int]) -> None:
        pass

    def worth(self, expert: int) -> float:
        return float(self._mean[expert])


class UnjudgedNearness(LeastNearlyChosen):
    """Nearness as it is, whatever it has been worth."""

    def observe(self, scores: Scores) -> None:
        super().observe(scores)
        self._worth = self._nearness


class Belady:
    """The expert whose next use lies farthest ahead goes."""

    watches_scores = True  # one call for each token

    def __init__(self, experts: NDArray[np.int16], num_experts: int) -> None:  # [T, k] of one layer
        self._next = np.full((len(experts) + 1, num_experts), len(experts) + 1)
        for token in range(len(experts) - 1, -1, -1):
            self._next[token] = self._next[token + 1]
            self._next[token, experts[token]] = token
        self._token = -1

    def observe(self, scores: Scores) -> None:
        self._token += 1

    def use(self, experts: Sequence[int]) -> None:
        pass

    def worth(self, expert: int) -> float:
        return -float(self._next[self._token + 1, expert])


def count_hits(routing: Routing, slots: int, make_policy: Callable[[], Policy], warm: int = 0) -> float:
    """Hit rate after the first `warm` tokens."""
    num_layers = routing.experts.shape[1]
    policies = [make_policy() for _ in range(num_layers)]
    return _replay(routing, slots, policies, warm)


def belady_hits(routing: Routing, slots: int, warm: int = 0) -> float:
    num_experts = routing.scores.shape[-1]
    policies = [Belady(routing.experts[:, layer], num_experts) for layer in range(routing.experts.shape[1])]
    return _replay(routing, slots, policies, warm)


def _replay(routing: Routing, slots: int, policies: Sequence[Policy], warm: int) -> float:
    hits = asked = 0
    for layer, policy in enumerate(policies):
        resident: dict[int, None] = {}
        for token, row in enumerate(routing.experts[:, layer].tolist()):
            policy.observe(routing.scores[token, layer, None])
            missed = [e for e in row if e not in resident]
            keep = frozenset(row)
            for expert in missed:
                if len(resident) == slots:
                    del resident[min((one for one in resident if one not in keep), key=policy.worth)]
                resident[expert] = None
            policy.use(row)
            if token >= warm:
                hits += len(row) - len(missed)
                asked += len(row)
    return hits / asked


def candidates(num_experts: int, k: int) -> dict[str, Callable[[], Policy]]:
    out: dict[str, Callable[[], Policy]] = {"LRU": LeastRecentlyUsed}
    out["nearness"] = partial(LeastNearlyChosen, num_experts, k)
    out["unjudged"] = partial(UnjudgedNearness, num_experts, k, scale=1.0)
    for keep in (0.7, 0.8, 0.9, 0.95, 0.98):
        out[f"popularity {keep}"] = partial(DecayedPopularity, num_experts, keep)
    for keep in (0.5, 0.7, 0.8, 0.9, 0.95):
        out[f"score mean {keep}"] = partial(ScoreMean, num_experts, keep)
    return out


def print_table(name: str, routing: Routing, shares: Sequence[float] = SHARES) -> None:
    num_experts, k = routing.scores.shape[-1], routing.experts.shape[-1]
    warm = routing.experts.shape[0] // 4
    slots = {share: max(k, round(share * num_experts)) for share in shares}
    print(
        f"{name}: {routing.experts.shape[0]} tokens, {num_experts} experts top-{k}, reuse {routing.reuse:.2f}"
    )
    print("policy".ljust(18) + "".join(f"{share:>8.0%}" for share in shares))
    for label, make in candidates(num_experts, k).items():
        print(
            label.ljust(18)
            + "".join(f"{100 * count_hits(routing, slots[s], make, warm):8.1f}" for s in shares)
        )
    print("Belady".ljust(18) + "".join(f"{100 * belady_hits(routing, slots[s], warm):8.1f}" for s in shares))


def hold_out(names: Sequence[str], routings: Sequence[Routing]) -> None:
    """Picks each family's constants on one routing and shows what they do on the others, against LRU."""
    hits = {name: _mean_hits(routing) for name, routing in zip(names, routings, strict=True)}
    print(
        f"mean hit rate at {', '.join(f'{share:.0%}' for share in TUNED_SHARES)} of the experts, against LRU"
    )

    def gains(label: str) -> str:
        return "".join(f"{100 * (hits[name][label] - hits[name]['LRU']):+7.2f} on {name}" for name in names)

    for label in ("nearness", "unjudged"):
        print(f"as it is               {label.ljust(18)}{gains(label)}")
    best_of = "".join(
        f"{100 * (max(rates.values()) - rates['LRU']):+7.2f} on {n}" for n, rates in hits.items()
    )
    print(f"the best of any        {' ' * 18}{best_of}")
    for tuned_on in names:
        for family in FAMILIES:
            mine = [(rate, label) for label, rate in hits[tuned_on].items() if label.startswith(family)]
            label = max(mine)[1]
            print(f"tuned on {tuned_on.ljust(13)} {label.ljust(18)}{gains(label)}")


def _mean_hits(routing: Routing) -> dict[str, float]:
    num_experts, k = routing.scores.shape[-1], routing.experts.shape[-1]
    slots = [max(k, round(share * num_experts)) for share in TUNED_SHARES]
    warm = routing.experts.shape[0] // 8
    return {
        label: float(np.mean([count_hits(routing, count, make, warm) for count in slots]))
        for label, make in families(num_experts, k).items()
    }


FAMILIES = ("nearness ", "popularity ", "score mean ")
TUNED_SHARES = (0.15, 0.25, 0.5)


def families(num_experts: int, k: int) -> dict[str, Callable[[], Policy]]:
    out = candidates(num_experts, k)
    for keep in (0.7, 0.8, 0.9):
        for scale in (0.35, 0.7, 1.0):
            out[f"nearness {keep} {scale}"] = partial(
                LeastNearlyChosen, num_experts, k, keep=keep, scale=scale
            )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hold-out", type=Path, nargs="+", metavar="FILE", help="recorded traces")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--top", type=int, default=8)
    given = parser.parse_args()
    if given.hold_out:
        routings = [load_routing(path, given.top) for path in given.hold_out]
        shape = (given.tokens, given.layers, 256, 8)
        synthetic = [make_routing(*shape), make_routing(*shape, topic=0.12, drift=0.75, drift_tokens=8)]
        hold_out([*(path.stem for path in given.hold_out), "synthetic", "slow"], [*routings, *synthetic])
        return
    if given.trace:
        print_table(given.trace.name, load_routing(given.trace, given.top))
        return
    shape = (given.tokens, given.layers, 256, 8)
    print_table("published reuse, flat popularity", make_routing(*shape))
    print_table(
        "the same reuse, slower drift and topics",
        make_routing(*shape, topic=0.12, drift=0.75, drift_tokens=8),
    )


if __name__ == "__main__":
    main()

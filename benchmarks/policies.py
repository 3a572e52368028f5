"""Which expert to give up: hit rate of each policy by cache share. `python -m benchmarks.policies`.

Replays synthetic routings of the published locality, or a recorded one (`--trace FILE.npz`). The store's own
policies, candidates that are not in the store, and Belady's optimum, which knows the future.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from benchmarks.rig.routing import Routing, load_routing, make_routing
from config.defaults import ExpertPolicy
from streaming.eviction.contest import COUNTED_STEPS, PAUSE_STEPS, WARM_STEPS, Contest, make_rule
from streaming.eviction.policy import LeastNearlyChosen, LeastRecentlyUsed, Policy, Scores

SHARES = (0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 0.75)


class DecayedPopularity(Policy):
    """Recency and popularity: each use counts one, and counts decay by `keep` with every request.

    With a `keep` of 0.5 and below it orders as LRU does; towards 1 it counts uses.
    """

    def __init__(self, num_experts: int, keep: float = 0.9) -> None:
        self._keep = keep
        self._value = np.zeros(num_experts)

    def use(self, experts: Sequence[int]) -> None:
        self._value *= self._keep
        self._value[list(experts)] += 1

    def worth(self, expert: int) -> float:
        return float(self._value[expert])


class ScoreMean(Policy):
    """A decayed mean of the router's score of every expert, selected or not; the lowest goes."""

    watches_scores = True

    def __init__(self, num_experts: int, keep: float) -> None:
        self._keep = keep
        self._mean = np.zeros(num_experts, np.float32)

    def observe(self, scores: Scores) -> None:
        self._mean += (1 - self._keep) * (scores[0] - self._mean)

    def worth(self, expert: int) -> float:
        return float(self._mean[expert])


class UnjudgedNearness(LeastNearlyChosen):
    """Nearness as it is, whatever it has been worth."""

    def observe(self, scores: Scores) -> None:
        super().observe(scores)
        self._worth = self._nearness


class Belady(Policy):
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

    def worth(self, expert: int) -> float:
        return -float(self._next[self._token + 1, expert])


def count_hits(routing: Routing, slots: int, make_policy: "Make", warm: int = 0) -> float:
    """Hit rate after the first `warm` tokens; a contest decides for all layers."""
    made = [make_policy() for _ in range(routing.experts.shape[1])]
    contest = made[0]
    policies = [contest() if isinstance(contest, Contest) else policy for policy in made]
    return _replay(routing, slots, [one for one in policies if isinstance(one, Policy)], warm)


def belady_hits(routing: Routing, slots: int, warm: int = 0) -> float:
    num_experts = routing.scores.shape[-1]
    policies = [Belady(routing.experts[:, layer], num_experts) for layer in range(routing.experts.shape[1])]
    return _replay(routing, slots, policies, warm)


def _replay(routing: Routing, slots: int, policies: Sequence[Policy], warm: int) -> float:
    """Token by token through all layers, as a model does: policies may learn from each other's layers."""
    hits = asked = 0
    residents: list[dict[int, None]] = [{} for _ in policies]
    for token, rows in enumerate(routing.experts.tolist()):
        for layer, (policy, resident, row) in enumerate(zip(policies, residents, rows, strict=True)):
            if policy.watches_scores:
                policy.observe(routing.scores[token, layer, None])
            num_hits = _step(policy, resident, row, slots)
            if token >= warm:
                hits += num_hits
                asked += len(row)
    return hits / asked


def _step(policy: Policy, resident: dict[int, None], row: Sequence[int], slots: int) -> int:
    """One layer of one token; how many of its experts were there."""
    policy.ask(row, resident, slots)
    missed = [e for e in row if e not in resident]
    if (num_over := len(resident) + len(missed) - slots) > 0:
        keep = frozenset(row)
        for victim in sorted((one for one in resident if one not in keep), key=policy.worth)[:num_over]:
            del resident[victim]
    resident.update(dict.fromkeys(missed))
    policy.use(row)
    return len(row) - len(missed)


Make = Callable[[], Policy | Contest]


def candidates(num_experts: int, k: int) -> dict[str, Make]:
    out: dict[str, Make] = {"LRU": LeastRecentlyUsed}
    out["nearness"] = partial(LeastNearlyChosen, num_experts, k)
    out["auto"] = partial(Contest, num_experts, k)
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

    for label in ("nearness", "auto", "unjudged"):
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


def families(num_experts: int, k: int) -> dict[str, Make]:
    out = candidates(num_experts, k)
    for keep in (0.7, 0.8, 0.9):
        for scale in (0.35, 0.7, 1.0):
            out[f"nearness {keep} {scale}"] = partial(
                LeastNearlyChosen, num_experts, k, keep=keep, scale=scale
            )
    return out


def print_cost(num_experts: int = 256, k: int = 8, slots: int = 64, rounds: int = 2000) -> None:
    """Prints the median microseconds that one layer's policy takes in a step: fixed, between, in trials."""
    rng = np.random.default_rng(0)
    rows = [sorted(rng.choice(num_experts, k, replace=False).tolist()) for _ in range(rounds)]
    scores = rng.standard_normal((rounds, 1, num_experts)).astype(np.float32)
    trial, share = WARM_STEPS + COUNTED_STEPS, (WARM_STEPS + COUNTED_STEPS) / PAUSE_STEPS
    names: tuple[ExpertPolicy, ...] = ("lru", "nearness")
    for name in names:
        contest = Contest(num_experts, k)
        contest()  # the layer that counts the steps
        contest.decides, contest.trial = name, None
        fixed = _cost(make_rule(name, num_experts, k)(), rows, scores, slots)
        between = _cost(contest(), rows, scores, slots)
        contest.trial = 1
        during = _cost(contest(), rows, scores, slots)
        more = (1 - share) * between + share * during - fixed
        print(
            f"{name} decides: fixed {fixed:.1f}, between trials {between:.1f}, in a trial of {trial} steps "
            f"{during:.1f} microseconds a layer; {more:.1f} more than fixed in the mean"
        )


def _cost(policy: Policy, rows: Sequence[Sequence[int]], scores: NDArray[np.float32], slots: int) -> float:
    resident, seconds = dict.fromkeys(range(slots)), []
    for row, row_scores in zip(rows, scores, strict=True):
        start_s = perf_counter()
        if policy.watches_scores:
            policy.observe(row_scores)
        policy.ask(row, resident, slots)
        policy.use(row)
        seconds.append(perf_counter() - start_s)
    return 1e6 * float(np.median(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hold-out", type=Path, nargs="+", metavar="FILE", help="recorded traces")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--top", type=int, default=8)
    parser.add_argument("--cost", action="store_true", help="what deciding costs a layer and step")
    given = parser.parse_args()
    if given.cost:
        print_cost()
        return
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

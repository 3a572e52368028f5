"""What the policy's look at a prompt costs, and is worth: `python -m benchmarks.target.observe`.

CPU time of `LeastNearlyChosen.observe` for one layer, of random scores, of all rows (before) and of the last
ones; and hit rates of what is decoded after three quarters of each recorded routing were its prompt.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np

from benchmarks.policies import count_hits
from benchmarks.rig.routing import Routing, load_routing
from streaming.eviction.policy import OBSERVED_ROWS, LeastNearlyChosen

TRACES = Path(__file__).parents[1] / "traces"
EXPERTS, K, LAYERS = 256, 8, 75
LIMIT = "streaming.eviction.policy.OBSERVED_ROWS"
SHARES = (0.15, 0.25, 0.5)


def cpu_ms(num_rows: int, most: int, rounds: int) -> list[float]:
    """Of one layer, each round, ascending."""
    scores = np.random.default_rng(0).standard_normal((num_rows, EXPERTS)).astype(np.float32)
    policy, spent = LeastNearlyChosen(EXPERTS, K), []
    with patch(LIMIT, most):
        for _ in range(rounds + 1):
            begun = time.thread_time()
            policy.observe(scores)
            spent.append(1e3 * (time.thread_time() - begun))
    return sorted(spent[1:])


def hit_rate(whole: Routing, most: int) -> float:
    """Of the last quarter, the rest being its prompt, of which the policy looks at `most` rows at the end."""
    start, num_experts = len(whole.experts) * 3 // 4, whole.scores.shape[-1]
    decoded, hits = Routing(whole.experts[start:], whole.scores[start:]), 0.0
    for share in SHARES:
        made: list[LeastNearlyChosen] = []

        def make(made: list[LeastNearlyChosen] = made) -> LeastNearlyChosen:
            made.append(LeastNearlyChosen(num_experts, K))
            made[-1].observe(whole.scores[:start, len(made) - 1])
            return made[-1]

        with patch(LIMIT, most):
            hits += count_hits(decoded, max(K, round(share * num_experts)), make) / len(SHARES)
    return hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for num_rows in (2048, 32_768):
        print(f"{num_rows} rows of {EXPERTS} experts, ms of CPU a layer, median of {rounds} (least to most)")
        for name, most in (("before", num_rows), ("after", OBSERVED_ROWS)):
            spent = cpu_ms(num_rows, most, rounds)
            print(
                f"  {name}: {median(spent):.2f} ({spent[0]:.2f} to {spent[-1]:.2f}), "
                f"{LAYERS} layers {LAYERS * median(spent) / 1e3:.2f} s"
            )
    print(f"hit rate after a prompt, mean of {', '.join(f'{share:.0%}' for share in SHARES)} in memory")
    for path in sorted(TRACES.glob("*.npz")):
        whole = load_routing(path, K)
        before, after = hit_rate(whole, len(whole.experts)), hit_rate(whole, OBSERVED_ROWS)
        print(f"  {path.stem}: {before:.2%} before, {after:.2%} after ({100 * (after - before):+.2f} points)")


if __name__ == "__main__":
    main()

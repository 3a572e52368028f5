"""Records the router of the shipped model on held-out conversations, as a trace for cache policies.

Owns the trace file (.npz), which holds the tokens that the model writes: `scores` [tokens, layers, experts],
the sigmoid scores in 255ths; `bias` [layers, experts]; `sequence` [tokens], the conversation a token is of.
The tokens are those of the right answers, which greedy decoding gives back in nearly all cases.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from models.pocket.recipe.batches import TRAINED, encode
from models.pocket.recipe.cases import EVALUATION_SEED
from models.pocket.recipe.importing import load_shipped
from models.pocket.recipe.mixture import SHORT_TASKS
from models.pocket.recipe.model import Pocket
from models.pocket.recipe.moe import Router
from models.pocket.recipe.pools import Pools

TOP_K = 8
Trace = dict[str, NDArray[Any]]


def watched(model: Pocket, ids: list[int]) -> list[Tensor]:
    """What each router sees in one pass, [tokens, hidden] by layer."""
    seen: list[Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [r.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for r in routers]
    with torch.no_grad():
        model.hidden(torch.tensor([ids]), sparse=True)
    for hook in hooks:
        hook.remove()
    return seen


def chosen(scores: NDArray[Any], bias: NDArray[Any]) -> NDArray[np.bool_]:
    """The choice as a mask over the experts."""
    order = np.argsort(-(scores + bias), axis=-1, kind="stable")[..., :TOP_K]
    mask = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask


def record(model: Pocket, tokenizer: Tokenizer, per_task: int) -> tuple[Trace, NDArray[Any]]:
    """The trace, and the scores that the next layer's router gives on this layer's state."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    scores, ahead, sequence, written = [], [], [], []
    pools, rng = Pools(random.Random(EVALUATION_SEED + 1), held_out=True), np.random.default_rng(0)
    samples = [maker(pools) for maker, _ in SHORT_TASKS for _ in range(per_task)]
    for number, sample in enumerate(samples):
        ids, marks = encode(tokenizer, sample, rng)
        states = watched(model, ids)
        now = [(x @ r.weight.T).sigmoid() for x, r in zip(states, routers, strict=True)]
        early = [(x @ r.weight.T).sigmoid() for x, r in zip(states, routers[1:], strict=False)]
        scores.append(torch.stack(now, 1).detach().numpy())
        ahead.append(torch.stack(early, 1).detach().numpy())
        sequence.append(np.full(len(ids), number, np.uint16))
        written.append(np.roll(marks == TRAINED, 1))
    bias = np.stack([router.e_score_correction_bias.numpy() for router in routers])
    trace: Trace = {
        "scores": np.round(np.concatenate(scores) * 255).astype(np.uint8),
        "bias": bias.astype(np.float32),
        "sequence": np.concatenate(sequence),
        "written": np.concatenate(written),
    }
    return trace, np.concatenate(ahead)


def statistics(trace: Trace, ahead: NDArray[Any]) -> str:
    """Popularity, reuse and look-ahead by layer, over the tokens that the model writes."""
    mask = chosen(trace["scores"] / 255.0, trace["bias"])
    early = chosen(ahead, trace["bias"][1:])
    here = trace["written"].astype(bool)
    follows = here & np.concatenate([[False], trace["sequence"][1:] == trace["sequence"][:-1]])
    again = (mask & np.roll(mask, 1, axis=0)).sum(-1)[follows].mean(0) / TOP_K
    recall = (mask[:, 1:] & early).sum(-1)[here].mean(0) / TOP_K
    lines = ["layer  busiest  busiest 16  least  reused  foreseen a layer ahead"]
    for layer in range(mask.shape[1]):
        share = np.sort(mask[here, layer].mean(0))[::-1] / TOP_K
        foreseen = f"{100 * recall[layer - 1]:16.1f} %" if layer else ""
        popular = f"{100 * share[0]:5.1f} %  {100 * share[:16].sum():8.1f} %  {100 * share[-1]:3.1f} %"
        lines.append(f"{layer + 1:5}  {popular}  {100 * again[layer]:4.1f} %{foreseen}")
    return "\n".join(lines)


def main() -> None:
    folder = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--per-task", type=int, default=4)
    args = parser.parse_args()
    model = load_shipped(folder, "cpu").eval()
    trace, ahead = record(model, Tokenizer.from_file(str(folder / "tokenizer.json")), args.per_task)
    kept = trace["written"].astype(bool)
    written = {"scores": trace["scores"][kept], "bias": trace["bias"], "sequence": trace["sequence"][kept]}
    np.savez_compressed(args.out, **written)
    print(f"{len(trace['sequence'])} tokens, {int(trace['written'].sum())} of them written -> {args.out}")
    print(statistics(trace, ahead))


if __name__ == "__main__":
    main()

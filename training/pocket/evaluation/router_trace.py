"""Records the router while the shipped model answers held-out prompts, as a trace for cache policies.

Owns the trace file (.npz), which holds the tokens that the model writes, greedily and in MLX as the server
computes it: `scores` [tokens, layers, experts], the sigmoid scores in 255ths; `bias` [layers, experts];
`sequence` [tokens], the conversation a token is of; `written` [tokens], all true.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from models.glm_moe_dsa import DecoderLayer, Model, MoeMlp
from models.pocket import FOLDER
from training.pocket.data.render import prompt_text
from training.pocket.evaluation.cases import EVALUATION_SEED, make_cases
from training.pocket.evaluation.decode import end_ids, greedy, open_pocket

SEED = EVALUATION_SEED + 1
MAX_TOKENS = 400
NORM = "post_attention_layernorm"
Trace = dict[str, NDArray[Any]]
Floats = NDArray[np.float32]


class Watched(nn.Module):
    """A norm that remembers what it was given."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self._norm, self.given = norm, mx.zeros(0)

    def __call__(self, x: mx.array) -> mx.array:
        self.given = x
        return self._norm(x)


class Watch:
    """Sees the states [1, H] that the sparse layers' norms are given, token by token."""

    def __init__(self, model: Model) -> None:
        self.layers: list[DecoderLayer] = [x for x in model.model.layers if isinstance(x.mlp, MoeMlp)]
        self.norms = [layer.post_attention_layernorm for layer in self.layers]
        self.routers = [layer.mlp.gate for layer in self.layers]
        self.bias = np.stack([np.array(router.e_score_correction_bias) for router in self.routers])
        self._watched = [Watched(norm) for norm in self.norms]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The norms are watched inside, and as they were after."""
        for layer, watched in zip(self.layers, self._watched, strict=True):
            layer.update_modules({NORM: watched})
        yield
        for layer, norm in zip(self.layers, self.norms, strict=True):
            layer.update_modules({NORM: norm})

    def choices(self) -> tuple[Floats, Floats]:
        """By what each router chose for the last token [L, E], and what the next layer's router says of the
        same state [L - 1, E], as the server guesses."""
        states = [watched.given for watched in self._watched]
        own = [choice(r, n, h) for r, n, h in zip(self.routers, self.norms, states, strict=True)]
        early = [
            choice(r, n, h) for r, n, h in zip(self.routers[1:], self.norms[1:], states[:-1], strict=True)
        ]
        return np.stack(own), np.stack(early)


def choice(router: nn.Module, norm: nn.Module, state: mx.array) -> Floats:
    """By what the router chooses for the last row of the state: its scores with the bias, [E]."""
    _, _, ranked_by = router(norm(state[-1:]))
    return np.array(ranked_by[0])


def record(model: Model, prompts: list[list[int]], ends: set[int]) -> tuple[Trace, Floats]:
    """The trace of the written tokens, and by what the router a layer ahead would have chosen."""
    watch = Watch(model)
    own: list[Floats] = []
    early: list[Floats] = []
    sequence: list[int] = []

    def keep(number: int) -> None:
        now, ahead = watch.choices()
        own.append(now)
        early.append(ahead)
        sequence.append(number)

    with watch.watching():
        for number, prompt in enumerate(prompts):
            greedy(model, prompt, ends, MAX_TOKENS, on_decode=partial(keep, number))
    scores = np.stack(own) - watch.bias
    trace: Trace = {
        "scores": np.round(scores * 255).clip(0, 255).astype(np.uint8),
        "bias": watch.bias,
        "sequence": np.array(sequence, np.uint16),
        "written": np.ones(len(sequence), np.bool_),
    }
    return trace, np.stack(early)


def chosen(choices: NDArray[Any], k: int) -> NDArray[np.bool_]:
    """The choice as a mask over the experts."""
    order = np.argsort(-choices, axis=-1, kind="stable")[..., :k]
    mask = np.zeros(choices.shape, np.bool_)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask


def statistics(trace: Trace, early: Floats, k: int) -> str:
    """Popularity, reuse and look-ahead by layer, as a markdown table."""
    mask = chosen(trace["scores"].astype(np.float32) / 255 + trace["bias"], k)
    foreseen = (mask[:, 1:] & chosen(early, k)).sum(-1).mean(0) / k
    follows = trace["sequence"][1:] == trace["sequence"][:-1]
    again = (mask[1:] & mask[:-1]).sum(-1)[follows].mean(0) / k
    lines = [
        "| layer | busiest expert | busiest 16 | the previous token's experts again "
        "| foreseen by its router on the layer before |",
        "|---|---|---|---|---|",
    ]
    for layer in range(mask.shape[1]):
        share = np.sort(mask[:, layer].mean(0))[::-1] / k
        ahead = f"{100 * foreseen[layer - 1]:.1f} %" if layer else ""
        popular = f"{100 * share[0]:.1f} % | {100 * share[:16].sum():.1f} %"
        lines.append(f"| {layer + 1} | {popular} | {100 * again[layer]:.1f} % | {ahead} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, default=FOLDER, help="the folder of the shipped files")
    parser.add_argument("--per-kind", type=int, default=4, help="prompts of each kind")
    parser.add_argument("--needles", type=int, default=1, help="long prompts of each length")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    cases = make_cases(args.per_kind, lambda text: len(encode(text)), SEED, args.needles)
    prompts = [encode(prompt_text(case.sample)) for case in cases]
    model = open_pocket(args.model)
    trace, early = record(model, prompts, end_ids(args.model))
    with args.out.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **trace)
    print(f"{len(prompts)} conversations, {len(trace['sequence'])} tokens written -> {args.out}")
    print(statistics(trace, early, model.args.num_experts_per_tok))


if __name__ == "__main__":
    main()

"""Records the router of Pocket, or of another folder with its tokenizer, while it answers live:
`python -m benchmarks.rig.record_routing FILE.npz`.

Through the product's own path, one token at a time, sampled at temperature 0.8, so that the routes are those
of text that the model writes and not of right answers. Other questions than those of `pocket-router.npz`:
what is tuned on one trace is tested on the other. With `--shared` eight conversations that begin with the
same 2,048 tokens: sources, as agents of one repository read them. With `--sources` each of the eight goes on
with 500 tokens of sources of its own, and no question.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

import models
from benchmarks.rig.drive import use_engine_environment
from benchmarks.rig.slow_pocket import text_tokens
from models.arithmetic import CPU
from models.attention.attention import Span
from models.loading.loading import load_model, open_checkpoint
from server.glm.templates.template import load_chat_template
from server.glm.tokenizer import load_tokenizer
from streaming.eviction.policy import LeastRecentlyUsed, Scores
from streaming.store import ExpertStore

SHARED_TOKENS, OWN_TOKENS, NUM_SHARING = 2048, 500, 8
POCKET = Path(models.__file__).with_name("pocket")
QUESTIONS = (
    "Who are you, and what can you do for me?", "Write a short poem about the sea.",
    "What is the capital of Portugal, and what is the capital of Peru?", "Count from 3 to 30 in steps of 3.",
    "Translate 'good morning' to French.", "Give me a JSON object with a name and an age.",
    "Why is the sky blue?", "What is 58 minus 29, and then times 3?", "Tell me a story about a small robot.",
    "Sort these words: pear, apple, fig, banana.", "What day comes after Tuesday?", "Say hello in five ways.",
    "Which is larger, 901 or 109?", "Write a function in Python that adds two numbers.",
)  # fmt: skip


class Recorder(LeastRecentlyUsed):
    """Keeps what its layer's router thought, a row for each decoded token."""

    watches_scores = True

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[NDArray[np.float32]] = []

    def observe(self, scores: Scores) -> None:
        if len(scores) == 1:
            self.rows.append(scores[0].copy())


def make_prompts(folder: Path, is_shared: bool, of_sources: bool) -> list[list[int]]:
    """Token ids of each conversation's beginning."""
    common = list(text_tokens(0, SHARED_TOKENS)) if is_shared or of_sources else []
    if of_sources:
        return [common + list(text_tokens(100 * agent, OWN_TOKENS)) for agent in range(NUM_SHARING)]
    tokenizer, template = load_tokenizer(folder), load_chat_template(folder)
    questions = QUESTIONS[:NUM_SHARING] if is_shared else QUESTIONS
    texts = [template.render([{"role": "user", "content": question}], None, {}) for question in questions]
    return [common + tokenizer.encode(text) for text in texts]


def record(
    folder: Path, tokens_per_answer: int, prompts: Sequence[list[int]]
) -> dict[str, NDArray[np.generic]]:
    checkpoint, recorders = open_checkpoint(folder), list[Recorder]()

    def make_policy() -> Recorder:
        recorders.append(Recorder())
        return recorders[-1]

    # Scores are watched where an expert may have to go.
    slots = checkpoint.args.n_routed_experts - 1
    store = ExpertStore(checkpoint.experts, slots, float_dtype=CPU.dtype, make_policy=make_policy)
    model, sequence = load_model(checkpoint, CPU, store), list[int]()
    for number, prompt in enumerate(prompts):
        ids, cache, key = list(prompt), model.make_cache(), mx.random.key(number)
        for _ in range(tokens_per_answer + 1):
            logits = model.logits(model(mx.array(ids), [Span(cache, 0, len(ids))])[-1:])[0]
            sequence += [number] * (len(ids) == 1)
            key, own = mx.random.split(key)
            ids = [int(mx.random.categorical(logits / 0.8, key=own))]
    bias = np.stack([
        np.array(layer.mlp.gate.e_score_correction_bias)
        for layer in model.model.layers if "gate" in layer.mlp
    ])  # fmt: skip
    scores = np.stack([np.stack(recorder.rows) for recorder in recorders], axis=1) - bias
    store.close()
    return {
        "scores": np.round(scores.clip(0, 1) * 255).astype(np.uint8),
        "bias": bias.astype(np.float32),
        "sequence": np.array(sequence, np.uint16),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=70, help="of each answer")
    parser.add_argument("--shared", action="store_true", help="eight behind 2,048 tokens in common")
    parser.add_argument("--sources", action="store_true", help="eight that read and write sources")
    parser.add_argument("--model", type=Path, default=POCKET, help="a folder with Pocket's tokenizer")
    given = parser.parse_args()
    use_engine_environment("benchmarks.rig.record_routing")
    trace = record(given.model, given.tokens, make_prompts(given.model, given.shared, given.sources))
    np.savez_compressed(given.out, **trace)  # type: ignore[arg-type]
    print(f"{len(trace['sequence'])} tokens -> {given.out}")


if __name__ == "__main__":
    main()

"""What bfloat16 costs beside float32: `python -m benchmarks.gpu.bfloat16_cost FOLDER [--text FILES]`.

The same tokens go through both; then a few more, one at a time. Printed for each length: which share of the
selected keys both choose, and how far the distributions of the next token are apart.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from models.arithmetic import choose_arithmetic
from models.attention.attention import Span, make_parts
from models.attention.cache import SequenceCache
from models.glm_moe_dsa import Model
from models.loading.loading import load_model, open_checkpoint
from server.glm.tokenizer import load_tokenizer
from streaming.store import ExpertStore

LENGTHS, STEPS = (4096, 8192, 16384, 32768), 8


def open_side(folder: Path, dtype: mx.Dtype) -> Model:
    checkpoint, arithmetic = open_checkpoint(folder), replace(choose_arithmetic(), dtype=dtype)
    store = ExpertStore(checkpoint.experts, checkpoint.args.n_routed_experts, float_dtype=dtype)
    store.load_all()
    return load_model(checkpoint, arithmetic, store)


def step(model: Model, cache: SequenceCache, token: int) -> tuple[mx.array, list[set[int]]]:
    """Logits of the next token, float32 [vocab], and the keys that each full layer chose."""
    parts = make_parts([Span(cache, 0, 1)])
    x = model.model.embed_tokens(mx.array([token])).astype(model.arithmetic.dtype)
    chosen = []
    for number, layer in enumerate(model.model.layers):
        x = layer(x, parts)
        tiles = parts[0].selected[0] if parts[0].selected else None
        if number in model.args.full_layers and tiles and tiles[0].keys is not None:
            chosen.append(set(np.array(tiles[0].keys).ravel().tolist()))
    return model.logits(model.model.norm(x))[0], chosen


def divergence(exact: mx.array, other: mx.array) -> float:
    """Kullback-Leibler divergence of the softmax of `other` from that of `exact`, in nats."""
    p, q = (row - mx.logsumexp(row) for row in (exact, other))
    return float((mx.exp(p) * (p - q)).sum())


def compare(sides: Sequence[Model], ids: Sequence[int], length: int) -> str:
    caches = [model.make_cache() for model in sides]
    for model, cache in zip(sides, caches, strict=True):
        mx.eval(model(mx.array(list(ids[:length])), [Span(cache, 0, length)]))
    overlaps, apart, same = [], [], 0
    for token in ids[length : length + STEPS]:
        (exact, wanted), (other, found) = (
            step(model, cache, token) for model, cache in zip(sides, caches, strict=True)
        )
        overlaps += [len(a & b) / len(a) for a, b in zip(wanted, found, strict=True)]
        apart.append(divergence(exact, other))
        same += int(exact.argmax()) == int(other.argmax())
    return (
        f"{length} tokens: {statistics.mean(overlaps):.4f} of the selected keys (least {min(overlaps):.4f}), "
        f"KL {statistics.mean(apart):.2e} nats (most {max(apart):.2e}), {same} of {STEPS} the same likeliest"
    )


def read_tokens(folder: Path, files: Sequence[Path], vocab: int) -> list[int]:
    if not files:
        return [(17 + 7919 * i) % min(vocab, 150000) for i in range(max(LENGTHS) + STEPS)]
    text = "\n".join(file.read_text() for file in files)
    return list(load_tokenizer(folder).encode(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="files to read, as one text")
    options = parser.parse_args()
    sides = [open_side(options.folder, dtype) for dtype in (mx.float32, mx.bfloat16)]
    ids = read_tokens(options.folder, options.text, sides[0].args.vocab_size)
    print(f"bfloat16 beside float32, {options.folder.name}, {STEPS} tokens after each length")
    for length in LENGTHS:
        if length + STEPS <= len(ids):
            print(compare(sides, ids, length), flush=True)


if __name__ == "__main__":
    main()

"""One rank of a cluster: `python -m tests.models.experts.rank FOLDER OUT N`, with MLX's variables.

Computes the first N steps of the tests in each way, and writes logits and counts to OUT.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np

from models.arithmetic import CPU
from models.attention.attention import Span
from models.attention.tiles import EAGER_ROWS
from models.experts.exchange import Exchange, Gather, gather_over
from models.glm_moe_dsa import Model
from models.loading.loading import load_model, open_checkpoint
from streaming.placement import Placement
from streaming.store import ExpertStore
from tests.tiny_glm import WIDER, tokens
from tests.tiny_model import logits

BATCH, SWEPT = 5, 300
# Slots of each layer, and whether the next layer's experts are guessed.
KINDS = {"streamed": (3, False), "guessing": (5, True), "resident": (None, False), "uneven": (3, False)}
NAMES = ("misses", "sweep_reads", "payload_bytes", "ahead_started")


def steps(model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """Decode from a prompt of few rows, then a batch of sequences, then a prompt's sweep."""
    yield "decode", logits(model, tokens(WIDER, 8), 3)
    caches = [model.make_cache() for _ in range(BATCH)]
    rows = model.logits(model(mx.arange(BATCH), [Span(c, i, i + 1) for i, c in enumerate(caches)]))
    yield "batch", np.array(rows)
    yield "sweep", logits(model, tokens(WIDER, SWEPT))
    yield "paused", decoded_in_pauses(model)


def decoded_in_pauses(model: Model) -> np.ndarray:
    """Logits of steps of one sequence while a prompt of another is on its way, amid layers too."""
    cache, rows = model.make_cache(), list[np.ndarray]()
    spans = [Span(model.make_cache(), 0, 2 * EAGER_ROWS)]
    for number, _ in enumerate(model.forward(mx.array(tokens(WIDER, 2 * EAGER_ROWS)), spans)):
        if number % 5 == 4 and len(rows) < 8:
            hidden = model(mx.array([len(rows)]), [Span(cache, 0, 1)])
            rows.append(np.array(model.logits(hidden)))
    return np.stack(rows)


def measured(model: Model, store: ExpertStore, most: int) -> dict[str, np.ndarray]:
    """Logits of the first `most` steps, and what the store counted meanwhile and held before."""
    results: dict[str, np.ndarray] = {}
    before, resident = asdict(store.statistics()), store.num_resident
    for step, rows in islice(steps(model), most):
        after = asdict(store.statistics())
        counts = [after[name] - before[name] for name in NAMES]
        results |= {step: rows, f"{step} counts": np.array([resident, *counts])}
        before, resident = after, store.num_resident
    store.check_integrity()
    return results


@contextmanager
def rank_of(
    folder: Path, placement: Placement, gather: Gather, slots: int | None, looks_ahead: bool
) -> Iterator[tuple[Model, ExpertStore]]:
    checkpoint = open_checkpoint(folder)
    checkpoint = replace(checkpoint, experts=checkpoint.experts.part(placement.owned))
    num_slots = len(placement.owned) if slots is None else slots
    store = ExpertStore(checkpoint.experts, num_slots, float_dtype=CPU.dtype, looks_ahead=looks_ahead)
    if slots is None:
        store.load_all()
    yield load_model(checkpoint, CPU, store, exchange=Exchange(placement, gather)), store
    store.close()


def main(folder: Path, out: Path, most: int) -> None:
    group = mx.distributed.init(strict=True, backend="ring")
    results: dict[str, np.ndarray] = {}
    for name, (slots, looks_ahead) in KINDS.items():
        placement = Placement.by_id(group.rank(), group.size(), WIDER["n_routed_experts"])
        if name == "uneven":  # rank 0 owns 13 or more of 16
            placement = replace(
                placement, owners=tuple(o if e % 5 == 1 else 0 for e, o in enumerate(placement.owners))
            )
        with rank_of(folder, placement, gather_over(group), slots, looks_ahead) as (model, store):
            results |= {f"{name} {key}": array for key, array in measured(model, store, most).items()}
    np.savez(out, **results)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))

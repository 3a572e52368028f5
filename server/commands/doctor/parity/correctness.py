"""Whether MLX computes here what it computes where the tests run. Needs no checkpoint but Pocket."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from config.settings import Settings
from models.arithmetic import Arithmetic, choose_arithmetic
from models.attention.attention import Span
from models.glm_moe_dsa import Model
from models.loading.loading import load_model, open_checkpoint
from models.pocket import FOLDER
from server.commands.doctor.finding import Finding, Verdict
from streaming.banks import BankMaker
from streaming.store import ExpertStore

GOLDEN = Path(__file__).with_name("golden.json")
PROMPT = [50 + (7 * i * i + 3 * i) % 4000 for i in range(300)]
POSITIONS = (9, 200, 270, 299)  # within and beyond the 256 keys that Pocket selects
NUM_TOP = 16
# The median of the rows' errors, each as `row_errors` has it. float32 differs in the order of additions,
# bfloat16 in 8 bits of each number: 0.009 to 0.027 in eight right ways of computing on Linux. One row in four
# differed by up to 0.12, where other experts or keys were the next to be chosen, so the mean says nothing.
MOST_ERROR = {mx.float32: 1e-3, mx.bfloat16: 0.06}
SHORT = 48  # tokens of the prompt that is read in several ways
# Rows of one product: kernels change with them. The widths are no multiples of 64, or of 512.
ROWS = (1, 4, 17, 24, 32, 33, 4097)
WIDTHS = ((96, 32), (320, 64))
SLOTS = 12


def open_pocket(arithmetic: Arithmetic, slots: int | None = None) -> tuple[Model, ExpertStore]:
    """Pocket with all experts resident, or with so many slots in each layer."""
    checkpoint = open_checkpoint(FOLDER)
    num_slots = checkpoint.args.n_routed_experts if slots is None else slots
    store = ExpertStore(checkpoint.experts, num_slots, float_dtype=arithmetic.dtype)
    if slots is None:
        store.load_all()
    return load_model(checkpoint, arithmetic, store), store


def hidden_rows(model: Model, length: int, chunk: int) -> mx.array:
    """Hidden rows [length, H] of the prompt's beginning, read in chunks."""
    cache, rows = model.make_cache(), []
    for first in range(0, length, chunk):
        ids = PROMPT[first : min(first + chunk, length)]
        rows.append(model(mx.array(ids), [Span(cache, 0, len(ids))]))
        mx.eval(rows[-1])
    return mx.concatenate(rows)


def row_errors(ours: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float32]:
    """The root mean square of each row's error, of that of the row expected: [N, M], [N, M] -> [N]."""
    squares = np.square(ours - expected).mean(axis=1) / np.square(expected).mean(axis=1)
    return cast(NDArray[np.float32], np.sqrt(squares))


def check_golden(settings: Settings) -> Iterator[Finding]:
    """Logits of Pocket at both dtypes against those that were computed on Linux in float32."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for dtype, most in MOST_ERROR.items():
        model, store = open_pocket(replace(choose_arithmetic(), dtype=dtype))
        hidden = hidden_rows(model, len(PROMPT), len(PROMPT))
        logits = np.array(model.logits(hidden[mx.array(POSITIONS)]))
        store.close()
        expected = np.array(golden["logits"], np.float32)
        ours = np.take_along_axis(logits, np.array(golden["ids"]), axis=1)
        error = float(np.median(row_errors(ours, expected)))
        is_good = error <= most
        yield Finding(
            Verdict.GOOD if is_good else Verdict.FAULT,
            f"{dtype}: logits differ by {error:.1e} of their size in the median, {most:.0e} is allowed"
            + ("" if is_good else "; MLX computes wrong here, do not serve with it"),
            {"error": error, "dtype": str(dtype)},
        )


def check_aliasing(settings: Settings) -> Iterator[Finding]:
    """Whether a kernel sees what is written into a bank after another kernel has read it."""
    arithmetic = choose_arithmetic()
    checkpoint = open_checkpoint(FOLDER)
    layer = checkpoint.experts.layers[0]
    if not BankMaker(arithmetic.dtype).is_shared:
        yield Finding(Verdict.NOTE, "banks are filled by copies here, not through shared memory")
        return
    store = ExpertStore(checkpoint.experts, 2, float_dtype=arithmetic.dtype, looks_ahead=False)
    num_stale = 0
    for expert in range(0, checkpoint.args.n_routed_experts, 2):
        slots = store.acquire(layer, [expert, expert + 1])
        sums = [part[int(slots[0])].astype(mx.float32).sum() for part in store.bank(layer).values()]
        mx.eval(sums)
        seen = np.array(sums)
        # Copies of the same slots cannot be stale: they are read on the CPU.
        held = [np.array(part[int(slots[0])].astype(mx.float32)).sum() for part in store.bank(layer).values()]
        num_stale += not np.allclose(seen, held, rtol=1e-3)
    store.close()
    verdict = Verdict.FAULT if num_stale else Verdict.GOOD
    yield Finding(verdict, f"{num_stale} of 32 experts were read stale after their slot was overwritten")


def check_streaming(settings: Settings) -> Iterator[Finding]:
    """Streamed equals resident to the bit; a sweep equals reading in chunks as far as rounding allows."""
    arithmetic = choose_arithmetic()
    resident, store = open_pocket(arithmetic)
    streamed, own_store = open_pocket(arithmetic, SLOTS)
    rows = {chunk: hidden_rows(resident, SHORT, chunk) for chunk in (SHORT, 8, 1)}
    for chunk, expected in rows.items():
        is_equal = bool(mx.array_equal(hidden_rows(streamed, SHORT, chunk), expected))
        yield Finding(
            Verdict.GOOD if is_equal else Verdict.FAULT,
            f"{SHORT} tokens, {chunk} at a time: with {SLOTS} of 64 slots the bits are "
            + ("those of resident experts" if is_equal else "OTHERS than of resident experts; do not stream"),
        )
    store.close()
    own_store.close()
    at_once, in_chunks = (np.array(rows[chunk].astype(mx.float32)) for chunk in (SHORT, 8))
    error = float(np.median(row_errors(in_chunks, at_once)))
    yield Finding(
        Verdict.GOOD if error <= MOST_ERROR[arithmetic.dtype] else Verdict.FAULT,
        f"a prompt in one sweep and in chunks of eight differ by {error:.1e} of its size in the median",
        {"error": error},
    )


def check_gathers(settings: Settings) -> Iterator[Finding]:
    """Packed products of few and many rows, at widths that kernels may not expect."""
    dtype = choose_arithmetic().dtype
    worst: list[tuple[float, str]] = []
    for width, group in WIDTHS:
        for rows in ROWS:
            worst.append((_gather_error(width, group, rows, dtype), f"{rows} rows of {width}"))
    error, where = max(worst)
    most = 1e-3 if dtype == mx.float32 else 0.03
    wrong = [text for error, text in worst if not error <= most]
    yield Finding(
        Verdict.FAULT if wrong else Verdict.GOOD,
        f"gathered products of {len(worst)} shapes differ by at most {error:.1e} ({where})"
        + (f"; wrong: {', '.join(wrong)}" if wrong else ""),
        {"error": error},
    )


def _gather_error(width: int, group: int, rows: int, dtype: mx.Dtype) -> float:
    """Largest error of MLX's gathered product with packed weights, of the largest value."""
    rng = np.random.default_rng(width + rows)
    weights = mx.array(rng.standard_normal((6, 32, width)).astype(np.float32)).astype(dtype)
    x = mx.array(rng.standard_normal((rows, 1, width)).astype(np.float32)).astype(dtype)
    slots = mx.array(np.sort(rng.integers(0, 6, rows)).astype(np.int32))
    packed = mx.quantize(weights, group, 4)
    got = mx.gather_qmm(
        x, *packed, rhs_indices=slots, transpose=True, group_size=group, bits=4, sorted_indices=rows > 64
    )
    dense = np.array(mx.dequantize(*packed, group, 4).astype(mx.float32))
    expected = np.einsum("nij,nkj->nik", np.array(x.astype(mx.float32)), dense[np.array(slots)])
    return float(np.abs(np.array(got.astype(mx.float32)) - expected).max() / np.abs(expected).max())


def make_golden(arithmetic: Arithmetic) -> dict[str, Sequence[object]]:
    """What `check_golden` compares with; run once where the tests hold the model to transformers."""
    model, store = open_pocket(arithmetic)
    logits = np.array(model.logits(hidden_rows(model, len(PROMPT), len(PROMPT))[mx.array(POSITIONS)]))
    store.close()
    ids = np.argsort(-logits, axis=1)[:, :NUM_TOP]
    values = np.take_along_axis(logits, ids, axis=1)
    return {"ids": ids.tolist(), "logits": [[round(float(v), 5) for v in row] for row in values]}

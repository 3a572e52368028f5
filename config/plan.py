"""The memory plan: how a budget is divided, line by line, before anything is allocated.

Pure functions of the checkpoint's geometry and the budget. The command line prints the plan
(`config.plan_report`), the engine obeys it: every owner of memory takes its line from here. Knows nothing of
MLX; the geometry is measured by `models/` and `streaming/`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from config.defaults import QUEUE_LENGTH
from config.errors import BudgetError
from config.sizes import format_size, physical_memory_bytes

# Two processes that serve, without what other lines hold. Measured on Linux: 79 MB of the engine and 87 MB of
# HTTP after structured answers, and 40 MB that the C library keeps of the small blocks that MLX frees; a
# twentieth of room.
RUNTIME_BYTES = 216 * 10**6
# The tokenizer's tables: 104 MB for 154,000 tokens.
VOCABULARY_BYTES_PER_TOKEN = 680
# Items of recent responses that clients may refer to, in the HTTP process: about two thousand of a kilobyte.
RECENT_ITEMS_BYTES = 3 * 10**6
# Texts in both processes. A token in line is an int32 in each of them, twice while it is handed over; one of
# an answer under way is that and its text (tests/server/api/answer/test_memory_of_text.py).
QUEUED_TOKEN_BYTES = 16
HEARD_TOKEN_BYTES = 64
# Answers that the HTTP process remembers in memory; older ones are on disk.
REMEMBERED_BYTES = 8 * 10**6
# Bodies, what is made of them, and connections: in the HTTP process, from the first byte to the end of the
# answer. A hundredth of a large budget is more than a fleet's prompts take; the least holds one body of any
# kind that is taken (2 million ids: 104 MB).
MIN_REQUEST_BYTES = 128 * 10**6
MAX_REQUEST_BYTES = 10**9
REQUEST_DIVISOR = 200
# Grammars: two processes that try them (measured: 30 MB each with 4,096 tokens), what one attempt of each may
# take beside that, and the compiled ones in the engine: small ones of all requests, and some large ones.
GRAMMAR_TRIAL_BYTES = 32 * 10**6
SMALL_GRAMMAR_BYTES = 5 * 10**5
LARGE_GRAMMARS_BYTES = 48 * 10**6
GRAMMAR_BYTES = 2 * (32 * 10**6 + GRAMMAR_TRIAL_BYTES) + 96 * SMALL_GRAMMAR_BYTES + LARGE_GRAMMARS_BYTES
# A cache that is full grows by a sixteenth of its rows, so that a row is copied at most 17 times however long
# the sequence becomes, and in whole steps. The steps are small because each running sequence may hold most of
# one for nothing.
KV_DIVISOR = 16
KV_STEP = 64
# Sequences whose caches are in memory at once, whatever the room for KV; if they decode, they take turns.
MAX_RUNNING = 32
# MLX keeps freed buffers for reuse, by default without bound (published: 15.1 GB resident for a 10 GB
# target). It may keep what a step's transients were, which have the workspace's line while they are in use,
# and a quarter more, within these bounds, for those of other sizes. MLX's memory limit, the sum of its lines,
# makes it give back what it keeps before more than both lines is taken.
MIN_CACHE_BYTES = 32 * 10**6
MAX_CACHE_BYTES = 10**9
# Threads that every reader can have, and how many more there is memory for: they get this share of what the
# budget has beyond the minimum. Published: up to 17 reads at a time gain on a fast SSD; 32 is what the probe
# tries.
MIN_READER_THREADS = 8
MAX_READER_THREADS = 32
READER_SHARE = 0.01
# Rows that every sweep can take, and slots that every ring has: two experts are computed with while two are
# read. Of what the budget has beyond the minimum, longer sweeps get one share (a prompt longer than a sweep
# reads the experts again for each) and the ring another (what it holds is read while attention runs).
MIN_SWEEP_TOKENS = 2048
MIN_RING_SLOTS = 4
SWEEP_SHARE = 0.03
RING_SHARE = 0.02
# Saved prompts are worth a twenty-fifth of the budget: the SSD brings them back nearly as fast, and experts
# need the rest. More than four full contexts nobody asked for; less than 2,048 tokens leaves no room to copy
# blocks.
PREFIX_DIVISOR = 25
# Lines of memory that is not MLX's: threads' buffers, saved blocks as bytes, and the libraries.
NOT_MLX = (
    "reader buffers",
    "prefix cache",
    "recent items",
    "requests",
    "texts",
    "grammars",
    "Python and libraries",
)
PREFIX_CONTEXTS = 4
# States of a sequence: its own, the one before the step, and two that wait to be saved. More sequences than
# one get a share of what the budget has beyond the minimum.
STATE_COPIES = 4
STATE_SHARE = 0.05
# Saved states that the prefix cache has room for at least: of a prompt's beginning and of its end.
SAVED_STATES = 3
MIN_PREFIX_TOKENS = 2048


def cache_rows(rows: int) -> int:
    """Rows that a cache has room for once it has grown to hold `rows`."""
    return -(-(rows + rows // KV_DIVISOR) // KV_STEP) * KV_STEP


def most_cache_rows(tokens: int) -> int:
    """The most rows of all caches together while the sequences' lengths add up to `tokens`."""
    return tokens + tokens // KV_DIVISOR + KV_STEP * min(tokens, MAX_RUNNING)


@dataclass(frozen=True)
class Geometry:
    """What a checkpoint needs, in bytes of memory (not of disk)."""

    trunk_bytes: int
    expert_bytes: tuple[int, ...]  # one expert's slot, for each MoE layer in order
    num_experts: int
    experts_per_token: int
    kv_bytes_per_token: int  # latents and rotary keys, all layers
    index_key_bytes_per_token: int  # the indexers' keys, full layers only
    workspace_bytes: int  # the largest transients of one step, from the model's tile sizes
    reader_buffer_bytes: int  # one buffer of the reader
    vocab_size: int = 0
    sweep_row_bytes: int = 0  # what each row of a prompt takes on its way through the layers
    ring_slot_bytes: int = 0  # one expert of each kind, on its way through the ring
    state_bytes: int = 0  # what a sequence's cache takes beside its rows, once

    @property
    def context_bytes_per_token(self) -> int:
        return self.kv_bytes_per_token + self.index_key_bytes_per_token


@dataclass(frozen=True)
class MemoryPlan:
    """The ledger. `lines` add up to at most `budget_bytes`; what is left over is too little for a slot."""

    budget_bytes: int
    minimum_budget_bytes: int
    resident_bytes: int  # the budget from which every expert stays in memory
    max_context: int
    lines: Mapping[str, int]
    slots_per_layer: tuple[int, ...]
    num_experts: int
    reader_threads: int  # at most; the disk's probe decides
    sweep_tokens: int  # of all prompts that share a sweep
    ring_slots: int
    max_running: int = MAX_RUNNING  # sequences whose caches are in memory at once

    @property
    def cache_limit_bytes(self) -> int:
        """Freed buffers that MLX may keep: those of a step, which take turns in its line, and some more."""
        return self.lines["MLX buffer cache"] + self.lines["workspace"]

    @property
    def buffer_bytes(self) -> int:
        """What MLX allocates, in all lines: what has to be wired where anything is."""
        return sum(nbytes for name, nbytes in self.lines.items() if name not in NOT_MLX)

    @property
    def is_resident(self) -> bool:
        """Whether every expert has a slot of its own."""
        return all(slots == self.num_experts for slots in self.slots_per_layer)


def make_plan(
    geometry: Geometry,
    budget_bytes: int,
    max_context: int,
    *,
    reader_threads: int | None = None,
    prefix_bytes: int | None = None,
    sweep_tokens: int | None = None,
    physical_bytes: int | None = None,
    max_queue: int = QUEUE_LENGTH,
) -> MemoryPlan:
    """Divides the budget; BudgetError, with the smallest budget that works, when it cannot be done.

    `reader_threads`: how many the disk needs, once that is known; of the first plan's at most.
    `prefix_bytes`: what the prefix cache may have, 0 for none; `sweep_tokens`: rows of a sweep. None leaves
    them to the plan.
    """
    least, most = _prefix_bounds(geometry, max_context, prefix_bytes)
    tokens = sweep_tokens or min(max_context, MIN_SWEEP_TOKENS)
    fixed = _fixed_lines(geometry, max_context, max_queue) | {"sweep rows": tokens * geometry.sweep_row_bytes}
    needed, per_slot = sum(fixed.values()), sum(geometry.expert_bytes)
    whole = needed + per_slot * geometry.num_experts
    resident = _fixed_point(lambda budget: whole + max(least, min(most, budget // PREFIX_DIVISOR)))
    beside = needed - geometry.workspace_bytes
    streamed = beside + least_experts(geometry) + MIN_RING_SLOTS * geometry.ring_slot_bytes
    minimum = min(resident, streamed + least)
    _check_budget(geometry, budget_bytes, max_context, minimum, physical_bytes or physical_memory_bytes())
    is_resident = budget_bytes >= resident
    spare = budget_bytes - (resident if is_resident else minimum)
    threads = reader_threads or _reader_threads(geometry, spare)
    tokens += 0 if sweep_tokens else _more_tokens(geometry, spare, max_context - tokens)
    ring_slots = 0 if is_resident else _ring_slots(geometry, spare)
    running = _most_running(geometry, spare)
    lines = (
        fixed
        | {
            "reader buffers": reader_buffers(threads) * geometry.reader_buffer_bytes,
            "prefix cache": max(least, min(most, budget_bytes // PREFIX_DIVISOR, least + int(spare * 0.8))),
            "requests": _request_bytes(budget_bytes, spare),
            "sweep rows": tokens * geometry.sweep_row_bytes,
            "sweep ring": ring_slots * geometry.ring_slot_bytes,
        }
        | _state_line(geometry, running)
    )
    if is_resident:
        slots = (geometry.num_experts,) * len(geometry.expert_bytes)
    else:
        lines["workspace"], slots = divide(geometry, budget_bytes - sum(lines.values()) + lines["workspace"])
    return MemoryPlan(
        budget_bytes=budget_bytes,
        minimum_budget_bytes=minimum,
        resident_bytes=resident,
        max_context=max_context,
        lines={**lines, "experts": slots_bytes(geometry, slots)},
        slots_per_layer=slots,
        num_experts=geometry.num_experts,
        reader_threads=threads,
        sweep_tokens=tokens,
        ring_slots=ring_slots,
        max_running=running,
    )


def _most_running(geometry: Geometry, spare: int) -> int:
    """Sequences that may run at once: one, and as many more as a share of the budget has states for."""
    if not geometry.state_bytes:
        return MAX_RUNNING
    return min(MAX_RUNNING, 1 + int(spare * STATE_SHARE) // (STATE_COPIES * geometry.state_bytes))


def _state_line(geometry: Geometry, running: int) -> dict[str, int]:
    """The line of states, of models that have any."""
    nbytes = running * STATE_COPIES * geometry.state_bytes
    return {"states": nbytes} if nbytes else {}


def _fixed_point(needed: Callable[[int], int]) -> int:
    """The smallest budget that equals what is needed with it."""
    budget = needed(0)
    while budget < needed(budget):
        budget = needed(budget)
    return budget


def _more_tokens(geometry: Geometry, spare: int, most: int) -> int:
    """Rows of a sweep beyond the least."""
    return min(most, int(spare * SWEEP_SHARE) // geometry.sweep_row_bytes) if geometry.sweep_row_bytes else 0


def _request_bytes(budget: int, spare: int) -> int:
    wanted = min(MAX_REQUEST_BYTES, budget // REQUEST_DIVISOR)
    return max(MIN_REQUEST_BYTES, min(wanted, MIN_REQUEST_BYTES + spare // 20))


def _ring_slots(geometry: Geometry, spare: int) -> int:
    more = int(spare * RING_SHARE) // geometry.ring_slot_bytes if geometry.ring_slot_bytes else 0
    return max(MIN_RING_SLOTS, min(geometry.num_experts, MIN_RING_SLOTS + more))


def reader_buffers(threads: int) -> int:
    """Buffers of a reader: one per thread, and some for reads that do not come back.

    After a quarter of the threads has been replaced, a dying disk has fewer threads, not more memory.
    """
    return threads + max(1, threads // 4)


def _reader_threads(geometry: Geometry, spare: int) -> int:
    room = reader_buffers(MIN_READER_THREADS) * geometry.reader_buffer_bytes + int(spare * READER_SHARE)
    some = range(MIN_READER_THREADS, MAX_READER_THREADS + 1)
    return max(n for n in some if reader_buffers(n) * geometry.reader_buffer_bytes <= room)


def text_bytes(max_context: int, max_queue: int) -> int:
    """Tokens of full contexts in line and of one that is answered, and remembered answers."""
    return REMEMBERED_BYTES + max_context * (max_queue * QUEUED_TOKEN_BYTES + HEARD_TOKEN_BYTES)


def _fixed_lines(geometry: Geometry, max_context: int, max_queue: int) -> dict[str, int]:
    cache = min(max(geometry.workspace_bytes // 4, MIN_CACHE_BYTES), MAX_CACHE_BYTES)
    return {
        "trunk": geometry.trunk_bytes,
        "KV cache": geometry.context_bytes_per_token * most_cache_rows(max_context),
        "workspace": geometry.workspace_bytes,
        "reader buffers": reader_buffers(MIN_READER_THREADS) * geometry.reader_buffer_bytes,
        "MLX buffer cache": cache,
        "recent items": RECENT_ITEMS_BYTES,
        "texts": text_bytes(max_context, max_queue),
        "requests": MIN_REQUEST_BYTES,
        "grammars": GRAMMAR_BYTES + 2 * VOCABULARY_BYTES_PER_TOKEN * geometry.vocab_size,
        "Python and libraries": RUNTIME_BYTES + VOCABULARY_BYTES_PER_TOKEN * geometry.vocab_size,
    } | _state_line(geometry, 1)


def _prefix_bounds(geometry: Geometry, max_context: int, given: int | None) -> tuple[int, int]:
    """The least and the most that the prefix cache gets."""
    least = geometry.context_bytes_per_token * MIN_PREFIX_TOKENS + SAVED_STATES * geometry.state_bytes
    if given is None:
        contexts = geometry.context_bytes_per_token * max_context + SAVED_STATES * geometry.state_bytes
        return least, max(least, PREFIX_CONTEXTS * contexts)
    if 0 < given < least:
        raise BudgetError(
            f"--prefix-cache-memory {format_size(given)} is too little to copy blocks: give at least "
            f"{round_up(least)}, or 0 for no prefix cache"
        )
    return given, given


def _check_budget(geometry: Geometry, budget: int, max_context: int, minimum: int, physical: int) -> None:
    if budget > physical:
        raise BudgetError(
            f"a budget of {format_size(budget)} is above the memory of this machine: {format_size(physical)}"
        )
    if budget < minimum:
        raise BudgetError(
            f"a memory budget of {format_size(budget)} is too small: this checkpoint with a context of "
            f"{max_context} tokens needs {round_up(minimum)} (trunk {format_size(geometry.trunk_bytes)}, "
            f"{geometry.experts_per_token} experts in each of {len(geometry.expert_bytes)} layers, the rest)"
            "; a shorter --max-context needs less"
        )


def least_experts(geometry: Geometry) -> int:
    """Workspace and experts together, with as many slots as a token needs: see `divide`."""
    per_token = geometry.experts_per_token
    bank = per_token * max(geometry.expert_bytes, default=0)
    return per_token * sum(geometry.expert_bytes) + max(geometry.workspace_bytes, bank)


def divide(geometry: Geometry, room: int) -> tuple[int, tuple[int, ...]]:
    """The workspace, and as many slots for every layer as fit beside it.

    Between two steps a layer may move to a bank of another size, and both are in memory then: what no step
    uses meanwhile has to be as large as the largest bank.
    """
    sizes = geometry.expert_bytes
    largest = max(sizes, default=0)
    moving, *beside_bank = _slots((largest, *sizes), room, geometry.num_experts)
    beside_step = _slots(sizes, room - geometry.workspace_bytes, geometry.num_experts)
    slots = tuple(min(*both, moving) for both in zip(beside_bank, beside_step, strict=True))
    bank = max((count * nbytes for count, nbytes in zip(slots, sizes, strict=True)), default=0)
    return max(geometry.workspace_bytes, bank), slots


def slots_bytes(geometry: Geometry, slots: Sequence[int]) -> int:
    """Memory of the slots of all layers."""
    return sum(count * nbytes for count, nbytes in zip(slots, geometry.expert_bytes, strict=True))


def _slots(sizes: Sequence[int], room: int, most: int) -> tuple[int, ...]:
    """The same number of slots for each size, at most `most`; the rest goes to the first that it fits."""
    per_slot = sum(sizes)
    even = min(room // per_slot, most) if per_slot else most
    left = room - even * per_slot
    slots = []
    for nbytes in sizes:
        has_one_more = even < most and nbytes <= left
        left -= nbytes * has_one_more
        slots.append(even + has_one_more)
    return tuple(slots)


def round_up(num_bytes: int) -> str:
    """A size that, typed back as a budget, is enough: 1.2G, in tenths of a unit and never below."""
    unit, factor = next(
        (
            (unit, factor)
            for unit, factor in (("G", 10**9), ("M", 10**6), ("K", 10**3))
            if num_bytes >= factor
        ),
        ("", 1),
    )
    tenths = -(-num_bytes * 10 // factor)
    return f"{tenths // 10}.{tenths % 10}{unit}" if unit else str(num_bytes)

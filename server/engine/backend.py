"""Opens the model for the engine: the one place where server/ meets models/ and streaming/."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx

from config.defaults import ExpertPolicy
from config.errors import CheckpointError, DiskError, UsageError
from config.forecast import Forecast, forecast, machine_with
from config.plan import MAX_RUNNING, MemoryPlan, make_plan
from config.plan_report import render_plan
from config.sizes import format_size, physical_memory_bytes
from models.arithmetic import Arithmetic, choose_arithmetic
from models.experts.exchange import Exchange
from models.families import family_of
from models.glm_moe_dsa import Model
from models.loading.fingerprint import cache_fingerprint
from models.loading.loading import Checkpoint, load_model, make_geometry, open_checkpoint, trunk_bytes
from server.engine.apple import wire
from server.engine.cluster.leader import Leader, LedModel
from server.engine.cluster.meeting import facts_of, free_address, gather
from server.engine.cluster.part import join, part_of
from server.engine.memory.governor import Governor, Memory, Ungoverned
from server.engine.memory.pressure import choose_room
from server.engine.memory.usage import MemoryUse
from server.engine.mirrors import open_mirrors
from server.engine.model_protocol import Backend, EngineModel, ReportProgress
from server.engine.prefix.lookup import TRANSIENT_BLOCKS, DiskTier, PrefixCache, block_bytes
from server.engine.schedule.limits import Limits
from server.engine.telemetry import measure_all, measure_store
from server.engine.trials import Habit
from server.link.messages import EngineConfig, ModelInfo
from streaming.disk.comparison import Comparison
from streaming.disk.disk import Disk
from streaming.disk.open_files import allow_open_files
from streaming.disk.probe import DiskProbe, probe_disk
from streaming.disk.reader import NUM_THREADS
from streaming.eviction.contest import Rule, make_rule
from streaming.eviction.hot_set import HotSet
from streaming.files.layout import advise_aligning
from streaming.placement import Placement
from streaming.store import ExpertStore

# A context that nobody asked for must not eat the budget: 32,768 tokens of GLM-5.2 are 3.1 GB.
DEFAULT_CONTEXT = 32_768
FIXED = {"auto": None, "on": True, "off": False}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedModel:
    """What every rank of a cluster has: its part of the model within its plan."""

    checkpoint: Checkpoint
    plan: MemoryPlan
    probe: DiskProbe | None
    comparison: Comparison | None
    rule: Rule
    store: ExpertStore
    model: Model


def open_backend(config: EngineConfig, report: ReportProgress) -> Backend:
    """Open the checkpoint that `config` names; `report` is told how far it is."""
    report(0.0, "reading headers")
    checkpoint, arithmetic = open_checkpoint(config.model_path), choose_arithmetic()
    if arithmetic.name in (family := family_of(checkpoint.args)).fails_on:
        log.warning("%s fails its tests on %s: do not trust its answers here", family.title, arithmetic.name)
    leader = _lead(config, checkpoint, arithmetic, report) if config.cluster else None
    exchange = join(leader.welcome, checkpoint) if leader else None
    opened = open_model(config, checkpoint, arithmetic, report, exchange)
    checkpoint, plan, probe, model = opened.checkpoint, opened.plan, opened.probe, opened.model
    lines = tuple(render_plan(plan).splitlines())
    expected = ""
    if probe and not exchange:  # nothing is known yet of what several machines should reach
        expected = forecaster(checkpoint, arithmetic, plan, probe.bytes_per_s)().describe()
    info = ModelInfo(checkpoint.args.vocab_size, plan.max_context, lines, plan.lines["requests"], expected)
    fingerprint = cache_fingerprint(checkpoint.directory, checkpoint.args, arithmetic)
    prefix = open_prefix_cache(model, fingerprint, plan, config)
    memory = _make_memory(opened, arithmetic, _limiter(config))
    if opened.comparison is not None:
        opened.comparison.start()
    habits = () if plan.is_resident else _make_habits(opened.store, config)
    hot_set = _open_hot_set(opened.store, config, plan, fingerprint.hex())
    limits = _make_limits(plan, arithmetic, config)
    measure = _make_measure(opened, prefix, memory)
    heat = dict if plan.is_resident else opened.store.heat
    backend = Backend(model, info, measure, limits, prefix, memory, habits, hot_set, heat)
    if leader is None:
        return backend
    leader.wait_until_loaded(lambda text: report(0.99, text))
    return replace(backend, model=LedModel(model, leader.tell), on_lost=leader.on_lost)


def open_model(
    config: EngineConfig,
    checkpoint: Checkpoint,
    arithmetic: Arithmetic,
    report: ReportProgress,
    exchange: Exchange | None = None,
) -> OpenedModel:
    """The model with its store, within the plan; of a cluster, this rank's part of the experts."""
    if exchange is not None:
        checkpoint = part_of(checkpoint, exchange.placement)
    plan = plan_memory(checkpoint, arithmetic, config)
    allow_open_files(len(checkpoint.experts.stamps) * (2 + len(config.mirrors)))
    disk, comparison = open_mirrors(
        checkpoint.directory, checkpoint.experts, config.mirrors, config.prefix_directory
    )
    probe = _probe(disk, checkpoint, plan) if config.stream_experts else None
    if probe:
        plan = plan_memory(checkpoint, arithmetic, config, probe.depth)
    report(0.01, "the plan fits")  # and nothing more is refused: the HTTP side opens its port
    _limit(plan)
    rule = _make_rule(checkpoint, config.expert_policy)
    slots = dict(zip(checkpoint.experts.layers, plan.slots_per_layer, strict=True))
    store = ExpertStore(
        checkpoint.experts,
        slots,
        float_dtype=arithmetic.dtype,
        make_policy=rule,
        disk=disk,
        num_threads=probe.depth if probe else NUM_THREADS,
        ring_slots=plan.ring_slots,
    )
    if plan.is_resident:
        store.load_all(lambda done, total: report(0.9 * done / total, f"experts of layer {done} of {total}"))
    model = load_model(
        checkpoint,
        arithmetic,
        store,
        lambda done, total: report(0.9 + 0.1 * done / total, f"trunk, file {done} of {total}"),
        exchange,
    )
    _limiter(config)(plan)
    return OpenedModel(checkpoint, plan, probe, comparison, rule, store, model)


def open_first_part(config: EngineConfig) -> Checkpoint:
    """The checkpoint as rank 0 uses it, of which no other rank has more experts."""
    checkpoint = open_checkpoint(config.model_path)
    if config.cluster is None:
        return checkpoint
    num_ranks, num_experts = len(config.cluster.addresses), checkpoint.args.n_routed_experts
    return part_of(checkpoint, Placement.by_id(0, num_ranks, num_experts))


def _lead(
    config: EngineConfig, checkpoint: Checkpoint, arithmetic: Arithmetic, report: ReportProgress
) -> Leader | None:
    """The other machines of the cluster; None where none of them has come again after a restart.

    Where experts are streamed any number of machines can go on; otherwise all are needed for their memory.
    """
    assert config.cluster is not None, "only a cluster is led"
    guests = gather(
        config.cluster,
        facts_of(config.cluster, checkpoint, arithmetic),
        lambda text: report(0.0, text),
        is_again=config.marks is not None and config.stream_experts,
    )
    return Leader(guests, free_address(config.cluster.addresses[0])) if guests else None


def _make_measure(
    opened: OpenedModel, prefix: PrefixCache | None, memory: Memory
) -> Callable[[], Mapping[str, float]]:
    model, store, plan, comparison = opened.model, opened.store, opened.plan, opened.comparison
    use = MemoryUse(
        store,
        trunk_bytes(model),
        lambda: model.cache_bytes,
        lambda: prefix.memory_bytes if prefix else 0,
        plan.lines["MLX buffer cache"],
    )
    return measure_all(
        measure_store(
            store, lambda: memory.plan if isinstance(memory, Governor) else plan, use, opened.probe
        ),
        prefix.statistics if prefix else dict,
        memory.measure,
        lambda: {"mirror_compared": comparison.share} if comparison is not None else {},
    )


def _make_habits(store: ExpertStore, config: EngineConfig) -> tuple[Habit, ...]:
    """What the store may do or not, where its banks are filled in place."""
    if not store.fills_in_place:
        return ()
    return (
        Habit("lookahead", store.look_ahead, FIXED[config.lookahead]),
        Habit("straight_reads", store.read_straight, FIXED[config.straight_reads]),
    )


def _open_hot_set(
    store: ExpertStore, config: EngineConfig, plan: MemoryPlan, fingerprint: str
) -> HotSet | None:
    """Beside the saved prompts; None where all experts are in memory or nothing is kept on disk."""
    if plan.is_resident or config.prefix_directory is None:
        return None
    return HotSet(store, config.prefix_directory / f"experts-{fingerprint[:16]}.json", fingerprint)


def forecaster(
    checkpoint: Checkpoint,
    arithmetic: Arithmetic,
    plan: MemoryPlan,
    disk_bytes_per_s: float,
    memory_bytes: int | None = None,
) -> Callable[..., Forecast]:
    """`forecast` for this checkpoint, plan and disk, on a machine of so much memory; by default this one."""
    geometry = make_geometry(checkpoint, arithmetic, plan.max_context)
    machine = machine_with(arithmetic.name, memory_bytes or physical_memory_bytes())
    return partial(forecast, geometry, plan, disk_bytes_per_s, machine)


def _make_limits(plan: MemoryPlan, arithmetic: Arithmetic, config: EngineConfig) -> Limits:
    return Limits(
        pass_rows=plan.sweep_tokens,
        decode_rows=arithmetic.max_alone_rows or MAX_RUNNING,
        kv_tokens=plan.max_context,
        agent_inflight=config.max_inflight_per_agent,
        decode_share=config.decode_share,
        batch_width=config.batch_width,
        max_running=plan.max_running,
    )


def _probe(disk: Disk, checkpoint: Checkpoint, plan: MemoryPlan) -> DiskProbe:
    """In the memory that slots will have."""
    if advice := advise_aligning(checkpoint.experts, checkpoint.directory):
        log.info("%s", advice)
    try:
        probe = probe_disk(disk, checkpoint.experts, plan.reader_threads, plan.lines["experts"])
    except DiskError as error:
        raise CheckpointError(str(error)) from error
    rates = ", ".join(f"{rate / 1e9:.2f} GB/s with {depth}" for depth, rate in probe.rates.items())
    log.info("the disk reads experts at %s; using %d threads", rates, probe.depth)
    return probe


def open_prefix_cache(
    model: EngineModel, fingerprint: bytes, plan: MemoryPlan, config: EngineConfig
) -> PrefixCache | None:
    """The prefix cache within its line of the plan; without its disk where that cannot be used."""
    line = plan.lines["prefix cache"]
    if line == 0:
        return None
    max_bytes = max(0, line - TRANSIENT_BLOCKS * block_bytes(model.make_cache()))
    if config.prefix_directory is None:
        return PrefixCache(fingerprint, max_bytes)
    disk = DiskTier(config.prefix_directory, config.prefix_disk_bytes, config.prefix_writes_per_day)
    try:
        return PrefixCache(fingerprint, max_bytes, disk)
    except OSError as error:
        log.error(
            "prefix cache: %s cannot be used (%s), so prompts are kept in memory only and a restart loses "
            "them; --prefix-cache-dir names another folder", disk.directory, error.strerror,
        )  # fmt: skip
        return PrefixCache(fingerprint, max_bytes)


def _limit(plan: MemoryPlan) -> None:
    """MLX keeps buffers for reuse within the plan, and leaves to the system what stays in memory."""
    mx.set_cache_limit(plan.cache_limit_bytes)
    mx.set_memory_limit(plan.buffer_bytes)


def _limit_and_wire(plan: MemoryPlan) -> None:
    _limit(plan)
    wire(plan.buffer_bytes)


def _limiter(config: EngineConfig) -> Callable[[MemoryPlan], None]:
    return _limit_and_wire if config.wires_memory else _limit


def _make_memory(
    opened: OpenedModel, arithmetic: Arithmetic, on_plan: Callable[[MemoryPlan], None]
) -> Governor | Ungoverned:
    checkpoint, plan = opened.checkpoint, opened.plan
    if plan.is_resident:
        return Ungoverned()
    geometry = make_geometry(checkpoint, arithmetic, plan.max_context)
    make, settle = partial(_make_rule, checkpoint), opened.model.settle
    return Governor(
        opened.store, geometry, plan, settle, make, opened.rule, measure_room=choose_room(), on_plan=on_plan
    )


def _make_rule(checkpoint: Checkpoint, name: ExpertPolicy) -> Rule:
    return make_rule(name, checkpoint.args.n_routed_experts, checkpoint.args.num_experts_per_tok)


def plan_memory(
    checkpoint: Checkpoint,
    arithmetic: Arithmetic,
    config: EngineConfig,
    reader_threads: int | None = None,
    physical_bytes: int | None = None,
) -> MemoryPlan:
    """The plan that the engine obeys and that `glmserve plan` prints, before the disk's probe has a say.

    Raises UsageError where a person must choose: a context that the model has not, a budget that is too
    small, or experts that do not all fit while streaming is off.
    """
    longest = checkpoint.args.max_position_embeddings
    if config.max_context is not None and config.max_context > longest:
        raise UsageError(f"--max-context {config.max_context} is more than the model's {longest}")
    context = config.max_context or min(longest, DEFAULT_CONTEXT)
    geometry = make_geometry(checkpoint, arithmetic, context)
    plan = make_plan(
        geometry,
        config.ram_budget_bytes,
        context,
        reader_threads=reader_threads,
        prefix_bytes=config.prefix_memory_bytes,
        sweep_tokens=config.sweep_tokens,
        physical_bytes=physical_bytes,
        max_queue=config.max_queue,
    )
    if not config.stream_experts and not plan.is_resident:
        raise UsageError(
            f"the whole model needs {format_size(plan.resident_bytes)}, more than --ram-budget "
            f"{format_size(config.ram_budget_bytes)}; add --stream-experts to read experts from the SSD"
        )
    return plan

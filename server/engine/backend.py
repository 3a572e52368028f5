"""Opens the model for the engine: the one place where server/ meets models/ and streaming/."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import mlx.core as mx

from config.errors import UsageError
from config.plan import MemoryPlan, make_plan, render_plan
from config.sizes import format_size
from models.arithmetic import Arithmetic, choose_arithmetic
from models.loading import Checkpoint, load_model, make_geometry, open_checkpoint
from server.engine.messages import EngineConfig, ModelInfo
from server.engine.model import Backend, ReportProgress
from server.engine.telemetry import measure_store
from streaming.policy import LeastNearlyChosen, LeastRecentlyUsed, Policy
from streaming.store import ExpertStore

# A context that nobody asked for must not eat the budget: 32,768 tokens of GLM-5.2 are 3.1 GB.
DEFAULT_CONTEXT = 32_768


def open_backend(config: EngineConfig, report: ReportProgress) -> Backend:
    """Open the checkpoint that `config` names; `report` is told how far it is."""
    report(0.0, "reading headers")
    checkpoint, arithmetic = open_checkpoint(config.model_path), choose_arithmetic()
    plan = plan_memory(checkpoint, arithmetic, config)
    mx.set_cache_limit(plan.cache_limit_bytes)
    slots = dict(zip(checkpoint.experts.layers, plan.slots_per_layer, strict=True))
    store = ExpertStore(
        checkpoint.experts,
        slots,
        float_dtype=arithmetic.dtype,
        make_policy=_policy_maker(config.expert_policy, checkpoint),
        ring_slots=plan.ring_slots,
    )
    if not config.stream_experts:
        store.load_all(lambda done, total: report(0.9 * done / total, f"experts of layer {done} of {total}"))
    model = load_model(
        checkpoint,
        arithmetic,
        store,
        lambda done, total: report(0.9 + 0.1 * done / total, f"trunk, file {done} of {total}"),
    )
    lines = tuple(render_plan(plan).splitlines())
    info = ModelInfo(checkpoint.args.vocab_size, plan.max_context, lines)
    return Backend(model, info, measure_store(store, plan), plan.sweep_tokens)


def _policy_maker(name: Literal["lru", "nearness"], checkpoint: Checkpoint) -> Callable[[], Policy]:
    args = checkpoint.args
    if name == "lru":
        return LeastRecentlyUsed
    return partial(LeastNearlyChosen, args.n_routed_experts, args.num_experts_per_tok)


def plan_memory(checkpoint: Checkpoint, arithmetic: Arithmetic, config: EngineConfig) -> MemoryPlan:
    """The plan that the engine obeys and that `glmserve plan` prints.

    Raises UsageError where a person must choose: a context that the model has not, a budget that is too
    small, or experts that do not all fit while streaming is off.
    """
    longest = checkpoint.args.max_position_embeddings
    if config.max_context is not None and config.max_context > longest:
        raise UsageError(f"--max-context {config.max_context} is more than the model's {longest}")
    context = config.max_context or min(longest, DEFAULT_CONTEXT)
    plan = make_plan(
        make_geometry(checkpoint, arithmetic, context),
        config.ram_budget_bytes,
        context,
        sweep_tokens=config.sweep_tokens,
    )
    if not config.stream_experts and not plan.is_resident:
        raise UsageError(
            f"the whole model needs {format_size(plan.resident_bytes)}, more than --ram-budget "
            f"{format_size(config.ram_budget_bytes)}; add --stream-experts to read experts from the SSD"
        )
    return plan

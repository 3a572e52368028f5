"""GET /metrics for Prometheus: the engine's last counts, as it sent them, beside those of requests.

The counts of requests are kept in `server/api/watch/request_metrics.py`; this holds nothing of its own.
"""

import platform
from collections.abc import Iterable, Mapping

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.api.service import Service
from server.version import VERSION

# Name in the engine's counts -> name for Prometheus (without the suffix _total), and what it means.
COUNTERS = {
    "hits": ("expert_hits", "experts asked for that lay in memory"),
    "misses": ("expert_misses", "experts that a request had to wait for"),
    "evictions": ("expert_evictions", "experts given up for others"),
    "failures": ("expert_failures", "experts that could not be read"),
    "payload_bytes": ("expert_bytes", "bytes of the experts that arrived"),
    "device_bytes": ("device_bytes", "bytes read from the disk, with what alignment adds"),
    "read_s": ("read_seconds", "time during which any read was outstanding"),
    "stall_s": ("stall_seconds", "time that the model waited for reads"),
    "num_reads": ("reads", "reads of the disk"),
    "num_timeouts": ("read_timeouts", "reads that did not come back in time"),
    "ahead_started": ("lookahead_experts", "experts read because the next layer was expected to want them"),
    "ahead_used": ("lookahead_used", "those of them that it did want"),
    "shrinks": ("bank_shrinks", "times that experts gave up their places because memory was short"),
    "prefix_asked_tokens": ("prefix_asked_tokens", "prompt tokens looked for in the prefix cache"),
    "prefix_restored_tokens": (
        "prefix_restored_tokens",
        "prompt tokens found there, or read by another request in the same pass, and not computed",
    ),
    "prefix_saved_tokens": ("prefix_saved_tokens", "tokens put there"),
    "prefix_bytes_written": ("prefix_written_bytes", "bytes of blocks written to --prefix-cache-dir"),
    "prefix_bytes_read": ("prefix_read_bytes", "bytes of blocks read from there"),
    "prefix_evictions": ("prefix_evictions", "blocks deleted there for others"),
    "prefix_damaged": ("prefix_damaged", "blocks there that were damaged or foreign, and were deleted"),
    "prefix_errors": ("prefix_errors", "times that the disk refused to read or write there"),
    "prefix_blocks_dropped": (
        "prefix_dropped",
        "blocks not written: no time, no allowance, no disk",
    ),
}
GAUGES = {
    "slots": ("expert_slots", "experts that fit in memory"),
    "slots_planned": ("expert_slots_planned", "those that the plan gives; fewer fit while memory is short"),
    "available_bytes": ("available_bytes", "memory that the system could still give, when it was seen last"),
    "resident_experts": ("resident_experts", "experts in memory now"),
    "ahead_recall": ("lookahead_recall", "share of the absent experts that lookahead had begun to read"),
    "ahead_precision": ("lookahead_precision", "share of the experts read ahead that were wanted"),
    "prefix_memory_bytes": ("prefix_memory_bytes", "blocks of saved prompts in memory"),
    "prefix_pinned_blocks": (
        "prefix_pinned_blocks",
        "pinned blocks on disk",
    ),
    "prefix_disk_bytes": ("prefix_disk_bytes", "blocks of saved prompts on disk"),
    "budget_bytes": ("ram_budget_bytes", "--ram-budget, or the one that was given since"),
    "running": ("requests_running", "requests that are worked on"),
    "waiting": ("requests_waiting", "requests in line at the engine"),
    "agents": ("agents", "agents that have requests here"),
    "kv_tokens": ("kv_tokens", "tokens whose KV is held or set aside"),
    "kv_capacity": ("kv_tokens_capacity", "tokens whose KV fits"),
    "batch_width": ("batch_width", "answers that go forward in one step, at most"),
    "mirror_compared": ("mirror_compared_share", "how much of the mirrors has been compared in full, 0 to 1"),
    "policy_gain": (
        "expert_policy_nearness_gain",
        "what nearness would have hit more than lru, of the experts asked for, when both were tried last",
    ),
    "probe_bytes_per_s": ("probe_bytes_per_second", "rate at which the disk read experts at start-up"),
    "probe_depth": ("probe_depth", "reads at a time that this takes: the reader's threads"),
}
# The same for names that go on behind a dot: what stands there is the value of a label.
LABELLED = {
    "habit": ("habit", "1 where the engine does it: reading ahead, reading straight into slots", "habit"),
    "habit_gain": ("habit_gain", "share of a step's time that it saved when it was tried last", "habit"),
    "policy": ("expert_policy", "the policy that decides which expert gives up its place", "policy"),
    "planned": ("memory_planned_bytes", "the ledger, planned", "line"),
    "used": ("memory_used_bytes", "the ledger, used", "line"),
}
PREFIX = "glmserve_"
# Counts of who is here: without an engine that is nobody.
PRESENT = ("running", "waiting", "agents", "kv_tokens")


def metrics_router(service: Service, registry: CollectorRegistry) -> APIRouter:
    """The route; what was counted stays when the engine is down, and `glmserve_ready` is 0 then."""
    router = APIRouter()
    registry.register(_ServiceCollector(service))
    ProcessCollector(registry=registry)

    @router.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return router


class _ServiceCollector(Collector):
    """Asks the engine's status, the ledger and the parameters when Prometheus asks."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        status = self._service.engine.status
        is_ready = status.state == "ready"
        yield GaugeMetricFamily(f"{PREFIX}ready", "1 while requests are answered", value=float(is_ready))
        yield _build_info(self._service.model_id)
        restarts = "times that the engine was started again"
        yield CounterMetricFamily(f"{PREFIX}engine_restarts", restarts, value=status.num_restarts)
        values = dict(status.stats.values) if status.stats else {}
        if not is_ready:
            values |= {name: 0.0 for name in PRESENT if name in values}
        yield from _of_the_engine(values)
        ledger, parameters = self._service.ledger, self._service.parameters
        text = "tool calls that broke off or were malformed, and so were sent as content"
        yield CounterMetricFamily(f"{PREFIX}rejected_tool_calls", text, value=ledger.num_rejected_calls)
        text = "parameters of requests that are unknown here, and were ignored"
        yield CounterMetricFamily(f"{PREFIX}ignored_parameters", text, value=parameters.num_ignored)
        text = "US dollars that OpenRouter would have charged"
        yield CounterMetricFamily(f"{PREFIX}saved_dollars", text, value=ledger.openrouter_cost)


def _build_info(model_id: str) -> Metric:
    family = GaugeMetricFamily(f"{PREFIX}build_info", "1", labels=["version", "model", "python"])
    family.add_metric([VERSION, model_id, platform.python_version()], 1.0)
    return family


def _of_the_engine(values: Mapping[str, float]) -> Iterable[Metric]:
    for key, (name, text) in COUNTERS.items():
        if key in values:
            yield CounterMetricFamily(PREFIX + name, text, value=values[key])
    for key, (name, text) in GAUGES.items():
        if key in values:
            yield GaugeMetricFamily(PREFIX + name, text, value=values[key])
    for prefix, (name, text, label) in LABELLED.items():
        yield from _labelled(values, f"{prefix}.", PREFIX + name, text, label)
    for name, (found, asked, text) in shares(values).items():
        if asked:
            yield GaugeMetricFamily(f"{PREFIX}{name}_hit_rate", text, value=found / asked)


def shares(values: Mapping[str, float]) -> dict[str, tuple[float, float, str]]:
    """What was found and what was asked for, of experts and of prompts; 0 asked where nothing streams."""
    hits = values.get("hits", 0.0)
    wanted = hits + values.get("ahead_used", 0.0) + values.get("misses", 0.0)
    asked, restored = values.get("prefix_asked_tokens", 0.0), values.get("prefix_restored_tokens", 0.0)
    return {
        "expert": (hits, wanted, "share of the experts asked for that lay in memory, since the start"),
        "prefix": (restored, asked, "share of the prompt tokens that were not computed, since the start"),
    }


def _labelled(values: Mapping[str, float], prefix: str, name: str, text: str, label: str) -> Iterable[Metric]:
    found = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    if found:
        family = GaugeMetricFamily(name, text, labels=[label])
        for key, value in found.items():
            family.add_metric([key], value)
        yield family

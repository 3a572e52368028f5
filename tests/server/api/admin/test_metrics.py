"""GET /metrics: what the engine counted last, and nothing before."""

from dataclasses import replace

from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry

from server.api.admin.metrics import metrics_router
from server.api.service import Service
from server.link.engine_protocol import EngineStatus
from server.link.messages import Stats


class _Engine:
    status = EngineStatus("loading")


def test_counts_and_ledger_are_shown_once_the_engine_has_sent_them(service: Service) -> None:
    engine, app = _Engine(), FastAPI()
    app.include_router(metrics_router(replace(service, engine=engine), CollectorRegistry()))  # type: ignore[arg-type]
    client = TestClient(app)
    text = client.get("/metrics").text
    assert "glmserve_ready 0.0" in text
    assert "expert" not in text
    values = {"hits": 30.0, "ahead_recall": 0.5, "planned.trunk": 7e6, "slots": 12.0, "stall_s": 0.25}
    values |= {"policy.lru": 1.0, "shrinks": 2.0, "slots_planned": 16.0}
    values |= {"probe_bytes_per_s": 2e9, "probe_depth": 8.0, "used.trunk": 6e6}
    engine.status = replace(engine.status, state="ready", stats=Stats(values))
    text = client.get("/metrics").text
    for line in (
        "glmserve_ready 1.0",
        "glmserve_expert_hits_total 30.0",
        "glmserve_lookahead_recall 0.5",
        'glmserve_memory_planned_bytes{line="trunk"} 7e+06',
        'glmserve_memory_used_bytes{line="trunk"} 6e+06',
        "glmserve_expert_slots 12.0",
        "glmserve_expert_slots_planned 16.0",
        'glmserve_expert_policy{policy="lru"} 1.0',
        "glmserve_bank_shrinks_total 2.0",
        "glmserve_probe_bytes_per_second 2e+09",
        "glmserve_probe_depth 8.0",
        "glmserve_stall_seconds_total 0.25",
    ):
        assert line in text
